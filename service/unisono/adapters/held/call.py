"""What every held call to an inference server is: an exchange, and who it is with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from unisono.core.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from unisono.adapters.held.exchange import HeldExchange

# A refusal's body is read up to here, or to the end of the chunk in which that is.
LONGEST_REFUSAL: Final = 1 << 20


class ExchangeCall:
    """The part of the port `HeldCall` that is the same for all servers; each adds how its answer is read."""

    def __init__(self, exchange: HeldExchange, *, backend: str, model: str) -> None:
        self.exchange = exchange
        self._backend, self._model = backend, model

    @property
    def is_closed(self) -> bool:
        """See the port."""
        return self.exchange.is_closed

    async def wait_closed(self) -> None:
        """See the port."""
        await self.exchange.wait_closed()

    def abort(self) -> None:
        """See the port."""
        self.exchange.abort()

    async def _refusal(self, chunks: AsyncIterator[bytes]) -> bytes:
        """The body of an answer that is a refusal, also where it is cut."""
        body = bytearray()
        with contextlib.suppress(ConnectionLostError):
            async for chunk in chunks:
                body += chunk
                if len(body) > LONGEST_REFUSAL:
                    break
        return bytes(body)
