"""The figures of one batch, while it runs and in the end: what its groups have counted, put together."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from unisono.core.durable import Spent
from unisono.core.model import ItemState
from unisono.core.report import Progress, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.app.group_run import GroupRun


class Figures:
    """Counts how items end, and adds up what the groups say."""

    def __init__(self, groups: Sequence[GroupRun]) -> None:
        """`groups`: those of the batch, as they become more."""
        self._groups = groups
        self._ended: Counter[ItemState] = Counter()
        # Before this process had the batch; None: it was the first.
        self.spent: Spent | None = None

    def count(self, state: ItemState) -> None:
        """An item ended so."""
        self._ended[state] += 1

    @property
    def ended(self) -> int:
        """Items that have ended."""
        return self._ended.total()

    @property
    def participations(self) -> int:
        """How often an item took part in a pass."""
        return sum(group.counter.participations for group in self._groups)

    @property
    def unmapped_passes(self) -> int:
        """Passes whose items are not known any more."""
        return sum(group.counter.unmapped for group in self._groups)

    def progress(self, *, accepted: int, queued: int, in_flight: int) -> Progress:
        """How far the batch is."""
        return Progress(
            accepted=accepted,
            queued=queued,
            in_flight=in_flight,
            completed=self._ended[ItemState.COMPLETED],
            failed=self._ended[ItemState.FAILED],
            cancelled=self._ended[ItemState.CANCELLED],
            expired=self._ended[ItemState.EXPIRED],
            completion_tokens=sum(group.spoken_tokens for group in self._groups)
            + (self.spent.completion_tokens if self.spent is not None else 0),
            passes=sum(group.counter.so_far for group in self._groups),
        )

    def report(self, batch_id: str, counts: Progress, *, duration_s: float, journal_bytes: int) -> Report:
        """What there is to say when all items have ended."""
        groups = tuple(group.report() for group in self._groups)
        spent = self.spent or Spent(until_ns=0)
        told = [spent.cached_prompt_tokens, *(group.cached_prompt_tokens for group in self._groups)]
        cached = [tokens for tokens in told if tokens is not None]
        return Report(
            batch_id=batch_id,
            duration_s=duration_s,
            counts=counts,
            groups=groups,
            prompt_tokens=spent.prompt_tokens + sum(group.prompt_tokens for group in groups),
            cached_prompt_tokens=sum(cached) if cached else None,
            completion_tokens=spent.completion_tokens + sum(group.completion_tokens for group in groups),
            retries=spent.retries + sum(group.retries for group in self._groups),
            journal_bytes=journal_bytes,
            counted_since_ns=self.spent.until_ns if self.spent is not None else None,
        )
