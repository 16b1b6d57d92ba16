"""Many callers that each want one answer, as one batch: each adds its item, and waits for its own result."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from unisono_client.client import Client
from unisono_client.config import BatchConfig
from unisono_client.errors import ClosedError
from unisono_client.items import Item
from unisono_client.results import Result

# Where fewer ask than were expected (some found an answer elsewhere), the others wait for so long, in seconds.
_WAIT_S = 0.25


class Gathered:
    """One batch of so many expected items; to be used in the client's event loop."""

    def __init__(self, client: Client, config: BatchConfig, expected: int) -> None:
        whole = config.copy()
        whole["release"] = {"size": expected, "interval": _WAIT_S}
        self._session = client.session(**whole)
        # By the item's place.
        self._waiting: dict[int, asyncio.Future[Result]] = {}
        self._reader: asyncio.Task[None] | None = None
        # Why no more results will come; None while they may.
        self._end: Exception | None = None

    async def __aenter__(self) -> Self:
        _ = await self._session.__aenter__()
        self._reader = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self._session.close_input()
        else:
            await self._session.aclose()
        if self._reader is not None:
            _ = await asyncio.wait({self._reader})
        await self._session.aclose()

    async def ask(self, item: Item) -> Result:
        """The item's result; raises what ends the batch."""
        if self._end is not None:
            raise self._end
        place = self._session.added
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[place] = answer
        try:
            await self._session.add(item)
            return await answer
        finally:
            del self._waiting[place]

    async def _read(self) -> None:
        end: Exception = ClosedError("the batch ended without this item's result")
        try:
            async for result in self._session:
                answer = self._waiting.get(result.place)
                if answer is not None and not answer.done():
                    answer.set_result(result)
        except Exception as error:  # noqa: BLE001  # each who waits is told; none waits for ever
            end = error
        self._end = end
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(end)
