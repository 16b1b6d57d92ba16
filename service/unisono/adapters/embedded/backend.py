"""The backend port, for the embedded engine: a llama.cpp server that this service starts, and starts again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from unisono.adapters.embedded.process import EngineProcess, find_model
from unisono.adapters.held import release
from unisono.adapters.llama_server import LlamaServerBackend
from unisono.app.ports import HeldCall, LoadOutcome, PlainAnswer, Relay, ReleaseTimes
from unisono.core.errors import BackendUnavailableError, ConnectionLostError, RunnerDiedError
from unisono.core.model import PassMethod

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence

    from unisono.adapters.held import ForwardedCall
    from unisono.adapters.llama_server import LlamaServerCall
    from unisono.core.model import Finished, Forwarded, Item, LoadedRunner, ModelInfo, RunnerSpec, Spoke

NAME: Final = "embedded"
# The model's name where nobody configured another file.
MODEL: Final = "smollm2:135m"
_START_TIMEOUT_S: Final = 120.0
# A dead engine's connections can be seen to close a moment before its end is seen.
_DEATH_IS_SEEN_S: Final = 1.0


class EmbeddedCall:
    """A held request to the engine, which knows why its connection was lost. See the port `HeldCall`."""

    def __init__(self, call: LlamaServerCall | ForwardedCall, engine: EngineProcess, *, backend: str = NAME) -> None:
        self.exchange = call.exchange
        self._backend = backend
        self._call = call
        self._engine = engine
        self._is_aborted = False

    @property
    def is_closed(self) -> bool:
        """See the port."""
        return self._call.is_closed

    async def wait_closed(self) -> None:
        """See the port."""
        await self._call.wait_closed()

    def abort(self) -> None:
        """See the port."""
        self._is_aborted = True
        self._call.abort()

    async def answer(self) -> AsyncGenerator[Spoke | Finished, None]:
        """See the port. Raises RunnerDiedError where the engine died meanwhile."""
        try:
            async with contextlib.aclosing(self._call.answer()) as pieces:
                async for piece in pieces:
                    yield piece
        except ConnectionLostError as error:
            if self._is_aborted or not await self._engine.died(_DEATH_IS_SEEN_S):
                raise
            raise RunnerDiedError(
                f"the embedded engine died; its last words:\n  {self._engine.last_words}",
                metadata={"backend": self._backend},
            ) from error


class EmbeddedBackend:
    """llama.cpp in a child process. See the port `Backend`."""

    def __init__(
        self,
        *,
        name: str = NAME,
        model_path: str | None = None,
        slots: int = 8,
        context: int = 2048,
        threads: int | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Starts nothing yet: `start` does, and whatever asks it something.

        `context`: tokens of each slot. `threads`: None for as many as there are cores to use. `on_progress` is told
        what takes long.
        """
        self._name = name
        self._model_path = model_path
        self._slots = slots
        self._context = context
        self._threads = threads
        self._on_progress = on_progress
        self._engine: EngineProcess | None = None
        self._server: LlamaServerBackend | None = None
        self._starting = asyncio.Lock()
        self._is_closed = False

    @property
    def name(self) -> str:
        """See the port."""
        return self._name

    @property
    def kind(self) -> str:
        """See the port."""
        return "embedded"

    @property
    def url(self) -> str:
        """See the port; empty before the engine was started."""
        return self._engine.url if self._engine else ""

    @property
    def pass_method(self) -> PassMethod:
        """See the port."""
        return PassMethod.ARRIVAL

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while it does not run."""
        return self._engine.pid if self._engine and self._engine.is_alive else None

    async def start(self) -> None:
        """Starts the engine, if it does not run. Raises LoadFailedError where it cannot be had."""
        async with self._starting:
            if self._is_closed:
                raise BackendUnavailableError("the embedded engine was closed", metadata={"backend": self._name})
            if self._engine is not None and self._engine.is_alive:
                return
            await self._drop()
            model = find_model(self._model_path)
            alias = model.stem if self._model_path else MODEL
            self._on_progress(
                f"starting llama.cpp with {model.name}, {self._slots} slots of {self._context:,} tokens"
            )
            began = time.monotonic()
            self._engine = await EngineProcess.start(
                model,
                alias=alias,
                slots=self._slots,
                context=self._context,
                threads=self._threads,
                timeout_s=_START_TIMEOUT_S,
            )
            self._on_progress(f"llama.cpp is ready after {time.monotonic() - began:.1f} s")
            self._server = LlamaServerBackend(
                name=self._name, url=self._engine.url, headers={"Authorization": f"Bearer {self._engine.key}"}
            )

    async def version(self) -> str:
        """See the port. A dead engine is started again: asking whether it answers brings it back."""
        return await (await self._running()).version()

    async def models(self) -> tuple[ModelInfo, ...]:
        """See the port."""
        return tuple(replace(model, backend=self._name) for model in await (await self._running()).models())

    async def find_model(self, name: str) -> ModelInfo:
        """See the port."""
        return await (await self._running()).find_model(name)

    async def loaded(self) -> tuple[LoadedRunner, ...]:
        """See the port: nothing while the engine does not run."""
        if self._server is None or self.pid is None:
            return ()
        return await self._server.loaded()

    async def load(self, runner: RunnerSpec, *, keep_alive_s: float) -> LoadOutcome:
        """See the port. A dead engine is started again, which is a load."""
        began = time.monotonic()
        was_alive = self.pid is not None
        outcome = await (await self._running()).load(runner, keep_alive_s=keep_alive_s)
        return replace(outcome, was_loaded=was_alive, duration_s=time.monotonic() - began)

    async def unload(self, runner: RunnerSpec) -> None:
        """See the port: it keeps its model."""

    async def stage(
        self, item: Item, runner: RunnerSpec, headers: Mapping[str, str], relay: Relay | None = None
    ) -> HeldCall:
        """See the port. A dead engine is no backend: the probe that follows starts it."""
        if self._server is None or self._engine is None or not self._engine.is_alive:
            raise BackendUnavailableError("the embedded engine does not run", metadata={"backend": self._name})
        call = await self._server.stage(item, runner, headers, relay)
        return EmbeddedCall(call, self._engine, backend=self._name)

    async def pass_on(self, request: Forwarded, body: AsyncIterable[bytes] | None = None) -> PlainAnswer:
        """See the port."""
        return await (await self._running()).pass_on(request, body)

    def release(self, calls: Sequence[HeldCall]) -> ReleaseTimes:
        """See the port."""
        first_ns, last_ns = release([call.exchange for call in calls if isinstance(call, EmbeddedCall)])
        return ReleaseTimes(first_ns=first_ns, last_ns=last_ns)

    async def close(self) -> None:
        """Ends the engine and waits for that."""
        async with self._starting:
            self._is_closed = True
            await self._drop()

    async def engine_counters(self) -> dict[str, float]:
        """See LlamaServerBackend.engine_counters."""
        return await (await self._running()).engine_counters()

    async def busy_slots(self) -> int:
        """See LlamaServerBackend.busy_slots."""
        return await (await self._running()).busy_slots()

    async def _running(self) -> LlamaServerBackend:
        await self.start()
        if self._server is None:
            raise BackendUnavailableError("the embedded engine is not running")
        return self._server

    async def _drop(self) -> None:
        server, self._server = self._server, None
        engine, self._engine = self._engine, None
        if server is not None:
            await server.close()
        if engine is not None:
            await engine.stop()
