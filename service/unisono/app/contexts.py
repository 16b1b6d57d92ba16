"""How many tokens of context a backend's runners have, and how many of them items in flight may reserve together.

What the backend gave a runner when it loaded it counts more than what was planned. Where neither is known there is no
limit. See `core/memory.py` for what the tokens take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.memory import tokens_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from unisono.core.capacity import Capacity
    from unisono.core.model import RunnerSpec


class Contexts:
    """The contexts of one backend's runners."""

    def __init__(self, memory_factor: float) -> None:
        """`memory_factor`: the share of a runner's context that items in flight may reserve."""
        self._memory_factor = memory_factor
        # Tokens of each slot that the backend gave runners when they were loaded; 0 where it does not say.
        self._given: dict[RunnerSpec, int] = {}

    def given(self, runner: RunnerSpec) -> int:
        """Tokens of context that the backend gave each slot of a runner; 0: not known."""
        return self._given.get(runner, 0)

    def remember(self, runner: RunnerSpec, tokens: int, known: Iterable[RunnerSpec]) -> None:
        """The backend says what it gave. `known`: the runners that others are remembered for no longer than."""
        kept = set(known)
        self._given = {other: told for other, told in self._given.items() if other in kept} | {runner: tokens}

    def is_limited(self, runner: RunnerSpec) -> bool:
        """Whether there may be a limit for its items: embeddings keep no context."""
        return self._memory_factor < 1 and not runner.is_embedding

    def limit(self, runner: RunnerSpec, capacity: Capacity, planned: int) -> int | None:
        """How many tokens its items in flight may reserve; None: any number. `planned`: the context; 0: not known.

        While the number of slots is not known, it is taken for as many as are tried: fewer would keep it from ever
        being learned.
        """
        context = self.given(runner) or planned
        slots = capacity.slots.count or capacity.limit
        return tokens_limit(context, slots, self._memory_factor) if context else None
