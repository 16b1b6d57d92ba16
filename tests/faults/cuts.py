"""Cuts a client's connection at each of 200 positions; what it resumes is exactly the rest.

    python -m tests.faults.cuts [--positions N] [--items N]

A proxy passes on so many bytes, not one more, and cuts: in order, and by a reset, in turn. Three clients resume: one
reads a batch that has ended, one submits a batch and follows it while it runs, and one adds to a durable stream; that
one is cut in what it sends, too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients.proxy import Proxy
from tests.faults import validators
from tests.faults.backend import StandIn
from tests.faults.callers import Caller, all_histories, batch_ids, dial, follow
from tests.faults.history import Asked, History
from tests.faults.service import Service
from tests.faults.streams import Streamer
from tests.faults.table import Figures, report
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

# Batches in which one position is looked for.
_TRIES = 5


@dataclass
class Found:
    """What a run showed."""

    # Cuts that were made, by what was cut.
    cuts: dict[str, int] = field(default_factory=dict)
    results: int = 0
    events: int = 0


async def run(*, positions: int = 200, items: int = 12, tell: Callable[[str], None] = lambda _: None) -> Found:
    """Cuts everything everywhere; raises BrokenPromiseError."""
    found = Found()
    folder = Path(tempfile.mkdtemp(prefix="unisono-cuts-"))
    async with StandIn(folder, pass_s=0.001) as backend:
        service = Service(folder, backend.url)
        try:
            _ = await service.up()
            async with Proxy(service.target) as proxy:
                first = Caller(proxy.target, items=items, letter="a")
                await _one(first)
                await _ended(proxy, first.histories[0], positions, found)
                tell(f"{found.cuts['reading what has ended']} cuts while a batch was read that has ended")
                followers = Caller(proxy.target, items=items, letter="b")
                await _live(proxy, followers, positions, "following what runs", found, sides=("down",))
                tell(f"{found.cuts['following what runs']} cuts while a batch was submitted and followed")
                streamers = Streamer(proxy.target, items=items, letter="c")
                await _live(proxy, streamers, positions, "adding to a stream", found, sides=("down", "up"))
                tell(f"{found.cuts['adding to a stream']} cuts while items were added to a stream")
            callers = [first, followers, streamers]
            await _check(callers, service, backend)
        finally:
            _ = service.kill()
        promise("well", not service.complaints, service.complaints[:3])
    found.results = sum(len(one.ends) for one in all_histories(callers))
    found.events += sum(len(one.events) for one in all_histories(callers))
    shutil.rmtree(folder)
    return found


async def _one(caller: Caller) -> History:
    """One more batch, to its end."""
    number = len(caller.histories)
    history = History(f"{caller.letter}{number}", {f"i{item}" for item in range(caller.items)})
    caller.histories.append(history)
    await caller.one(history)
    return history


async def _ended(proxy: Proxy, whole: History, positions: int, found: Found) -> None:
    """Reads a batch that has ended, with one cut; each time, all that came is what came without a cut."""
    cuts = proxy.cuts
    before = proxy.down
    await _read(proxy, History("x", set(whole.wanted), ids=[whole.batch_id]))
    size = proxy.down - before
    for number in range(positions):
        proxy.is_reset = number % 2 == 0
        proxy.cut_at(down=size * number // positions)
        again = History(f"x{number}", set(whole.wanted), ids=[whole.batch_id])
        await _read(proxy, again)
        validators.resumable(again)
        validators.complete(again)
        validators.unique(again)
        promise("stable", again.events == whole.events, f"cut at byte {size * number // positions}: others came")
        found.events += len(again.events)
    found.cuts["reading what has ended"] = proxy.cuts - cuts
    promise("reached", proxy.cuts - cuts == positions, f"{proxy.cuts - cuts} cuts of {positions}")


async def _read(proxy: Proxy, history: History) -> None:
    while not history.is_over:
        # A channel each: the same one would connect again while nobody has read how the last one ended.
        async with dial(proxy.target) as channel:
            await follow(pb_grpc.BatchInferenceStub(channel), history)


async def _live(
    proxy: Proxy, caller: Caller, positions: int, name: str, found: Found, *, sides: tuple[str, ...]
) -> None:
    """Has a batch run for each position, with a cut there."""
    up, down = proxy.up, proxy.down
    _ = await _one(caller)
    sizes = {"up": proxy.up - up, "down": proxy.down - down}
    cuts = proxy.cuts
    for number in range(positions):
        side = sides[number % len(sides)]
        proxy.is_reset = number // len(sides) % 2 == 0
        at = sizes[side] * number // positions
        for _ in range(_TRIES):
            proxy.cut_at(**{side: at})
            _ = await _one(caller)
            if proxy.cuts - cuts > number:
                break
            # What runs is not the same to the byte each time: this one had ended before.
            at -= at // 10
        promise("reached", proxy.cuts - cuts > number, f"no cut at byte {at} of {sizes[side]}")
    found.cuts[name] = proxy.cuts - cuts


async def _check(callers: list[Caller], service: Service, backend: StandIn) -> None:
    async with dial(service.target) as channel:
        stub = pb_grpc.BatchInferenceStub(channel)
        for caller in callers:
            await caller.finish(stub)
        ids = await batch_ids(stub)
    histories = all_histories(callers)
    for history in histories:
        validators.well(history)
    validators.listed(histories, ids)
    # Nobody died: each call is an attempt of a result.
    _ = validators.accounted(histories, Asked(calls=backend.calls()))


def figures(found: Found) -> Figures:
    """What a run showed, for people."""
    return [
        *(
            (f"cut while {name}", f"{count} positions, resumed: exactly the rest")
            for name, count in found.cuts.items()
        ),
        ("results", f"{found.results:,}, in {found.events:,} events: none lost, none twice, none changed"),
        ("calls repeated", "0"),
    ]


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cuts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--positions", type=int, default=200, help="cuts of each client (default 200)")
    parser.add_argument("--items", type=int, default=12, help="items of each batch (default 12)")
    given = parser.parse_args()
    return report("cuts", lambda tell: run(positions=given.positions, items=given.items, tell=tell), figures)


if __name__ == "__main__":
    sys.exit(main())
