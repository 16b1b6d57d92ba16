"""What happens to batches → counts.

Theory of operation. Nearly all that is told of an item is in its result, so it is counted once, when the item ends;
that costs about as much as one log line less its writing. Three things need a memory:

1. A batch remembers which group is which model on which backend, and of its items on their way the group.
2. A release or a load that concerned several batches is told to each of them, one after the other: it is known by its
   key, or by the moment at which it began, and counted with the first.
3. Passes are known when the batch has ended, from its report.

An item for which no model was found belongs to the backend that its error names, or to the only one that there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.adapters.metrics.series import FAILED, LOADED
from unisono.core.errors import LoadFailedError
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from unisono.adapters.metrics.series import Ends, Place, Series
    from unisono.app.ports import LoadOutcome, ReleaseTimes
    from unisono.core.commands import ReleaseReason
    from unisono.core.errors import UnisonoError
    from unisono.core.events import Result, Summary
    from unisono.core.model import Item
    from unisono.core.report import GroupPlanned

_NO_HEADERS: Mapping[str, str] = {}
# Items that are told within this time that their model could not be loaded were told of one load.
_SAME_LOAD_NS = 1_000_000_000


class MetricsListener:
    """A Listener that counts what happens in all batches."""

    def __init__(self, series: Series, backends: Collection[str] = ()) -> None:
        """`backends`: the names of all."""
        self._series = series
        self._backends = backends
        self._told = _Told()
        for backend in backends:
            _ = series.nowhere(backend)

    def batch_accepted(self, *, batch_id: str, method: str, carrier: Mapping[str, str], at_ns: int) -> BatchMetrics:
        """Counts a batch that runs."""
        del batch_id, method, carrier, at_ns
        self._series.batches_running.inc()
        return BatchMetrics(self._series, self._told, self._backends)


class _Told:
    """What several batches are told of, and is to be counted once."""

    def __init__(self) -> None:
        self._wave_key: int | None = None
        self._loads: dict[tuple[str, str], int] = {}
        # The failure of a load that was told of last, and when.
        self._failures: dict[tuple[str, str], tuple[UnisonoError | None, int]] = {}

    def is_new_wave(self, wave_key: int) -> bool:
        """Whether this release was not told of just before."""
        former, self._wave_key = self._wave_key, wave_key
        return former != wave_key

    def is_new_load(self, labels: tuple[str, str], started_ns: int) -> bool:
        """Whether this load was not told of before."""
        former, self._loads[labels] = self._loads.get(labels), started_ns
        return former != started_ns

    def load_failed(self, labels: tuple[str, str], error: UnisonoError | None, at_ns: int) -> bool:
        """Whether this failure was not told of before: by the load itself, or by another item that waited for it."""
        former, former_ns = self._failures.get(labels, (None, 0))
        if error is former or at_ns < former_ns + _SAME_LOAD_NS:
            return False
        self._failures[labels] = error, at_ns
        return True

    def knows_failure(self, labels: tuple[str, str], error: UnisonoError | None, at_ns: int) -> None:
        """A load failed, and was counted."""
        self._failures[labels] = error, at_ns


class BatchMetrics:
    """A BatchWatch that counts; see the head of this file."""

    def __init__(self, series: Series, told: _Told, backends: Collection[str]) -> None:
        self._series = series
        self._backends = backends
        self._told = told
        self._groups: dict[int, Place] = {}
        self._group_of: dict[int, int] = {}
        self._has_ended = False

    def planned(self, *, started_ns: int, ended_ns: int, groups: Sequence[GroupPlanned], families: int) -> None:
        """Remembers which group is where."""
        del started_ns, ended_ns, families
        for planned in groups:
            if planned.group not in self._groups:
                self._groups[planned.group] = self._series.place(planned.runner.backend, planned.runner.model)

    def group_loaded(
        self, *, group: int, started_ns: int, ended_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None
    ) -> None:
        """Counts a load; that a runner was there already is none."""
        place = self._groups.get(group)
        is_needless = outcome is not None and outcome.was_loaded
        if place is None or is_needless or not self._told.is_new_load(place.labels, started_ns):
            return
        place.loads[FAILED if outcome is None else LOADED].inc()
        if outcome is None:
            self._told.knows_failure(place.labels, error, ended_ns)
        else:
            place.load_duration.observe(outcome.duration_s)

    def wave_released(
        self, *, group: int, wave: int, wave_key: int, item_count: int, others: int, times: ReleaseTimes
    ) -> None:
        """Counts how far apart the requests of a release were."""
        del wave
        place = self._groups.get(group)
        if place is not None and item_count + others > 1 and self._told.is_new_wave(wave_key):
            place.spread.observe(times.spread_s)

    def item_staging(self, *, item: Item, group: int, attempt: int, at_ns: int) -> Mapping[str, str]:
        """Remembers where an item is."""
        del attempt, at_ns
        self._group_of[item.index] = group
        return _NO_HEADERS

    def item_staged(self, *, index: int, at_ns: int) -> None:
        """Nothing to count."""

    def item_released(
        self, *, index: int, wave: int, wave_key: int, at_ns: int, reason: ReleaseReason, lane: int | None
    ) -> None:
        """Nothing to count: an item's times come with its result."""

    def item_first_token(self, *, index: int, at_ns: int) -> None:
        """Nothing to count."""

    def item_retried(
        self, *, index: int, attempt: int, error: UnisonoError, again_in_s: float, is_free: bool, at_ns: int
    ) -> None:
        """Counts an attempt that failed, or that another item's ended."""
        del attempt, again_in_s
        place = self._groups.get(self._group_of.get(index, -1))
        if place is None:
            return
        self._see_load(place, error, at_ns)
        counter = self._series.broken_off if is_free else self._series.retries
        counter.labels(*place.labels, error.reason).inc()

    def item_ended(self, *, result: Result, at_ns: int) -> None:
        """Counts an item, with its times and its tokens."""
        self._group_of.pop(result.index, None)
        place = None if result.group is None else self._groups.get(result.group)
        ends = self._nowhere(result.error) if place is None else place
        ends.count(result.state, None if result.error is None else result.error.reason)
        if place is None:
            # It never ran.
            return
        self._see_load(place, result.error, at_ns)
        usage = result.usage
        if usage is not None:
            place.prompt_tokens.inc(usage.prompt_tokens)
            place.completion_tokens.inc(usage.completion_tokens)
            if usage.cached_prompt_tokens is not None:
                place.cached_prompt_tokens.inc(usage.cached_prompt_tokens)
        timings = result.timings
        if timings is None:
            return
        if timings.queued_s is not None:
            place.queued.observe(timings.queued_s)
        if timings.first_token_s is not None:
            place.first_token.observe(timings.first_token_s)
        if timings.total_s is not None and result.state is ItemState.COMPLETED:
            place.duration.observe(timings.total_s)

    def ended(self, *, summary: Summary, at_ns: int) -> None:
        """Counts the batch, and its passes."""
        del at_ns
        if self._has_ended:
            return
        self._has_ended = True
        self._series.batches_running.dec()
        self._series.batches.labels(summary.state.value).inc()
        for group in summary.report.groups:
            # A single item shares its passes with nobody of its batch, and how many others were there it cannot tell.
            shared = group.items_per_pass if group.group.item_count > 1 else None
            place = self._groups.get(group.group.group)
            if shared is not None and place is not None:
                place.passes.inc(group.passes.count)
                place.pass_items.inc(group.participations)
                place.items_per_pass.observe(shared)

    def _see_load(self, place: Place, error: UnisonoError | None, at_ns: int) -> None:
        """Counts a load that the backend began for an item by itself, and that failed."""
        if isinstance(error, LoadFailedError) and self._told.load_failed(place.labels, error, at_ns):
            place.loads[FAILED].inc()

    def _nowhere(self, error: UnisonoError | None) -> Ends:
        """Where an item is counted that never had a group."""
        backend = error.metadata.get("backend", "") if error is not None else ""
        if backend not in self._backends:
            backend = next(iter(self._backends)) if len(self._backends) == 1 else ""
        return self._series.nowhere(backend)
