"""A runner whose slots share one processor, for scenarios in which it matters what passes and prompts cost.

A pass lasts `pass_s`, and `token_s` more for each answer in it, and `prompt_token_s` more for each prompt token that
is computed in it. A slot keeps the prompt that was last in it; a request gets the free slot that has most in common
with it, or the one that was used least recently. A token of text has four bytes.

`Semaphore` stands where a conductor does: what a client does that lets so many requests run at a time.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tests.unit.core.simulator import Audit, Staging
from unisono.core.commands import Abort, Command, End, Release, Retry, Stage, Work
from unisono.core.conductor import Conductor
from unisono.core.errors import RunnerDiedError, UnisonoError
from unisono.core.lanes import SIMILARITY
from unisono.core.model import ItemState, Usage
from unisono.core.prefixes import Prefix, common_bytes
from unisono.core.slot_history import Held

BYTES_PER_TOKEN = 4
DIED = RunnerDiedError("the runner has died")
# Prompt tokens that one pass computes at most.
BLOCK = 512


def family(key: int, size: int) -> Prefix:
    """A leading part of so many bytes that has nothing in common with one of another key."""
    return Prefix(key, (key,), (size,))


@dataclass(slots=True)
class Slot:
    """One of the runner's sequences."""

    staging: Staging | None = None
    holds: Prefix | None = None
    used: int = 0
    prompt_left: int = 0
    said: int = 0
    began_s: float = 0.0
    spoke_s: float = 0.0


