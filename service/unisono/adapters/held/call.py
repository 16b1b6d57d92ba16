"""What every held call to an inference server is: an exchange, and who it is with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.adapters.held.exchange import HeldExchange


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
