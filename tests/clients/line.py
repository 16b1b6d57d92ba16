"""A client that reaches a service through a proxy, which cuts the connection when it is told to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.clients.proxy import Proxy
from tests.integration.service import LIMIT_S, House, house
from unisono.app.run_batch import RunningBatch
from unisono_client import Chat, Client

# Items of one batch, where it does not matter how many.
COUNT = 60


@dataclass(frozen=True, kw_only=True)
class Line:
    """A client that reaches a service through a proxy."""

    house: House
    proxy: Proxy
    client: Client

    @property
    def batch(self) -> RunningBatch | None:
        """The one batch, once there is one."""
        return next(iter(self.house.batches._batches.values()), None)

    def cut_once(self, condition: Callable[[RunningBatch], bool]) -> None:
        """Cuts when the batch is so; what would have told the client is lost with the connection."""
        before = self.proxy.down

        def holds(proxy: Proxy) -> bool:
            return proxy.down > before and self.batch is not None and condition(self.batch)

        self.proxy.cut_when(holds)


@asynccontextmanager
async def line(give_up_after_s: float = LIMIT_S, **settings: object) -> AsyncGenerator[Line, None]:
    """A service with four slots behind a proxy."""
    async with (
        house(settings={"slots": 4, **settings}) as h,
        Proxy(h.target) as proxy,
        Client(proxy.target, give_up_after_s=give_up_after_s) as client,
    ):
        yield Line(house=h, proxy=proxy, client=client)


def asked(count: int = COUNT) -> list[Chat]:
    """Items whose answers tell them apart."""
    return [Chat(f"[[say=answer {n}]]", item_id=f"i{n}") for n in range(count)]
