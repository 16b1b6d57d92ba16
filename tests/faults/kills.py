"""Kills the service, again and again, while batches are submitted, streamed and uploaded.

    python -m tests.faults.kills [--random N] [--each N] [--errors N] [--items N] [--seed N] [--only PLACE]

Three callers have batches run, one after the other: by SubmitBatch and AttachBatch, by durable StreamBatch, and by
OpenAI's files. Meanwhile the service is killed with `kill -9`: at random instants, its start included, and at each
failpoint of its journal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import validators
from tests.faults.backend import SLOTS, StandIn
from tests.faults.callers import Caller, all_histories, batch_ids, dial
from tests.faults.history import Asked, Bounds, Sample
from tests.faults.service import Service, Up
from tests.faults.streams import Streamer
from tests.faults.table import Figures, report
from tests.faults.uploads import Uploader
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

# Where the service can be killed, as adapters/journal/failpoints.py names it, and how often it passes there within a
# second or two of its start: the lease, what is taken over, what is old, a submit; and groups of events.
PLACES = {
    "call.before_commit": 4,
    "call.after_commit": 4,
    "events.before_commit": 40,
    "events.after_commit": 40,
}
# A random instant is so long after the start of the process, or after its first answer.
_STARTING_S, _RUNNING_S = 1.0, 1.5
# A failpoint is reached in this time.
_REACHED_S = 40.0
# Bounds, of a run of a machine that does nothing else.
GOING_AGAIN_S = 5.0
# At the backend, and answered but not kept yet.
_REPEATED_A_KILL = 2 * SLOTS
_MIB = 1024 * 1024
# What the service may take: memory, the whole of its folder, batches that run, and items. A successor may go shortly
# before each item's end.
_FOLDER_BYTES = 256 * _MIB
_BOUNDS = Bounds(
    memory_bytes=256 * _MIB, folder_bytes=_FOLDER_BYTES, running=8, in_flight=2 * SLOTS, queued=3 * 2_000
)
_SAMPLE_S = 0.25


@dataclass(frozen=True)
class Kill:
    """One death: at a place, for the nth time; or at an instant."""

    place: str = ""
    nth: int = 0
    # Instead of the death, writes are reported failed that had succeeded, or that had not: at each of these passages.
    errors: tuple[tuple[str, int], ...] = ()
    after_s: float = 0.0
    # From its first answer on, and not from the start of the process.
    is_up: bool = True

    @property
    def failpoints(self) -> str:
        """The service's setting for it."""
        rules = [f"{place}=error@{nth}" for place, nth in self.errors]
        return ",".join([*rules, f"{self.place}=kill@{self.nth}"] if self.place else rules)

    def __str__(self) -> str:
        """For people."""
        instant = f"{self.after_s:.2f} s after its {'first answer' if self.is_up else 'start'}"
        return (self.place and self.failpoints) or " ".join(filter(None, (self.failpoints, instant)))


@dataclass
class Found:
    """What a run showed."""

    kills: dict[str, int] = field(default_factory=dict)
    ups: list[Up] = field(default_factory=list)
    # By the letter of their callers.
    batches: dict[str, int] = field(default_factory=dict)
    results: int = 0
    connections: int = 0
    lost_answers: int = 0
    # Calls of the backend beyond those that results tell of.
    repeated: int = 0
    largest: Sample = field(default_factory=Sample)
    took_s: float = 0.0


def plan(*, random_kills: int, each: int, seed: int, errors: int = 0, only: Sequence[str] = ()) -> list[Kill]:
    """The deaths of a run, in an order of their own."""
    chance = random.Random(seed)
    kills = [
        Kill(after_s=chance.random() * (_RUNNING_S if is_up else _STARTING_S), is_up=is_up)
        for is_up in (chance.random() < 0.75 for _ in range(random_kills))
    ]
    for place, often in PLACES.items():
        if not only or place in only:
            kills += [Kill(place, chance.randint(1, often)) for _ in range(each)]
    for _ in range(errors):
        # The first three calls are the start's, which may fail as a whole: the next one succeeds.
        rules = [
            (place, chance.randint(4, 9) if place.startswith("call") else chance.randint(1, 30)) for place in PLACES
        ]
        kills.append(Kill(errors=tuple(rules), after_s=chance.random() * _RUNNING_S))
    chance.shuffle(kills)
    return kills


