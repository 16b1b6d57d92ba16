"""Who is there for a batch: the calls on which it lives, those who follow it, and what becomes of it without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.errors import CancelledItemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from unisono.app.batch_journal import BatchJournal, Reader
    from unisono.app.timers import Timers
    from unisono.core.batch import BatchConfig
    from unisono.core.errors import UnisonoError


class Callers:
    """The callers of one batch, and its followers."""

    def __init__(
        self,
        config: BatchConfig,
        journal: BatchJournal,
        timers: Timers,
        *,
        is_over: Callable[[], bool],
        cancel: Callable[[UnisonoError], object],
        on_abandoned: Callable[[], None] | None,
    ) -> None:
        """`on_abandoned`: done where no call adds items any more, by a batch that needs nobody. None: it needs somebody."""
        self._config = config
        self._journal = journal
        self._timers = timers
        self._is_over = is_over
        self._cancel = cancel
        self._on_abandoned = on_abandoned
        self._count = 0
        # How the stream that adds items is told that another took its place.
        self._on_replaced: Callable[[], None] | None = None

    def attach(self, reader: Reader) -> None:
        """Somebody follows from now on."""
        self._journal.attach(reader)
        self._timers.stop("lost")

    def detach(self, reader: Reader) -> None:
        """That reader has gone."""
        self._journal.detach(reader)
        self.notice_loss()

    def join(self, on_replaced: Callable[[], None] | None = None) -> None:
        """Somebody holds a call on which the batch lives: the one that opened it, or one that sent it again.

        With `on_replaced`, the caller is a stream that adds items. There is one at a time: the former is told.
        """
        self._count += 1
        self._timers.stop("abandoned")
        if on_replaced is not None:
            former, self._on_replaced = self._on_replaced, on_replaced
            if former is not None:
                former()

    def lose(self) -> None:
        """A caller is gone. Was it the last, the batch is cancelled, or goes on without a reader for a while."""
        self._count -= 1
        self.notice_loss()

    def let_go(self) -> None:
        """The batch is forgotten: see RunningBatch."""
        self._on_replaced = None
        self._is_over, self._cancel, self._on_abandoned = lambda: True, lambda _error: None, None

    def notice_loss(self) -> None:
        """Sees whether anybody is left, and what follows from that."""
        if self._count > 0 or self._is_over():
            return
        if self._on_abandoned is not None:
            self._timers.start("abandoned", self._config.detach_grace_s or 0.0, self._on_abandoned)
        elif not self._config.detaches:
            _ = self._cancel(CancelledItemError("the caller went away (on_disconnect: CANCEL)"))
        elif not self._journal.has_readers:
            grace_s = self._config.detach_grace_s or 0.0
            error = CancelledItemError(f"nobody has followed the batch for {grace_s:g} s (detach_grace)")
            self._timers.start("lost", grace_s, lambda: self._cancel(error))
