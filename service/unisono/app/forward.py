"""Requests that are sent to a backend as they came, and whose answers go back as they come.

Theory of operation. A request that this house understands is the one item of a batch of its own, and goes the way
of `Infer`: planned, held, released in a wave with others, into a slot that is free. What is sent is not made of it:
it is the caller's request. Its answer goes through a *tap* to the caller, byte for byte, and nothing of it is kept.

1. Until an answer begins, it is an item like any other: a backend that is away is waited for, a lost connection costs
   an attempt, another backend may take it over. Once part of an answer was passed on, nothing is tried again.
2. What the house would refuse (a model that is not there, or cannot do what is asked) is the backend's to refuse:
   the request is sent *plainly*, beside the window, and its caller gets the backend's own words. So is everything
   that was not understood in the first place.
3. A caller that leaves closes the connection to the backend in the same moment. One that reads slowly fills its tap,
   and then slows its own answer, and no other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from unisono.app.intake import Checked
from unisono.core.batch import BACKENDS_OWN, BatchConfig, ContextPolicy
from unisono.core.errors import (
    BackendUnavailableError,
    ConnectionLostError,
    ItemStoppedError,
    LimitExceededError,
    RequestError,
    UnisonoError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Collection, Mapping, Sequence

    from unisono.app.batches import Batches
    from unisono.app.ports import PlainAnswer
    from unisono.app.run_batch import RunningBatch
    from unisono.core.model import Forwarded, Item

# What may wait in a tap for a caller that reads slowly: some 1,500 tokens of a stream.
AHEAD_BYTES: Final = 256 * 1024
# Failures that are this house's to tell: no backend can be reached, or somebody wanted it to end.
_OURS: Final = (BackendUnavailableError, ConnectionLostError, ItemStoppedError, RequestError)

# Ollama's words for it.
BUSY: Final = "server busy, please try again.  maximum pending requests exceeded"
_CONFIG: Final = BatchConfig(
    is_single=True, context_policy=ContextPolicy.AS_SENT, keep_alive_s=BACKENDS_OWN, item_timeout_s=0.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardLimits:
    """What may be under way at one time."""

    # Requests that have come, and were not answered to the end. Ollama's own queue holds as many.
    most: int = 512
    # Bytes of one request's body, and of all bodies together.
    most_body_bytes: int = 64 * 1024 * 1024
    most_bytes: int = 256 * 1024 * 1024


class Tap:
    """Takes an answer in at one end, and gives it out at the other. It is a `ports.Relay`."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._has_begun = False
        self._is_whole = False
        self._is_over = False
        self._error: UnisonoError | None = None
        self._news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    # -- Where it comes from -----------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """See Relay."""
        return self._has_begun

    def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """See Relay."""
        self.status, self.headers, self._has_begun = status, headers, True
        self._news.set()

    async def pass_on(self, chunk: bytes) -> None:
        """See Relay."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        self._news.set()
        if self._size > AHEAD_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    def end(self) -> None:
        """See Relay."""
        self._is_whole = True
        self._news.set()

    def over(self, error: UnisonoError | None) -> None:
        """See Relay."""
        self._is_over, self._error = True, error
        self._has_room.set()
        self._news.set()

    # -- Where it goes -----------------------------------------------------------------------------------------

    async def begun(self) -> UnisonoError | None:
        """Waits for the beginning of an answer; why there will be none."""
        while not (self._has_begun or self._is_over):
            await self._wait()
        return None if self._has_begun else (self._error or ConnectionLostError("there was no answer"))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer's body. Raises ConnectionLostError where it is cut."""
        while True:
            while self._chunks:
                # Pieces that have gathered go together.
                piece = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
                self._chunks.clear()
                self._size = 0
                self._has_room.set()
                yield piece
            if self._is_whole:
                return
            if self._is_over:
                raise ConnectionLostError("the answer was cut") from self._error
            await self._wait()

    async def close(self) -> None:
        """Nobody reads any further; what is still to come is thrown away."""
        self._chunks.clear()
        self._size = 0
        self._has_room.set()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


