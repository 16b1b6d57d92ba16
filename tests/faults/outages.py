"""Kills the backend, again and again, and has it back after a while.

    python -m tests.faults.outages [--kills N] [--away 0,5,60] [--patience 120,20] [--items N]

For each patience (UNISONO_BACKEND_PATIENCE) there is a service over a backend of its own, side by side, so that their
outages are waited for at one time. What was finished is kept. Where the backend is back in time, the rest completes;
where patience is over before, it ends with BACKEND_UNAVAILABLE, and later batches run as ever.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import validators
from tests.faults.backend import SLOTS, StandIn
from tests.faults.callers import Caller, all_histories, batch_ids, dial
from tests.faults.history import COMPLETED, Asked
from tests.faults.service import AGAIN_S, Service
from tests.faults.streams import Streamer
from tests.faults.table import Figures, report
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

UNAVAILABLE = "BACKEND_UNAVAILABLE"
# So many more results come before the next death.
_BETWEEN = 40
_PROGRESS_S = 60.0
# An outage lasts longer by the start of the backend's process.
_START_S = 10.0


@dataclass
class Found:
    """What one service showed."""

    patience_s: float
    kills: Counter[float] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    # Calls beyond what results tell of; less than 0: on their way when the backend died.
    beyond: int = 0
    # How soon the next answer came after the backend was back, in seconds.
    again_s: list[float] = field(default_factory=list)


async def run(
    *,
    away: Sequence[float] = (0.0, 5.0, 60.0),
    kills: int = 30,
    patience: Sequence[float] = (120.0, 20.0),
    items: int = 120,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Found]:
    """Kills the backend so often in all, away so long in turn; raises BrokenPromiseError."""
    times = [away[number // len(patience) % len(away)] for number in range(kills)]
    lanes = [
        _run_one(patience_s, times[number :: len(patience)], items, tell)
        for number, patience_s in enumerate(patience)
    ]
    tasks = [asyncio.ensure_future(lane) for lane in lanes]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            _ = task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)


async def _run_one(patience_s: float, times: Sequence[float], items: int, tell: Callable[[str], None]) -> Found:
    found = Found(patience_s)
    folder = Path(tempfile.mkdtemp(prefix="unisono-outages-"))
    async with StandIn(folder) as backend:
        service = Service(folder, backend.url, {"BACKEND_PATIENCE": f"{patience_s:g}s"})
        callers = [Caller(service.target, items=items), Streamer(service.target, items=items // 2)]
        calling = asyncio.gather(*(caller.run() for caller in callers))
        try:
            _ = await service.up()
            for away_s in times:
                await _more(callers, _BETWEEN, calling)
                backend.kill()
                await asyncio.sleep(away_s)
                await backend.start()
                began = time.monotonic()
                found.kills[away_s] += 1
                await _more(callers, 1, calling)
                found.again_s.append(time.monotonic() - began)
                tell(f"patience {patience_s:g} s: away for {away_s:g} s, {found.kills.total()} of {len(times)}")
            for caller in callers:
                caller.stop()
            async with asyncio.timeout(120.0 + patience_s):
                _ = await calling
            await _check(callers, service, backend, found)
        finally:
            _ = calling.cancel()
            _ = await asyncio.gather(calling, return_exceptions=True)
            _ = service.kill()
        promise("well", not service.complaints, service.complaints[:3])
    shutil.rmtree(folder)
    return found


async def _more(callers: Sequence[Caller], count: int, calling: asyncio.Future[list[None]]) -> None:
    """Waits until so many more items were answered."""

    def answered() -> int:
        return sum(end.state == COMPLETED for history in all_histories(callers) for end in history.ends)

    wanted = answered() + count
    began = time.monotonic()
    while answered() < wanted:
        if calling.done():
            _ = calling.result()
        promise("going again", time.monotonic() - began < _PROGRESS_S, f"nothing was answered for {_PROGRESS_S:g} s")
        await asyncio.sleep(AGAIN_S)


async def _check(callers: Sequence[Caller], service: Service, backend: StandIn, found: Found) -> None:
    async with dial(service.target) as channel:
        stub = pb_grpc.BatchInferenceStub(channel)
        for caller in callers:
            await caller.finish(stub)
        ids = await batch_ids(stub)
    histories = all_histories(callers)
    is_too_long = any(away_s > found.patience_s for away_s in found.kills)
    may_be = any(away_s + _START_S > found.patience_s for away_s in found.kills)
    for history in histories:
        validators.well(history, unless=[UNAVAILABLE] if may_be else [])
    validators.listed(histories, ids)
    asked = Asked(calls=backend.calls(), backend_kills=found.kills.total(), a_kill=2 * SLOTS)
    found.beyond = validators.accounted(histories, asked)
    found.batches = len(histories)
    found.results = Counter(end.reason or end.state for history in histories for end in history.ends)
    promise("answered", found.results[UNAVAILABLE] or not is_too_long, "patience never ended, and should have")


def figures(found: Sequence[Found]) -> Figures:
    """What a run showed, for people."""
    rows: list[tuple[str, str]] = []
    for one in found:
        killed = ", ".join(f"{count} × back after {away_s:g} s" for away_s, count in sorted(one.kills.items()))
        results = ", ".join(f"{count:,} {name}" for name, count in sorted(one.results.items()))
        name = f"patience {one.patience_s:g} s"
        rows += [
            (name, f"killed {one.kills.total()} times: {killed}"),
            (f"{name}: {one.batches} batches", f"{results}; none lost, none twice, none changed"),
            (f"{name}: next answer", f"{max(one.again_s):.1f} s after the backend was back, at the longest"),
        ]
    return rows


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.outages", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=30, help="deaths in all (default 30)")
    parser.add_argument("--away", default="0,5,60", help="seconds until it is back, in turn (default 0,5,60)")
    parser.add_argument("--patience", default="120,20", help="of each service, in seconds (default 120,20)")
    parser.add_argument("--items", type=int, default=120, help="items of each batch (default 120)")
    given = parser.parse_args()
    away, patience = ([float(one) for one in text.split(",")] for text in (given.away, given.patience))
    return report(
        "outages",
        lambda tell: run(kills=given.kills, away=away, patience=patience, items=given.items, tell=tell),
        figures,
    )


if __name__ == "__main__":
    sys.exit(main())