async def run(
    kills: Sequence[Kill],
    *,
    items: int,
    limit_s: float = GOING_AGAIN_S,
    pass_s: float = 0.01,
    tell: Callable[[str], None] = lambda _: None,
) -> Found:
    """Lets the service die all these deaths; raises BrokenPromiseError.

    `items`: of each batch of the first caller; those of the others are a third of that.
    """
    found = Found()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="unisono-faults-"))
    async with StandIn(folder, pass_s=pass_s) as backend:
        service = Service(folder, backend.url, {"MAX_DATA_BYTES": str(_FOLDER_BYTES)})
        some = max(1, items // 3)
        uploader = Uploader(service.http, items=some)
        callers = [Caller(service.target, items=items), Streamer(service.target, items=some), uploader]
        samples: list[Sample] = []
        calling = asyncio.gather(*(caller.run() for caller in callers))
        sampling = asyncio.ensure_future(_sample(service, samples))
        try:
            for number, kill in enumerate(kills):
                await _die(service, kill, calling, found)
                tell(f"{number + 1} of {len(kills)}: {kill}")
            found.ups.append(await service.up())
            for caller in callers:
                caller.stop()
            async with asyncio.timeout(180.0):
                _ = await calling
            await _check(callers, service, backend, found, kills=len(kills))
            promise("stops", service.kill(signal.SIGTERM) == 0, "SIGTERM did not end it well")
        except BaseException:
            tell(f"what is left is in {folder}")
            raise
        finally:
            for task in (calling, sampling):
                _ = task.cancel()
            _ = await asyncio.gather(calling, sampling, return_exceptions=True)
            _ = service.kill()
        promise("well", not service.complaints, service.complaints[:3])
    found.largest = validators.bounded(samples, _BOUNDS)
    found.lost_answers = uploader.lost
    found.took_s = time.monotonic() - began
    slowest = max(one.own_s for one in found.ups)
    promise("going again", slowest <= limit_s, f"took {slowest:.1f} s; {limit_s:g} s is promised")
    shutil.rmtree(folder)
    return found


async def _check(callers: Sequence[Caller], service: Service, backend: StandIn, found: Found, *, kills: int) -> None:
    """Everything that was told, held against what the service and the backend say in the end."""
    async with dial(service.target) as channel:
        stub = pb_grpc.BatchInferenceStub(channel)
        for caller in callers:
            await caller.finish(stub)
        ids = await batch_ids(stub)
    histories = all_histories(callers)
    for history in histories:
        validators.well(history)
    validators.listed(histories, ids)
    asked = Asked(calls=backend.calls(), service_kills=kills, a_kill=_REPEATED_A_KILL)
    found.repeated = validators.accounted(histories, asked)
    found.batches = {caller.letter: len(caller.histories) for caller in callers}
    found.results = sum(len(one.ends) for one in histories)
    found.connections = sum(len(one.connections) for one in histories)


async def _sample(service: Service, samples: list[Sample]) -> None:
    """Measures the service now and then, while it is there."""
    async with dial(service.target) as channel:
        stub = pb_grpc.BatchInferenceStub(channel)
        while True:
            await asyncio.sleep(_SAMPLE_S)
            with contextlib.suppress(RuntimeError):
                sample = await service.sample(stub)
                samples += [sample] if sample is not None else []


async def _die(service: Service, kill: Kill, calling: asyncio.Future[list[None]], found: Found) -> None:
    service.start(kill.failpoints)
    up = asyncio.ensure_future(service.wait_up())
    try:
        if kill.place:
            reached = await service.wait_dead(_REACHED_S)
            promise("reached", reached, f"{kill.failpoints} was not reached within {_REACHED_S:g} s")
            promise("reached", service.process.returncode == -signal.SIGKILL, f"exit {service.process.returncode}")
        elif kill.is_up:
            promise("going again", await up is not None, "the service ended by itself")
            await asyncio.sleep(kill.after_s)
        else:
            await asyncio.sleep(kill.after_s)
        promise("going again", kill.place or service.process.poll() is None, "the service ended by itself")
        _ = service.kill()
        if (went := await up) is not None:
            found.ups.append(went)
    finally:
        _ = up.cancel()
    name = "random instants after failed writes" if kill.errors else kill.place or "random instants"
    found.kills[name] = found.kills.get(name, 0) + 1
    if calling.done():
        # It never ends by itself, unless a promise was broken.
        _ = calling.result()


def figures(found: Found) -> Figures:
    """What a run showed, for people."""
    deaths = sum(found.kills.values())
    own, wall = [one.own_s for one in found.ups], [one.wall_s for one in found.ups]
    most = found.largest
    how = {"g": "submitted", "s": "streamed", "f": "uploaded"}
    return [
        *((f"kill -9: {name}", str(count)) for name, count in sorted(found.kills.items())),
        ("batches", ", ".join(f"{count} {how[letter]}" for letter, count in found.batches.items())),
        ("results", f"{found.results:,}: none lost, none twice, none changed"),
        ("connections", f"{found.connections:,}, and {found.lost_answers:,} HTTP requests without an answer"),
        ("calls repeated", f"{found.repeated:,}: {found.repeated / max(1, deaths):.1f} a kill"),
        ("going again", f"median {statistics.median(own):.2f} s, longest {max(own):.2f} s"),
        ("going again, by the wall", f"median {statistics.median(wall):.2f} s, longest {max(wall):.2f} s"),
        ("most memory", f"{most.memory_bytes / _MIB:.0f} MiB"),
        ("most on the disk", f"{most.folder_bytes / _MIB:.0f} MiB"),
        ("most items", f"{most.in_flight} at the backend, {most.queued} in the queue, of {most.running} batches"),
    ]


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--random", type=int, default=100, help="kills at random instants (default 100)")
    parser.add_argument("--each", type=int, default=10, help="kills at each failpoint (default 10)")
    parser.add_argument("--errors", type=int, default=10, help="kills after writes that failed (default 10)")
    parser.add_argument("--items", type=int, default=300, help="items of each batch (default 300)")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other instants (default 1)")
    parser.add_argument("--only", action="append", choices=[*PLACES], help="of the failpoints, only this one")
    given = parser.parse_args()
    kills = plan(
        random_kills=given.random, each=given.each, seed=given.seed, errors=given.errors, only=given.only or ()
    )
    return report("kills", lambda tell: run(kills, items=given.items, tell=tell), figures)


if __name__ == "__main__":
    sys.exit(main())