class Semaphore:
    """Lets so many items run at a time, in their order, whatever they begin with."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._serials = itertools.count()
        self._waiting: deque[int] = deque()
        self._flying = 0

    def open(self, now: float) -> list[Command]:
        """Nothing waits yet."""
        return []

    def add(self, works: Iterable[Work], now: float) -> list[Command]:
        """Items want to be run."""
        self._waiting += [work.ticket for work in works]
        return self._go_on()

    def staged(self, ticket: int, serial: int, now: float) -> list[Command]:
        """Nothing is held."""
        return [Release(tickets=(ticket,), wave=0)]

    def spoke(self, ticket: int, serial: int, now: float) -> list[Command]:
        """Whatever it says."""
        return []

    def finished(
        self, ticket: int, serial: int, now: float, held: Held | None, usage: Usage | None = None
    ) -> list[Command]:
        """Makes room for another."""
        self._flying -= 1
        return [End(ticket=ticket, state=ItemState.COMPLETED, attempts=1), *self._go_on()]

    def failed(self, ticket: int, serial: int, error: UnisonoError, now: float) -> list[Command]:
        """Not here."""
        raise AssertionError(error)

    def tick(self, now: float) -> list[Command]:
        """There is nothing to wait for."""
        return []

    def next_alarm(self) -> float | None:
        """Never."""
        return None

    def _go_on(self) -> list[Command]:
        commands: list[Command] = []
        while self._waiting and self._flying < self._count:
            self._flying += 1
            commands.append(Stage(ticket=self._waiting.popleft(), serial=next(self._serials), attempt=1))
        return commands


_Filler = TypeVar("_Filler", Conductor, Semaphore)


@dataclass(kw_only=True)
class Processor(Generic[_Filler]):
    """A runner, and the conductor that fills it."""

    conductor: _Filler
    slots: int
    pass_s: float = 0.02
    token_s: float = 0.001
    prompt_token_s: float = 0.0005
    # How late a token is heard of.
    late_s: Callable[[], float] = lambda: 0.0
    # How long an answer is, where it is not as long as its num_predict.
    lengths: dict[int, int] = field(default_factory=dict)
    # Whether it says of each answer when that held its slot.
    tells_times: bool = False
    # Whose first token ends the runner.
    killers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.now = 100.0
        self.audit = Audit()
        self.passes = 0
        self.prompt_tokens = 0
        self.deaths = 0
        self.releases: list[Release] = []
        self.retries: list[Retry] = []
        self._works: dict[int, Work] = {}
        self._queue: deque[Staging] = deque()
        self._released_s: dict[Staging, float] = {}
        self._slots = [Slot() for _ in range(self.slots)]
        self._uses = 0
        self.do(self.conductor.open(self.now))

    @property
    def ends(self) -> dict[int, End]:
        """How each item ended."""
        return self.audit.ended

    @property
    def order(self) -> list[int]:
        """The items, as they were released."""
        return [ticket for release in self.releases for ticket in release.tickets]

    def add(self, works: Iterable[Work]) -> None:
        """Hands items to the conductor."""
        works = list(works)
        self._works.update((work.ticket, work) for work in works)
        self.audit.added |= {work.ticket for work in works}
        self.do(self.conductor.add(works, self.now))

    def run(self, *, passes: int | None = None) -> dict[int, End]:
        """Runs so many passes, or to the end: then nothing may be lost."""
        until = None if passes is None else self.passes + passes
        while until is None or self.passes < until:
            self._seat()
            if any(slot.staging is not None for slot in self._slots):
                self._pass()
                continue
            alarm = self.conductor.next_alarm()
            if alarm is None:
                break
            self.now = max(self.now, alarm)
            self.do(self.conductor.tick(self.now))
        if until is None:
            self.audit.check_finished()
        return self.ends

    def do(self, commands: Iterable[Command]) -> None:
        """Carries out commands."""
        commands = list(commands)
        self.audit.check(commands)
        for command in commands:
            match command:
                case Stage(ticket=ticket, serial=serial):
                    self.audit.was_staged(Staging(ticket, serial))
                    self.do(self.conductor.staged(ticket, serial, self.now))
                case Release(tickets=tickets):
                    self.releases.append(command)
                    stagings = [Staging(ticket, self.audit.open[ticket]) for ticket in tickets]
                    self._released_s.update(dict.fromkeys(stagings, self.now))
                    self._queue += stagings
                case Retry():
                    self.retries.append(command)
                case Abort() | End():
                    pass

    # -- The runner --------------------------------------------------------------------------------------------

    def _seat(self) -> None:
        """Gives free slots to those who wait, first come first served."""
        free = [slot for slot in self._slots if slot.staging is None]
        while self._queue and free:
            staging = self._queue.popleft()
            work = self._works[staging.ticket]
            slot = max(free, key=lambda slot: common_bytes(slot.holds, work.prefix))
            if common_bytes(slot.holds, work.prefix) <= SIMILARITY * work.prompt_bytes:
                slot = min(free, key=lambda slot: slot.used)
            free.remove(slot)
            left = work.prompt_bytes - common_bytes(slot.holds, work.prefix)
            slot.staging, slot.holds, slot.said, slot.began_s = staging, work.prefix, 0, self.now
            slot.prompt_left = max(1, left // BYTES_PER_TOKEN)

    def _pass(self) -> None:
        members = [slot for slot in self._slots if slot.staging is not None and not slot.prompt_left]
        computed = 0
        for slot in self._slots:
            if slot.staging is not None and slot.prompt_left:
                part = min(slot.prompt_left, BLOCK - computed)
                slot.prompt_left -= part
                computed += part
                if not slot.prompt_left:
                    members.append(slot)
        self.passes += 1
        self.prompt_tokens += computed
        self.now += self.pass_s + self.token_s * len(members) + self.prompt_token_s * computed
        ended_s = self.now
        for late_s, slot in sorted(((self.late_s(), slot) for slot in members), key=lambda one: one[0]):
            self.now = ended_s + late_s
            if not self._speak(slot):
                break
        self.now = ended_s

    def _speak(self, slot: Slot) -> bool:
        """A slot's next token; False where it ended the runner."""
        staging = slot.staging
        assert staging is not None
        if staging.ticket in self.killers:
            self._die()
            return False
        work = self._works[staging.ticket]
        slot.said += 1
        if slot.said == 1:
            slot.spoke_s = self.now
        self.do(self.conductor.spoke(*staging, self.now))
        length = self.lengths.get(staging.ticket, work.num_predict or 1)
        if slot.said >= length:
            self._uses += 1
            slot.staging, slot.used = None, self._uses
            self.audit.was_closed(staging, "released")
            usage = Usage(prompt_tokens=work.prompt_bytes // BYTES_PER_TOKEN, completion_tokens=length)
            self.do(self.conductor.finished(*staging, self.now, self._held(staging, slot), usage))
        return True

    def _held(self, staging: Staging, slot: Slot) -> Held | None:
        """When an answer held its slot, as a backend tells it."""
        if not self.tells_times:
            return None
        at_backend = [*self._queue, *(other.staging for other in self._slots if other.staging is not None)]
        return Held(
            start_s=slot.began_s,
            end_s=self.now,
            waited_s=slot.began_s - self._released_s[staging],
            spoke_s=slot.spoke_s,
            pass_s=self.pass_s,
            settled_s=min((self._released_s[other] for other in at_backend), default=math.inf),
        )

    def _die(self) -> None:
        self.deaths += 1
        at_backend = [slot.staging for slot in self._slots if slot.staging is not None] + list(self._queue)
        self._queue.clear()
        self._slots = [Slot() for _ in self._slots]
        for staging in at_backend:
            self.audit.was_closed(staging, "failed")
            self.do(self.conductor.failed(*staging, DIED, self.now))
