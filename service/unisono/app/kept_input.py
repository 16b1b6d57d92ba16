"""Items that streams add to kept batches: into the store first, then into their batch, and only then acknowledged.

Theory of operation. Items get their places at once, so that nobody else gets them, and are written by a task that
goes on when the stream is lost. Whoever sends one of them again meanwhile waits for the same task. What could not be
written is given back to nobody: the batch is left then, and its next run knows only what is in the store, so that the
items can be sent once more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from unisono.app.follow import AGAIN_S
from unisono.app.intake import as_kept
from unisono.core.errors import BatchNotFoundError, LimitExceededError, ShuttingDownError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.app.intake import Checked
    from unisono.app.kept_runs import KeptRuns
    from unisono.app.run_batch import RunningBatch
    from unisono.app.stores import BatchStore
    from unisono.core.batch import Ack, BadItem
    from unisono.core.model import Item


class KeptInput:
    """Brings items of streams into one store."""

    def __init__(self, store: BatchStore, runs: KeptRuns) -> None:
        self._store = store
        self._runs = runs
        # Of items that have a place and are being written, by batch and id: whether they were, once that is known.
        self._writing: dict[tuple[str, str], asyncio.Future[bool]] = {}

    async def add(self, batch: RunningBatch, items: Sequence[Item | BadItem], *, is_reopened: bool) -> list[Ack]:
        """Takes items, or refuses them; see RunningBatch.add. Answers when all that were taken are kept.

        Where there is no room for them, that lasts until there is. Who asks may go away: it is done all the same.
        Raises ShuttingDownError where the batch is left before.
        """
        acks, taken = batch.admit(items, is_reopened=is_reopened)
        if taken:
            written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            for _, one in taken:
                self._writing[batch.batch_id, one.item.item_id] = written
            _ = self._runs.keep(self._put(batch, taken, written))
        # Also those that another stream has sent before.
        named = {(batch.batch_id, ack.item_id) for ack in acks if ack.refusal is None}
        awaited = {self._writing[name] for name in named if name in self._writing}
        if awaited:
            _ = await asyncio.wait(awaited)
        if not all(one.result() for one in awaited):
            raise ShuttingDownError(
                f"items of batch {batch.batch_id} could not be kept before it was left: open it again, and send what "
                "was not acknowledged",
                metadata={"batch_id": batch.batch_id},
                retry_after_s=AGAIN_S,
            )
        return acks

    async def _put(
        self, batch: RunningBatch, taken: Sequence[tuple[int, Checked]], written: asyncio.Future[bool]
    ) -> None:
        is_kept = False
        try:
            is_kept = await self._write(batch, taken)
        except (ShuttingDownError, BatchNotFoundError):
            # It is another process's, or was deleted.
            batch.leave()
        except Exception:
            # Whatever it is goes on to the caller; the batch, which would never end, is begun again from the store.
            self._runs.start_over(batch)
            raise
        finally:
            for _, one in taken:
                del self._writing[batch.batch_id, one.item.item_id]
            written.set_result(is_kept)
            if is_kept:
                batch.put(taken)
            else:
                batch.withdraw(taken)

    async def _write(self, batch: RunningBatch, taken: Sequence[tuple[int, Checked]]) -> bool:
        """Whether it could be done before the batch was left."""
        items = [as_kept(one) for _, one in taken]
        while not batch.is_left:
            try:
                await self._store.add(batch.batch_id, items, first=taken[0][0])
            except LimitExceededError as error:
                await asyncio.sleep(error.retry_after_s or 1.0)
            else:
                return True
        return False
