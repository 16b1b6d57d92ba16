"""The client: one connection to a service, for any number of batches at a time.

    async with Client("127.0.0.1:50051") as client:
        async for result in client.run(["Why is the sky blue?", "Why is grass green?"], model="llama3.2"):
            print(result.item_id, result.content)

Errors of a call are exceptions (`unisono_client.errors`); what goes wrong with an item of a batch is its result's
`error`. `infer`, which asks for one answer, raises that, too.
`unisono_client.sync` has the same names for code without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Final, Self, Unpack

import grpc

from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono_client.config import BatchConfig, Deltas, config_of, deltas_of, invalid
from unisono_client.errors import ClosedError
from unisono_client.follow import Follower, cancel_batch, most_items, say_goodbye
from unisono_client.forks import connecting, is_forked
from unisono_client.items import Item, messages_of, to_message
from unisono_client.results import Delta, Report, Result
from unisono_client.rolling import BATCH_AGE_S, ITEMS_PER_BATCH, MAX_PENDING, RollingSession
from unisono_client.run import OnProgress, Run
from unisono_client.session import Leavable, Session
from unisono_client.transport import Transport, metadata_of

# Where `unisono serve` listens.
DEFAULT_TARGET: Final = "127.0.0.1:50051"
# How long a service that is away is tried again.
GIVE_UP_AFTER_S: Final = 120.0
# The service keeps a batch for this much longer than the client tries to come back to it.
_GRACE_MARGIN_S: Final = 30.0
# What makes no sense for batches that follow each other: one name for all, one time by which all must end, or results
# that nobody comes back for.
_OF_ONE_BATCH: Final = frozenset({"request_id", "batch_deadline", "on_disconnect", "detach_grace"})


# A second `asyncio.run` is the usual case.
_OTHER_LOOP: Final = (
    "the client belongs to the event loop of its first call, and this is another: make a client in each"
    " (`async with Client(…)` within what asyncio.run runs), or use unisono_client.sync"
)


class Client:
    """A connection to a service at HOST:PORT; to be used in one event loop, and closed with `aclose`.

    It connects with its first call. `credentials` are for a service behind TLS, `metadata` goes with every call (an
    `authorization`, for what stands before the service). A connection that is lost is tried again, with growing
    pauses, for `give_up_after_s` seconds, before a call raises UnreachableError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        """Raises RefusedError for a target or metadata that cannot be."""
        if not isinstance(target, str):
            raise invalid("target", f"is {type(target).__name__}; give the service's address, 'HOST:PORT'")
        self._target = target
        self._credentials = credentials
        self._metadata = metadata_of(metadata or {})
        self._give_up_after_s = give_up_after_s
        self._transport: Transport | None = None
        # The event loop of the connection.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        # What is under way, to be left when the client is closed: batches, and calls whose batch is to be cancelled.
        self._open_ones: set[Leavable] = set()
        self._calls: set[Follower] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connection. Batches under way are cancelled, unless their `on_disconnect` is DETACH."""
        self._is_closed = True
        if self._transport is None or self._loop is None or self._loop.is_closed() or is_forked():
            # With its event loop, a connection has ended as well.
            return
        if self._loop is not running_loop():
            raise ClosedError(_OTHER_LOOP)
        goodbyes = [
            say_goodbye(self._transport, self._transport.metadata(), call.batch_id)
            for call in self._calls
            if call.batch_id
        ]
        _ = await asyncio.gather(*(each.aclose() for each in list(self._open_ones)), *goodbyes)
        await self._transport.close()

    @property
    def stub(self) -> pb_grpc.BatchInferenceStub:
        """The generated stub, for all that the contract has and this client has no method for."""
        return self._connected().stub

    # -- Batches -------------------------------------------------------------------------------------------

    def run(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        in_order: bool = False,
        on_progress: OnProgress | None = None,
        **config: Unpack[BatchConfig],
    ) -> Run:
        """Runs a batch: `async for result in client.run(items)` gives each result as it is there.

        `in_order`: in the order of the items instead; what finished early is kept until its turn. `items` may be
        without end: of those that were not sent, 1,000 are taken beforehand. Leaving the loop early, by `break` or
        an exception, cancels the batch at once. Not where the run is kept in a variable, by which its loop might be
        gone on with: then `async with client.run(…) as run: async for result in run: …` does, or `run.cancel()`.
        Raises, from the loop, UnreachableError, BatchLostError and RefusedError, and whatever `items` raises.
        """
        session = self.open_session(config, releases_itself=True)
        return Run(session, items, in_order=in_order, on_progress=on_progress, open_ones=self._open_ones)

    def session(self, **config: Unpack[BatchConfig]) -> Session:
        """A batch to which items are added while its results are read; see `Session`."""
        return self.open_session(config, releases_itself=False)

    def rolling_session(
        self,
        *,
        max_pending: int = MAX_PENDING,
        items_per_batch: int = ITEMS_PER_BATCH,
        batch_age_s: float = BATCH_AGE_S,
        on_report: Callable[[Report], None] | None = None,
        **config: Unpack[BatchConfig],
    ) -> RollingSession:
        """A session without an end, over one batch after the other; see `RollingSession`."""
        for name, many in (("max_pending", max_pending), ("items_per_batch", items_per_batch)):
            if many < 1:
                raise invalid(name, f"is {many}; it must be at least 1")
        for name in _OF_ONE_BATCH & config.keys():
            raise invalid(f"config.{name}", "is for one batch, and a rolling session has several")
        transport = self._connected()
        return RollingSession(
            functools.partial(self.open_session, config, releases_itself=False),
            functools.partial(most_items, transport, self._give_up_after_s, transport.metadata()),
            max_pending=max_pending,
            items_per_batch=items_per_batch,
            batch_age_s=batch_age_s,
            on_report=on_report,
        )

    async def infer(self, item: Item, *, raise_errors: bool = True, **config: Unpack[BatchConfig]) -> Result:
        """One answer. What is asked by many callers at about the same time shares forward passes.

        Raises UnreachableError, BatchLostError, RefusedError; and ItemError where there is no answer, unless
        `raise_errors` is false: then the result says so, as those of a batch do. For an item with `n` answers: the
        first that is there.
        """
        first: Result | None = None
        async with contextlib.aclosing(self._infer(item, config, None)) as told:
            async for each in told:
                if first is None and isinstance(each, Result):
                    first = each
        if first is None:
            raise ClosedError("the call ended without a result")
        return first.raise_for_error() if raise_errors else first

    async def stream(
        self, item: Item, *, deltas: Deltas | None = None, **config: Unpack[BatchConfig]
    ) -> AsyncGenerator[Delta | Result, None]:
        """One answer as it is generated: deltas, and the result at the end. Raises as `infer`, but ItemError."""
        async with contextlib.aclosing(self._infer(item, config, deltas_of(deltas))) as told:
            async for each in told:
                yield each

    async def attach(self, batch_id: str, *, after_sequence: int = 0) -> AsyncGenerator[Result, None]:
        """The results of a batch that is known to the service, from an event on, until it ends.

        Raises UnreachableError, BatchLostError (no such batch, or not all of its events), RefusedError.
        """
        transport = self._connected()
        follower = Follower(
            transport,
            transport.metadata(),
            give_up_after_s=self._give_up_after_s,
            batch_id=batch_id,
            after_sequence=after_sequence,
        )
        async with contextlib.aclosing(follower.follow()) as told:
            async for each in told:
                if isinstance(each, Result):
                    yield each

    async def cancel(self, batch_id: str, *item_ids: str) -> tuple[int, int]:
        """Cancels items of a batch, or all of them: how many were cancelled, and how many had ended before.

        Raises UnreachableError, BatchLostError (no such batch), RefusedError (ITEM_NOT_FOUND).
        """
        transport = self._connected()
        return await cancel_batch(transport, self._give_up_after_s, transport.metadata(), batch_id, item_ids)

    # -- Inside --------------------------------------------------------------------------------------------

    def _connected(self) -> Transport:
        if self._is_closed:
            raise ClosedError("the client was closed")
        connecting()
        loop = running_loop()
        if self._transport is not None and loop is not self._loop:
            raise ClosedError(_OTHER_LOOP)
        if self._transport is None:
            self._loop = loop
            self._transport = Transport(self._target, credentials=self._credentials, metadata=self._metadata)
        return self._transport

    def _config(self, config: BatchConfig) -> pb.BatchConfig:
        return config_of(
            config,
            shared=messages_of(config.get("shared_context") or (), "config.shared_context"),
            request_id=f"unisono-client/{uuid.uuid4()}",
            least_grace_s=self._give_up_after_s + _GRACE_MARGIN_S,
        )

    def open_session(self, config: BatchConfig, *, releases_itself: bool) -> Session:
        """A session; with `releases_itself`, one whose items are released whenever no more can be sent."""
        made = self._config(config)
        if releases_itself:
            if "release" in config:
                raise invalid("config.release", "is for sessions; `run` releases items whenever it can send no more")
            # By hand alone: far more than any batch has, and no time.
            made.release.size = 2**32 - 1
            made.release.interval.FromSeconds(0)
        transport = self._connected()
        return Session(
            transport,
            made,
            give_up_after_s=self._give_up_after_s,
            metadata=transport.metadata(),
            is_cancelled_when_left=config.get("on_disconnect") != "DETACH",
            releases_itself=releases_itself,
            open_ones=self._open_ones,
        )

    async def _infer(
        self, item: Item, config: BatchConfig, deltas: pb.DeltaConfig | None
    ) -> AsyncGenerator[Result | Delta, None]:
        transport = self._connected()
        made = self._config(config)
        if deltas is not None:
            made.deltas.CopyFrom(deltas)
        request = pb.InferRequest(item=to_message(item, 0), config=made)
        metadata = transport.metadata()
        follower = Follower(transport, metadata, give_up_after_s=self._give_up_after_s, deltas=deltas)

        answers, told_results = max(1, request.item.n), 0
        is_cancelled_when_left = config.get("on_disconnect") != "DETACH"
        if is_cancelled_when_left:
            self._calls.add(follower)
        try:
            begin = functools.partial(transport.stub.Infer, request, metadata=metadata)
            async with contextlib.aclosing(follower.follow(begin, answers=answers)) as told:
                async for each in told:
                    told_results += isinstance(each, Result)
                    yield each
        finally:
            if told_results < answers and follower.batch_id and is_cancelled_when_left:
                await say_goodbye(transport, metadata, follower.batch_id)
            self._calls.discard(follower)


def running_loop() -> asyncio.AbstractEventLoop:
    """The event loop that runs here; raises ClosedError where there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ClosedError("no event loop runs here: call it in a coroutine, or use unisono_client.sync") from None