class Passage:
    """One request under way, from its coming to the end of its answer. Whoever has entered it must close it."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._bytes = 0
        self._batch: RunningBatch | None = None
        self._plain: PlainAnswer | None = None
        self._is_closed = False

    def take(self, count: int) -> None:
        """So many bytes more of its body are in memory. Raises LimitExceededError."""
        self._forwarder.take(count)
        self._bytes += count

    async def infer(
        self, item: Item, *, among: Collection[str], method: str, carrier: Mapping[str, str]
    ) -> Tap | PlainAnswer:
        """The answer to a request that was understood, once it begins; plainly where the house would refuse it.

        `among`: the backends that speak its API. `method` and `carrier`: see Batches.open. Raises what keeps every
        backend from answering.
        """
        tap = Tap()
        batch, _ = self._forwarder.batches.open(
            _CONFIG, method=method, carrier=carrier, item_count=1, relay=tap, among=among
        )
        self._batch = batch
        batch.callers.join()
        batch.run_whole([Checked(item, (), 0)])
        error = await tap.begun()
        if error is None:
            return tap
        if isinstance(error, _OURS) or item.forwarded is None:
            raise error
        return await self.plainly(item.forwarded, model=item.model, among=among)

    async def plainly(
        self,
        request: Forwarded,
        *,
        model: str = "",
        among: Collection[str],
        body: AsyncIterable[bytes] | None = None,
    ) -> PlainAnswer:
        """The answer to a request that is sent at once, by the backend that has the model, or the first that answers.

        `body`: see Backend.pass_on; then only one backend is asked.
        """
        names = list(among)
        backends = self._forwarder.batches.backends
        if len(names) > 1 and model and (found := await self._forwarder.batches.backend_of(model, names)) is not None:
            names = [found, *(name for name in names if name != found)]
        error: UnisonoError | None = None
        for name in names if body is None else names[:1]:
            try:
                self._plain = await backends[name].pass_on(request, body)
            except BackendUnavailableError as away:
                error = error or away
            else:
                return self._plain
        raise error or BackendUnavailableError("no backend is configured that speaks this API")

    async def close(self) -> None:
        """It is over, whatever of it is under way; any number of times."""
        if self._is_closed:
            return
        self._is_closed = True
        self._forwarder.left(self._bytes)
        if self._batch is not None:
            # What runs for nobody is cancelled: the connection is closed, and the slot is free.
            self._batch.callers.lose()
        if self._plain is not None:
            await self._plain.close()


class Forwarder:
    """Requests that are forwarded, as many as may be under way."""

    def __init__(self, batches: Batches, limits: ForwardLimits | None = None) -> None:
        self.batches = batches
        self.limits = limits or ForwardLimits()
        self._count = 0
        self._bytes = 0

    @property
    def count(self) -> int:
        """Requests that are under way."""
        return self._count

    def enter(self) -> Passage:
        """A request has come. Raises LimitExceededError where there are too many."""
        if self._count >= self.limits.most:
            raise LimitExceededError(BUSY, metadata={"limit": "max_forwarded"}, retry_after_s=1.0)
        self._count += 1
        return Passage(self)

    def take(self, count: int) -> None:
        """See Passage."""
        if self._bytes + count > self.limits.most_bytes:
            raise LimitExceededError(BUSY, metadata={"limit": "forwarded_bytes"}, retry_after_s=1.0)
        self._bytes += count

    def left(self, count: int) -> None:
        """A request is over, whose body had so many bytes."""
        self._count -= 1
        self._bytes -= count

    def among(self, *, speaks_ollama: bool) -> tuple[str, ...]:
        """The backends that speak an API: all of them OpenAI's, only an Ollama its own."""
        backends = self.batches.backends
        return tuple(name for name, one in backends.items() if one.kind == "ollama" or not speaks_ollama)
