"""One group of a batch on its way: its waves, its passes, its loads; in the end its figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.events import GroupPlanned
from unisono.core.passes import PassCounter
from unisono.core.report import GroupReport, WaveReport, fewest_passes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.app.ports import LoadOutcome, ReleaseTimes
    from unisono.core.model import Finished, PassMethod, RunnerSpec, Slots


@dataclass(slots=True)
class GroupRun:
    """A group of a batch that is running."""

    number: int
    runner: RunnerSpec
    is_loaded: bool
    counter: PassCounter
    item_count: int = 0
    waves: int = 0
    loads: int = 0
    load_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_release_ns: int | None = None
    last_end_ns: int | None = None
    # Tokens of each answer, for the fewest passes that could have done.
    _tokens: list[int] = field(default_factory=list)
    # The first wave: how close together it went out, who was in it, and when they first spoke.
    _first_spread_s: float = 0.0
    _first_members: frozenset[int] = frozenset()
    _first_tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, number: int, runner: RunnerSpec, *, is_loaded: bool, method: PassMethod) -> GroupRun:
        """A group of which nothing has run yet."""
        counter = PassCounter(method, drafts=bool(runner.options.draft_num_predict))
        return cls(number, runner, is_loaded, counter)

    def planned(self, slots: Slots) -> GroupPlanned:
        """What it is at this moment."""
        return GroupPlanned(
            group=self.number,
            runner=self.runner,
            item_count=self.item_count,
            is_loaded=self.is_loaded,
            slots=slots,
        )

    def loaded(self, outcome: LoadOutcome) -> None:
        """The runner was made ready."""
        if not outcome.was_loaded:
            self.loads += 1
            self.load_s += outcome.duration_s

    def released(self, indexes: Sequence[int], times: ReleaseTimes) -> int:
        """Items were released together; answers with the release's number within the group."""
        if self.first_release_ns is None:
            self.first_release_ns = times.first_ns
            self._first_spread_s = times.spread_s
            self._first_members = frozenset(indexes)
        self.waves += 1
        return self.waves - 1

    def spoke(self, index: int, at_ns: int) -> None:
        """A token of an item, by the backend's clock."""
        self.counter.spoke(index, at_ns)
        if index in self._first_members:
            self._first_tokens.setdefault(index, at_ns)

    def finished(self, index: int, answer: Finished) -> int:
        """An item's answer is whole; answers with how many other items spoke meanwhile."""
        tokens = answer.usage.completion_tokens
        self._tokens.append(tokens)
        self.completion_tokens += tokens
        self.prompt_tokens += answer.usage.prompt_tokens
        return self.counter.ended(
            index,
            answer.at_ns,
            tokens=tokens,
            has_end_token=answer.finish_reason_raw == "stop",
            eval_s=answer.durations.eval_s,
        )

    def broke_off(self, index: int, at_ns: int) -> int:
        """An item's answer broke off; answers with how many other items spoke meanwhile."""
        return self.counter.ended(index, at_ns, tokens=None, has_end_token=False)

    def report(self, slots: Slots) -> GroupReport:
        """Its figures, when all its items have ended."""
        self.counter.settle()
        firsts = self._first_tokens.values()
        first_wave = WaveReport(
            item_count=len(self._first_members),
            release_spread_s=self._first_spread_s,
            first_token_spread_s=(max(firsts) - min(firsts)) / 1e9 if len(firsts) > 1 else None,
        )
        start, end = self.first_release_ns, self.last_end_ns
        return GroupReport(
            group=self.planned(slots),
            passes=self.counter.count,
            fewest_passes=fewest_passes(self._tokens, slots.count) if self._tokens else None,
            waves=self.waves,
            first_wave=first_wave if self.waves else None,
            loads=self.loads,
            load_s=self.load_s,
            duration_s=None if start is None or end is None else (end - start) / 1e9,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
        )
