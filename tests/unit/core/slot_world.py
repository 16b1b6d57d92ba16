"""A server with slots, pass by pass, its other callers, and a caller who learns how many slots it has.

Unlike `simulator.py`, whose items are answered each by itself, the items here share passes as llama.cpp's server
computes them: all that have their prompt behind them get a token a pass; the prompts of the rest are taken up in the
order of the slots, a block a pass, so that an item can hold a slot and wait all the same. All times that the caller
is told are off by some milliseconds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from unisono.core.capacity import Capacity, Held


@dataclass(slots=True, eq=False)
class Request:
    """Something to be computed."""

    tokens: int
    prompt_s: float
    is_ours: bool = True
    came_s: float = 0.0
    # When its prompt was begun, and its first token made.
    began_s: float | None = None
    spoke_s: float = 0.0
    said: int = 0
    prompt_left_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """Foreign clients, each of which sends its next request when it has been answered."""

    count: int
    from_s: float = 0.0
    until_s: float = float("inf")
    tokens: Callable[[], int] = lambda: 100_000
    # They give up what they have at `until_s`, instead of waiting for its end.
    leave_at_once: bool = True


@dataclass(slots=True)
class World:
    """The server, and time."""

    capacity: Capacity
    slots: int
    chance: random.Random
    jitter_s: float = 0.003
    pass_s: float = 0.02
    # Seconds of prompt that fit into one pass.
    block_s: float = 0.1
    others: Iterable[Others] = ()
    # Requests that wait at the server beyond the limit, so that a slot never falls idle.
    ahead: int = 0
    now_s: float = 0.0
    finished: int = 0
    # What the capacity said after each item: the limit, the number, and the lower bound.
    limits: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    most_busy: int = 0
    _busy: list[Request | None] = field(default_factory=list)
    _queue: deque[Request] = field(default_factory=deque)
    _flying: set[Request] = field(default_factory=set)
    _clients: list[tuple[Others, Request]] = field(default_factory=list)

    def run(self, items: Iterable[tuple[int, float]]) -> World:
        """Runs a batch of (tokens, seconds of prompt) to its end."""
        waiting = deque(Request(tokens, prompt_s) for tokens, prompt_s in items)
        self._busy = [None] * self.slots if len(self._busy) != self.slots else self._busy
        while waiting or self._flying:
            while waiting and len(self._flying) < self.capacity.limit + self.ahead:
                self._send(request := waiting.popleft())
                self._flying.add(request)
            self.let_others_in()
            self._pass()
        return self

    def restart(self, slots: int) -> None:
        """The server comes back with another number of slots, between two batches."""
        self.slots = slots
        self._busy = []

    def _send(self, request: Request) -> None:
        request.came_s = self.now_s
        request.prompt_left_s = request.prompt_s
        self._queue.append(request)

    def let_others_in(self) -> None:
        """Those who have left leave; those who come send; those who were answered send again."""
        for client in list(self._clients):
            others, request = client
            is_over = self.now_s >= others.until_s
            if is_over and others.leave_at_once:
                self._drop(request)
            if request not in self._queue and request not in self._busy:
                self._clients.remove(client)
                if not is_over:
                    self._come(others)
        for others in self.others:
            if others.from_s <= self.now_s < others.until_s:
                for _ in range(others.count - sum(1 for one, _ in self._clients if one is others)):
                    self._come(others)

    def _come(self, others: Others) -> None:
        self._send(request := Request(others.tokens(), 0.05, is_ours=False))
        self._clients.append((others, request))

    def _drop(self, request: Request) -> None:
        if request in self._queue:
            self._queue.remove(request)
        self._busy = [None if one is request else one for one in self._busy]

    def _pass(self) -> None:
        for place, one in enumerate(self._busy):
            if one is None and self._queue:
                self._busy[place] = self._queue.popleft()
        held = [one for one in self._busy if one is not None]
        self.most_busy = max(self.most_busy, sum(1 for one in held if one.is_ours))
        room_s = self.block_s
        spoke: list[Request] = []
        for one in held:
            if one.prompt_left_s <= 0 and one.began_s is not None:
                spoke.append(one)
            elif room_s > 0:
                one.began_s = self.now_s if one.began_s is None else one.began_s
                part_s = min(room_s, one.prompt_left_s)
                room_s -= part_s
                one.prompt_left_s -= part_s
                if one.prompt_left_s <= 0:
                    spoke.append(one)
        self.now_s += self.pass_s + (self.block_s - room_s)
        for one in spoke:
            one.spoke_s = one.spoke_s or self.now_s
            one.said += 1
        for place, one in enumerate(self._busy):
            if one is not None and one.said >= one.tokens:
                self._busy[place] = None
                if one.is_ours:
                    self._tell(one)

    def _tell(self, one: Request) -> None:
        assert one.began_s is not None
        self._flying.remove(one)
        self.finished += 1

        def off() -> float:
            return self.chance.uniform(-self.jitter_s, self.jitter_s)

        start_s, end_s = one.began_s + off(), self.now_s + off()
        held = Held(
            start_s=start_s,
            end_s=max(start_s, end_s),
            waited_s=max(0.0, start_s - one.came_s),
            spoke_s=min(max(start_s, one.spoke_s + off()), max(start_s, end_s)),
            pass_s=(self.now_s - one.spoke_s) / one.tokens,
            settled_s=min((other.came_s for other in self._flying), default=float("inf")),
        )
        speaking = sum(1 for other in self._flying if other.said)
        self.capacity.observe(held, speaking=speaking)
        self.ended_s.append(self.now_s)
        self.limits.append(self.capacity.limit)
        self.counts.append(self.capacity.slots.count)
        self.bounds.append(self.capacity.at_least)
