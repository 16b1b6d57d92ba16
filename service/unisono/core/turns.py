"""Whose turn it is: the runners of one backend, which take turns because it is one processor.

Theory of operation. A runner that is loaded already, or that has waited for `turn_s`, goes first; among such, the one
that has waited longest. Runners that were seen in memory side by side have their turns together: none of them has to
make room for another.

A turn ends when the runner has nothing left for the backend, or, if others wait, after `turn_s`: then it takes back
what is held, and the next begins when the last in flight has ended.

While the backend is left to other clients (`yielding.py`), nothing goes and nobody's turn begins. Afterwards any
runner may have had to make room, so each is loaded again before its next items; the turns that were on go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from unisono.core.idle import IdleReason
from unisono.core.yielding import Yielding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.core.commands import Command
    from unisono.core.conductor import Conductor
    from unisono.core.model import RunnerSpec


class Readiness(Enum):
    """How far the turn of a runner is."""

    NO_TURN = "no turn"

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    # Its time is up: what is in flight ends, and nothing more goes.
    ENDING = "ending"


@dataclass(slots=True)
class Place:
    """A runner, and what the arbiter knows of it."""

    runner: RunnerSpec
    conductor: Conductor
    # Seen in the backend's memory when work for it came.
    is_loaded: bool = False
    # Seen there since anything was last loaded: it stays beside all others of which that is true.
    is_beside: bool = False
    # Loaded for its items, and not taken out since.
    was_used: bool = False
    waiting_since_s: float = 0.0
    ready_until_s: float = 0.0
    load_failures: int = 0
    load_again_s: float = 0.0
    wants_unload: bool = False
    # Its turn: how far it is, and since when.
    readiness: Readiness = Readiness.NO_TURN
    turn_began_s: float = 0.0

    @property
    def is_active(self) -> bool:
        """Whether it is its turn."""
        return self.readiness is not Readiness.NO_TURN


class Turns:
    """Whose turn it is among these places."""

    def __init__(
        self, places: Mapping[RunnerSpec, Place], *, turn_s: float, ready_s: float, yield_every_s: float
    ) -> None:
        self._places = places
        self._yielding = Yielding(yield_every_s)
        self._turn_s = turn_s
        self._ready_s = ready_s

    def see(self, now: float) -> None:
        """Something may have come or gone, or time has passed: sees whether the backend is to be left to others."""
        self._yielding.see(sum(place.conductor.in_flight for place in self._places.values()), now)

    def end_old(self, now: float) -> list[Command]:
        """Ends the turns that are over, and holds back whose turn goes on while the backend is left to others."""
        commands: list[Command] = []
        for place in self._active():
            commands += self._end(place, now)
            if self._yielding.is_on and place.readiness is Readiness.READY:
                place.readiness = Readiness.COLD
                commands += place.conductor.shut(now, IdleReason.YIELD)
        return commands

    def begin_new(self, now: float) -> list[Command]:
        """Nobody is active: the next one is. So is one that was seen in memory beside all that are.

        A runner that was used a moment ago needs no load.
        """
        if self._yielding.is_on:
            for one in self._places.values():
                one.ready_until_s = 0.0
            return []
        commands: list[Command] = []
        while (place := self._next(now)) is not None:
            place.turn_began_s = now
            place.readiness = Readiness.COLD
            if now < place.ready_until_s:
                place.readiness = Readiness.READY
                commands += place.conductor.open(now)
        return commands

    def load_next(self, now: float) -> RunnerSpec | None:
        """An active runner is cold, no other is being loaded, and no failed load must be waited out: load it."""
        active = self._active()
        cold = next((one for one in active if one.readiness is Readiness.COLD and now >= one.load_again_s), None)
        if cold is None or self._is_load_held_back(active):
            return None
        cold.readiness = Readiness.LOADING
        for one in self._places.values():
            # Whoever is in memory may have to make room.
            one.ready_until_s = 0.0
        return cold.runner

    def next_moment(self) -> float | None:
        """When it must be looked at again, though nothing happens."""
        yielding_s = self._yielding.next_moment()
        moments = [] if yielding_s is None else [yielding_s]
        active = self._active()
        for place in active:
            if place.readiness is Readiness.COLD:
                if not self._is_load_held_back(active):
                    moments.append(place.load_again_s)
            elif place.readiness is Readiness.READY and self._someone_else_waits():
                moments.append(place.turn_began_s + self._turn_s)
        return min(moments, default=None)

    def _end(self, place: Place, now: float) -> list[Command]:
        """Sees whether the active runner's turn is over.

        1. A load is under way: it is not broken off, since the backend would have to begin again.
        2. Its time is up while another waits: what is held goes back, and what is in flight ends.
        3. It was ending, but nobody waits any more: it goes on.
        4. It has something for the backend, or at the backend: it goes on.
        5. Otherwise the turn is over.
        """
        commands: list[Command] = []
        if place.readiness is Readiness.LOADING:
            return []
        others_wait = self._someone_else_waits()
        is_late = now >= place.turn_began_s + self._turn_s
        if place.readiness is Readiness.READY and others_wait and is_late:
            place.readiness = Readiness.ENDING
            commands += place.conductor.shut(now)
        elif place.readiness is Readiness.ENDING and not others_wait:
            place.readiness = Readiness.READY
            place.turn_began_s = now
            commands += place.conductor.open(now)
        is_ending = place.readiness is Readiness.ENDING
        if place.conductor.in_flight or (place.conductor.has_work and not is_ending):
            return commands
        commands += place.conductor.shut(now)
        if place.readiness is not Readiness.COLD:
            place.ready_until_s = now + self._ready_s
        place.waiting_since_s = now
        place.readiness = Readiness.NO_TURN
        return commands

    def _next(self, now: float) -> Place | None:
        """Whose turn begins now: the first of those that wait, or one that has room beside those that are active."""
        active = self._active()
        waiting = [one for one in self._places.values() if one.conductor.has_work and not one.is_active]
        if active:
            # All of them in memory at one time: none has to make room for another.
            if not all(one.readiness is Readiness.READY and one.is_beside for one in active):
                return None
            waiting = [one for one in waiting if one.is_beside]

        def rank(place: Place) -> tuple[bool, float]:
            must_wait = not place.is_loaded and now < place.waiting_since_s + self._turn_s
            return must_wait, place.waiting_since_s

        return min(waiting, key=rank, default=None)

    def _is_load_held_back(self, active: list[Place]) -> bool:
        """Whether none may be loaded now: another is, or the backend is left to others."""
        return self._yielding.is_on or any(one.readiness is Readiness.LOADING for one in active)

    def _active(self) -> list[Place]:
        return [place for place in self._places.values() if place.is_active]

    def _someone_else_waits(self) -> bool:
        return any(place.conductor.has_work for place in self._places.values() if not place.is_active)
