"""Several who watch, as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unisono.app.ports import BatchWatch, Listener, LoadOutcome, ReleaseTimes
    from unisono.core.commands import ReleaseReason
    from unisono.core.errors import UnisonoError
    from unisono.core.events import Result, Summary
    from unisono.core.model import Item
    from unisono.core.report import GroupPlanned


class BothListeners:
    """A Listener that tells two others, the first one first."""

    def __init__(self, first: Listener, second: Listener) -> None:
        self._first, self._second = first, second

    def batch_accepted(self, *, batch_id: str, method: str, carrier: Mapping[str, str], at_ns: int) -> BatchWatch:
        """See the port."""
        return _BothWatches(
            self._first.batch_accepted(batch_id=batch_id, method=method, carrier=carrier, at_ns=at_ns),
            self._second.batch_accepted(batch_id=batch_id, method=method, carrier=carrier, at_ns=at_ns),
        )


class _BothWatches:
    """A BatchWatch that tells two others. Written out, because it is called a dozen times for each item."""

    def __init__(self, first: BatchWatch, second: BatchWatch) -> None:
        self._first, self._second = first, second

    def planned(self, *, started_ns: int, ended_ns: int, groups: Sequence[GroupPlanned], families: int) -> None:
        """See the port."""
        self._first.planned(started_ns=started_ns, ended_ns=ended_ns, groups=groups, families=families)
        self._second.planned(started_ns=started_ns, ended_ns=ended_ns, groups=groups, families=families)

    def group_loaded(
        self, *, group: int, started_ns: int, ended_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None
    ) -> None:
        """See the port."""
        for each in (self._first, self._second):
            each.group_loaded(group=group, started_ns=started_ns, ended_ns=ended_ns, outcome=outcome, error=error)

    def wave_released(
        self, *, group: int, wave: int, wave_key: int, item_count: int, others: int, times: ReleaseTimes
    ) -> None:
        """See the port."""
        for each in (self._first, self._second):
            each.wave_released(
                group=group, wave=wave, wave_key=wave_key, item_count=item_count, others=others, times=times
            )

    def item_staging(self, *, item: Item, group: int, attempt: int, at_ns: int) -> Mapping[str, str]:
        """See the port; the headers of both, the first one's where both have one."""
        first = self._first.item_staging(item=item, group=group, attempt=attempt, at_ns=at_ns)
        second = self._second.item_staging(item=item, group=group, attempt=attempt, at_ns=at_ns)
        return {**second, **first} if second else first

    def item_staged(self, *, index: int, at_ns: int) -> None:
        """See the port."""
        self._first.item_staged(index=index, at_ns=at_ns)
        self._second.item_staged(index=index, at_ns=at_ns)

    def item_released(
        self, *, index: int, wave: int, wave_key: int, at_ns: int, reason: ReleaseReason, lane: int | None
    ) -> None:
        """See the port."""
        for each in (self._first, self._second):
            each.item_released(index=index, wave=wave, wave_key=wave_key, at_ns=at_ns, reason=reason, lane=lane)

    def item_first_token(self, *, index: int, at_ns: int) -> None:
        """See the port."""
        self._first.item_first_token(index=index, at_ns=at_ns)
        self._second.item_first_token(index=index, at_ns=at_ns)

    def item_retried(
        self, *, index: int, attempt: int, error: UnisonoError, again_in_s: float, is_free: bool, at_ns: int
    ) -> None:
        """See the port."""
        for each in (self._first, self._second):
            each.item_retried(
                index=index, attempt=attempt, error=error, again_in_s=again_in_s, is_free=is_free, at_ns=at_ns
            )

    def item_ended(self, *, result: Result, at_ns: int) -> None:
        """See the port."""
        self._first.item_ended(result=result, at_ns=at_ns)
        self._second.item_ended(result=result, at_ns=at_ns)

    def ended(self, *, summary: Summary, at_ns: int) -> None:
        """See the port."""
        self._first.ended(summary=summary, at_ns=at_ns)
        self._second.ended(summary=summary, at_ns=at_ns)
