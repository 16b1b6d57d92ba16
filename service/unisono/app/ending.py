"""How items end that are not answered to their end: cancelled by name, or with the batch that is cut short.

Wherever they are: at a driver, on their way to one, or in the store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.errors import BatchDeadlineError, CancelledItemError, ItemNotFoundError
from unisono.core.events import BatchState, Result
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from unisono.app.backlog import Backlog
    from unisono.app.dispatch import Dispatch
    from unisono.app.item_run import ItemRun
    from unisono.app.ports import Clock
    from unisono.app.register import Register
    from unisono.core.errors import UnisonoError


class Ending:
    """Ends items of one batch, or all of them."""

    def __init__(
        self,
        batch_id: str,
        *,
        register: Register,
        runs: Mapping[int, ItemRun],
        backlog: Backlog,
        dispatch: Dispatch,
        clock: Clock,
        on_result: Callable[[Result], None],
    ) -> None:
        """`runs`: items in memory that have not ended, by index. `on_result` is told of those in the backlog."""
        self._batch_id = batch_id
        self._register = register
        self._runs = runs
        self._backlog = backlog
        self._dispatch = dispatch
        self._clock = clock
        self._on_result = on_result
        # Why the batch ends before all its items have ended by themselves; None while it does not.
        self.cut_short: UnisonoError | None = None

    @property
    def state(self) -> BatchState:
        """How the batch has ended, now that all its items have."""
        match self.cut_short:
            case None:
                return BatchState.COMPLETED
            case BatchDeadlineError():
                return BatchState.EXPIRED
            case _:
                return BatchState.CANCELLED

    def cancel(
        self, item_ids: Sequence[str], *, error: UnisonoError | None, ignores_unknown: bool
    ) -> tuple[int, int]:
        """Cancels items, or all of them for none; see RunningBatch.cancel."""
        found = {item_id: self._register.indexes(item_id) for item_id in item_ids}
        unknown = [item_id for item_id, indexes in found.items() if not indexes]
        if unknown and not ignores_unknown:
            raise ItemNotFoundError(f"batch {self._batch_id} has no item {unknown[0]!r}")
        if item_ids:
            indexes = list(dict.fromkeys(index for named in found.values() for index in named))
        else:
            indexes = list(dict.fromkeys((*self._register.all(), *self.open_indexes())))
            self.cut_short = self.cut_short or error or CancelledItemError("the batch was cancelled")
        ended = sum(index in self._runs or index in self._backlog for index in indexes)
        self.end(indexes, ItemState.CANCELLED, error or CancelledItemError("was cancelled"))
        return ended, len(indexes) - ended

    def cut(self, indexes: Sequence[int] | None = None) -> None:
        """Where something has ended the batch, it ends these items, or all."""
        if self.cut_short is not None:
            state = ItemState.EXPIRED if isinstance(self.cut_short, BatchDeadlineError) else ItemState.CANCELLED
            self.end(self.open_indexes() if indexes is None else indexes, state, self.cut_short)

    def end(self, indexes: Sequence[int], state: ItemState, error: UnisonoError) -> None:
        """Ends those of these that have not ended."""
        self._dispatch.end(indexes, state, error)
        now_ns = self._clock.time_ns()
        for index in indexes:
            # One by one: with the last of them, the batch ends.
            if (found := self._backlog.take(index)) is None:
                continue
            one, accepted_ns = found
            self._on_result(
                Result(
                    item_id=one.item_id,
                    index=one.index,
                    state=state,
                    error=error,
                    variant_of=one.variant_of,
                    waited_s=max(0, now_ns - accepted_ns) / 1e9,
                )
            )

    def open_indexes(self) -> list[int]:
        """All items that have not ended."""
        return [*self._runs, *(index for index, _ in self._backlog.waiting())]

    def queued(self) -> list[tuple[int, int]]:
        """Items that no driver has: not released, not fetched, or their model not found; and since when they wait."""
        here = [(run.item.index, run.accepted_ns) for run in self._runs.values() if run.ticket is None]
        return here + self._backlog.waiting()

    def let_go(self) -> None:
        """The batch is forgotten: see RunningBatch."""
        self._on_result = lambda _: None
