"""Kills the service, again and again: `make faults`.

    python -m tests.faults.kills [--random N] [--each N] [--errors N] [--items N] [--seed N] [--only PLACE]

One caller submits batches and follows them, one after the other, while the service is killed with `kill -9`: at
random instants, its start included, and at each failpoint of its journal. README.md says what must be so in the end.
"""

from __future__ import annotations

import argparse
import asyncio
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

from tests.faults.rig import SLOTS, BrokenPromiseError, Caller, Service, Up, promise, stand_in

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
    batches: int = 0
    results: int = 0
    connections: int = 0
    # Calls of the backend beyond one for each item.
    repeated: int = 0
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
    """Lets the service die all these deaths; raises BrokenPromiseError."""
    found = Found()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="unisono-faults-"))
    with stand_in(pass_s=pass_s) as backend:
        service = Service(folder, backend.url)
        caller = Caller(service.target, backend, items=items)
        calling = asyncio.ensure_future(caller.run())
        try:
            for number, kill in enumerate(kills):
                await _die(service, kill, calling, found)
                tell(f"{number + 1} of {len(kills)}: {kill}")
            service.start()
            up = await service.wait_up()
            promise("going again", up is not None, "the service ended by itself")
            found.ups += [up] if up is not None else []
            caller.stop()
            async with asyncio.timeout(120.0):
                await calling
            found.repeated = await caller.finish()
            promise("stops", service.kill(signal.SIGTERM) == 0, "SIGTERM did not end it well")
        except BaseException:
            tell(f"what is left is in {folder}")
            raise
        finally:
            _ = calling.cancel()
            _ = await asyncio.gather(calling, return_exceptions=True)
            _ = service.kill()
        promise("well", not service.complaints, service.complaints[:3])
    found.batches = len(caller.histories)
    found.results = sum(len(one.results) for one in caller.histories)
    found.connections = sum(one.calls for one in caller.histories)
    found.took_s = time.monotonic() - began
    slowest = max(one.own_s for one in found.ups)
    promise("going again", slowest <= limit_s, f"took {slowest:.1f} s; {limit_s:g} s is promised")
    promise("accounted", found.repeated <= _REPEATED_A_KILL * len(kills), f"{found.repeated} calls were repeated")
    shutil.rmtree(folder)
    return found


async def _die(service: Service, kill: Kill, calling: asyncio.Future[None], found: Found) -> None:
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
        calling.result()


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--random", type=int, default=100, help="kills at random instants (default 100)")
    parser.add_argument("--each", type=int, default=10, help="kills at each failpoint (default 10)")
    parser.add_argument("--errors", type=int, default=10, help="kills after writes that failed (default 10)")
    parser.add_argument("--items", type=int, default=300, help="items of each batch (default 300)")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other instants (default 1)")
    parser.add_argument("--only", action="append", choices=[*PLACES], help="of the failpoints, only this one")
    parser.add_argument("--quiet", action="store_true", help="print the end only")
    given = parser.parse_args()
    kills = plan(
        random_kills=given.random, each=given.each, seed=given.seed, errors=given.errors, only=given.only or ()
    )

    def tell(line: str) -> None:
        if not given.quiet:
            print(line, file=sys.stderr, flush=True)

    try:
        found = asyncio.run(run(kills, items=given.items, tell=tell))
    except BrokenPromiseError as error:
        print(
            f"broken: {error}\nagain: python -m tests.faults.kills --seed {given.seed} --random {given.random} "
            f"--each {given.each} --errors {given.errors} --items {given.items}"
        )
        return 1
    print(", ".join(f"{count} at {name}" for name, count in sorted(found.kills.items())))
    print(f"batches {found.batches}, results {found.results:,}: none lost, none twice, none changed")
    print(f"calls repeated {found.repeated} ({found.repeated / max(1, len(kills)):.1f} a kill)")
    for name, times in (("", [one.own_s for one in found.ups]), (" by the wall", [one.wall_s for one in found.ups])):
        print(f"going again{name}: median {statistics.median(times):.2f} s, longest {max(times):.2f} s")
    print(f"connections {found.connections}, took {found.took_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
