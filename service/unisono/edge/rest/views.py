"""Kept batches by their id, whoever made them: of a file by this API, or by gRPC."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from unisono.core.errors import BatchNotFoundError, NothingKeptError
from unisono.edge.rest import objects
from unisono.edge.rest.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.app.durable import DurableBatches
    from unisono.app.file_batches import FileBatches
    from unisono.core.durable import StoredBatch
    from unisono.core.files import FileBatch


class BatchViews:
    """Batches as this API sees them."""

    def __init__(self, files: FileBatches | None, durable: DurableBatches | None) -> None:
        """None where the service keeps no batches."""
        self._given = files
        self._durable = durable

    @property
    def files(self) -> FileBatches:
        """Those made of files; raises NothingKeptError."""
        if self._given is None:
            raise _nothing_kept()
        return self._given

    @property
    def durable(self) -> DurableBatches:
        """All that are kept; raises NothingKeptError."""
        if self._durable is None:
            raise _nothing_kept()
        return self._durable

    async def get(self, batch_id: str) -> tuple[FileBatch, StoredBatch | None]:
        """A batch, and the kept batch that it is; None: its file is being checked, or was no batch.

        Raises RefusedError where there is none of that id.
        """
        stored: StoredBatch | None = None
        batch = await self.files.files.find_batch(batch_id)
        with suppress(BatchNotFoundError):
            stored = await self.durable.get(batch_id)
        if batch is None and stored is not None:
            batch = objects.kept_as_file_batch(stored)
        if batch is None:
            raise RefusedError(404, f"No batch found with id '{batch_id[:80]}'.")
        return batch, stored

    def object_of(self, batch: FileBatch, stored: StoredBatch | None) -> dict[str, object]:
        """A batch as it stands, as OpenAI's object."""
        model = "" if stored is None else stored.config.model
        value = objects.batch_object(batch, None if batch.is_over else stored, model=model)
        if not batch.input_file_id:
            value |= dict.fromkeys(("endpoint", "input_file_id", "completion_window"))
            value["expires_at"] = value["expires_at"] or None
        return value

    async def cancel(self, batch: FileBatch) -> None:
        """Ends an open batch."""
        if batch.input_file_id:
            await self.files.cancel(batch)
        else:
            _ = await self.durable.cancel(batch.batch_id)

    async def retry(self, batch: FileBatch, *, request_id: str, method: str, carrier: Mapping[str, str]) -> str:
        """A batch of the items of another that have no answer; its id. See `DurableBatches.retry`."""
        if batch.input_file_id:
            return await self.files.retry(batch, request_id=request_id, method=method, carrier=carrier)
        stored, _ = await self.durable.retry(batch.batch_id, request_id=request_id, method=method, carrier=carrier)
        return stored.batch_id


def _nothing_kept() -> NothingKeptError:
    return NothingKeptError("this service keeps no batches: start it with UNISONO_DATA_DIR not `none`")
