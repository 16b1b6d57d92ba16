"""Delays, slices, cuts and resets what is said between every two parts, while batches run.

    python -m tests.faults.links [--items N] [--cuts N] [--seed N]

A proxy stands on each of the three ways: callers to the service by gRPC, callers to the service by HTTP, and the
service to its backend. One way at a time is spoilt, in each of the manners below, and the callers that use it have a
batch run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients.proxy import Proxy
from tests.faults import validators
from tests.faults.backend import SLOTS, StandIn
from tests.faults.callers import Caller, all_histories, batch_ids, dial
from tests.faults.history import COMPLETED, Asked
from tests.faults.service import Service
from tests.faults.streams import Streamer
from tests.faults.table import Figures, report
from tests.faults.uploads import Uploader
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

LINKS = ("grpc", "http", "backend")
MANNERS = ("delayed", "sliced", "bytewise", "swallowed", "cut", "reset")
_DELAY_S = 0.01
# Between two cuts.
_PAUSE_S = (0.02, 0.3)
# For so long nothing of what the service says arrives, before the connection is cut.
_SWALLOWS_S = 0.5
# An item whose every attempt was cut fails; what became of it is told.
_LOST = "CONNECTION_LOST"
# A request whose answer was cut may still be under way.
_SETTLE_S = 0.5


@dataclass
class Found:
    """What a run showed: of each way and manner, the results and the cuts."""

    results: dict[tuple[str, str], int] = field(default_factory=dict)
    cuts: dict[tuple[str, str], int] = field(default_factory=dict)
    # Items that failed since each attempt was cut; and attempts beyond each item's first.
    lost: int = 0
    retries: int = 0


async def run(
    *, items: int = 60, cuts: int = 5, seed: int = 1, tell: Callable[[str], None] = lambda _: None
) -> Found:
    """Spoils each way in each manner; raises BrokenPromiseError. `items`: of a batch; `cuts`: of each way."""
    found = Found()
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="unisono-links-"))
    async with StandIn(folder, pass_s=0.005) as backend, Proxy(backend.address) as behind:
        service = Service(folder, f"http://{behind.target}")
        callers: list[Caller] = []
        try:
            _ = await service.up()
            async with Proxy(service.target) as grpc_way, Proxy(service.http) as http_way:
                ways = {"grpc": grpc_way, "http": http_way, "backend": behind}
                for link in LINKS:
                    for manner in MANNERS:
                        those = _callers(link, manner, items, ways)
                        callers += those
                        await _spoil(ways[link], manner, those, cuts=cuts, chance=chance, found=found, link=link)
                        tell(f"{link} {manner}")
            for caller in callers:
                # The ways are gone.
                caller.target = service.http if isinstance(caller, Uploader) else service.target
            await _check(callers, service, backend, found)
        finally:
            _ = service.kill()
        promise("well", not service.complaints, service.complaints[:3])
    shutil.rmtree(folder)
    return found


def _callers(link: str, manner: str, items: int, ways: dict[str, Proxy]) -> list[Caller]:
    """Those who use a way; their batches are called by it."""
    name = f"{link}-{manner}-"
    gRPC, http = ways["grpc"].target, ways["http"].target  # noqa: N806 - its name
    some = max(1, items // 2)
    if link == "grpc":
        return [Caller(gRPC, items=items, letter=f"{name}g"), Streamer(gRPC, items=some, letter=f"{name}s")]
    if link == "http":
        return [Uploader(http, items=some, letter=f"{name}f", settle_s=_SETTLE_S)]
    return [Caller(gRPC, items=items, letter=f"{name}g")]


async def _spoil(
    proxy: Proxy,
    manner: str,
    callers: list[Caller],
    *,
    cuts: int,
    chance: random.Random,
    found: Found,
    link: str,
) -> None:
    before = proxy.cuts
    proxy.is_reset = manner == "reset"
    proxy.delay_s = _DELAY_S if manner == "delayed" else 0.0
    slices = {"sliced": lambda: chance.randint(1, 200), "bytewise": lambda: 1}
    proxy.slice = slices.get(manner)
    is_cut = manner in ("swallowed", "cut", "reset")
    running = asyncio.gather(*(caller.run() for caller in callers))
    try:
        async with asyncio.timeout(120.0):
            for _ in range(cuts if is_cut else 0):
                await asyncio.sleep(chance.uniform(*_PAUSE_S))
                if manner == "swallowed":
                    proxy.swallows_down = True
                    await asyncio.sleep(_SWALLOWS_S)
                proxy.cut()
            for caller in callers:
                caller.stop()
            _ = await running
    finally:
        _ = running.cancel()
        _ = await asyncio.gather(running, return_exceptions=True)
        proxy.delay_s, proxy.slice = 0.0, None
    found.cuts[link, manner] = proxy.cuts - before
    found.results[link, manner] = sum(len(one.ends) for one in all_histories(callers))


async def _check(callers: list[Caller], service: Service, backend: StandIn, found: Found) -> None:
    async with dial(service.target) as channel:
        stub = pb_grpc.BatchInferenceStub(channel)
        for caller in callers:
            await caller.finish(stub)
        ids = await batch_ids(stub)
    histories = all_histories(callers)
    for history in histories:
        is_behind = history.name.startswith(LINKS[-1])
        validators.well(history, unless=[_LOST] if is_behind else [])
        never = [end for end in history.ends if end.state != COMPLETED and not end.calls]
        promise("answered", not never, f"{history.name}: {len(never)} items failed and were never sent")
    validators.listed(histories, ids)
    # A cut behind the service loses requests on their way, as a death of the backend does.
    cuts = sum(count for (link, _), count in found.cuts.items() if link == LINKS[-1])
    asked = Asked(calls=backend.calls(), backend_kills=cuts, a_kill=2 * SLOTS)
    _ = validators.accounted(histories, asked)
    ends = [end for history in histories for end in history.ends]
    found.lost = sum(end.state != COMPLETED for end in ends)
    found.retries = sum(end.calls - 1 for end in ends)


def figures(found: Found) -> Figures:
    """What a run showed, for people."""
    rows = [
        (f"{link} {manner}", f"{results} results" + (f", {cuts} cuts" if (cuts := found.cuts[link, manner]) else ""))
        for (link, manner), results in found.results.items()
    ]
    total = sum(found.results.values())
    return [
        *rows,
        ("results", f"{total:,}: none lost, none twice, none changed"),
        ("retries", f"{found.retries} attempts were cut; {found.lost} items failed since all of theirs were"),
    ]


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.links", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--items", type=int, default=60, help="items of each batch (default 60)")
    parser.add_argument("--cuts", type=int, default=5, help="cuts of each way, in each manner (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other moments (default 1)")
    given = parser.parse_args()
    return report("links", lambda tell: run(items=given.items, cuts=given.cuts, seed=given.seed, tell=tell), figures)


if __name__ == "__main__":
    sys.exit(main())
