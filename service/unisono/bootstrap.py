"""Puts the house together: with `serving.py`, the only file that names concrete classes.

async with running(Settings()) as service:
    …  # service.target answers
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from opentelemetry.trace import NoOpTracerProvider

from unisono import __version__
from unisono.adapters.embedded import EmbeddedBackend
from unisono.adapters.embedded.backend import MODEL
from unisono.adapters.embedded.process import EngineProcess, find_model
from unisono.adapters.journal.memory import MemoryJournal
from unisono.adapters.llama_server import LlamaServerBackend
from unisono.adapters.metrics.series import Series
from unisono.adapters.metrics.standing import StandingCollector
from unisono.adapters.metrics.watch import MetricsListener
from unisono.adapters.ollama import OllamaBackend
from unisono.adapters.state.slots_file import SlotsFile
from unisono.adapters.telemetry.setup import configure
from unisono.adapters.telemetry.trace import TraceListener
from unisono.app.batches import Batches, BatchesSettings
from unisono.app.driver import BackendDriver
from unisono.app.listeners import BothListeners
from unisono.app.resolve import Resolver
from unisono.config import EMBEDDED, LLAMA_SERVER, SettingError, configured_backends
from unisono.core.arbiter import ArbiterSettings, Away
from unisono.core.conductor import ConductorSettings
from unisono.core.errors import UnisonoError
from unisono.core.limits import Limits
from unisono.core.memory import MemoryBounds
from unisono.core.window import WindowSettings
from unisono.edge.grpc.questions import ServerFacts
from unisono.edge.grpc.server import MAX_RECEIVE_BYTES, MAX_SEND_BYTES, GrpcServer
from unisono.edge.grpc.service import BatchInferenceServicer
from unisono.folders import slots_path
from unisono.serving import report_defect, serve_metrics, start_rest, start_store
from unisono.setting_kinds import parse_address

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from unisono.app.ports import Backend, Listener
    from unisono.config import BackendSettings, Settings
    from unisono.core.arbiter import Back
    from unisono.core.model import ModelInfo

log = structlog.get_logger("unisono")
# Where Ollama listens when nobody says otherwise, and how long a look whether it is there may take.
_LOOK_S = 1.0
# After the batches have ended, calls have so long to read the end.
_LAST_WORDS_S = 2.0
_ENGINE_START_S = 120.0


class SystemClock:
    """The time of this machine."""

    def monotonic_s(self) -> float:
        """See the port. The clock of the event loop too, so that its timers and our limits agree."""
        return time.monotonic()

    def time_ns(self) -> int:
        """See the port."""
        return time.time_ns()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """A service that runs in this process."""

    # Where it listens, "127.0.0.1:50051".
    target: str
    # Which backends it uses, for people.
    backend_description: str
    # In the order of the configuration; never empty.
    backends: tuple[Backend, ...]
    batches: Batches
    # Where its metrics are, for people and scrapers; empty: nowhere.
    metrics_url: str = ""
    # Where it serves OpenAI's API; empty: nowhere.
    http_url: str = ""

    @property
    def backend(self) -> Backend:
        """The first, which as a rule is the only one."""
        return self.backends[0]


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    on_progress: Callable[[str], None] = lambda _: None,
    with_metrics: bool = False,
    with_store: bool = False,
    with_http: bool = False,
) -> AsyncGenerator[RunningService, None]:
    """Runs the service until the context is left; then drains it.

    `with_metrics`, `with_http`: it serves metrics, and OpenAI's API, where that is set. `with_store`: it keeps
    batches where that is set.

    A backend that is away does not keep it from starting. Raises OSError where it cannot listen, UnisonoError where
    the embedded engine cannot be had, and SettingError where backends are not configured as they must be.
    """
    clock = SystemClock()
    started_at_ns = clock.time_ns()
    async with AsyncExitStack() as stack:
        configured = configured_backends(settings, os.environ)
        backends: list[Backend] = []
        for one in configured:
            backend = build_backend(one, settings, on_progress)
            stack.push_async_callback(backend.close)
            backends.append(backend)
        _refuse_twins(backends)
        for backend in backends:
            if isinstance(backend, EmbeddedBackend):
                # Now, so that what is missing is said at once, and not by the first batch.
                await backend.start()
        telemetry = configure(__version__, os.environ)
        listener: Listener
        if telemetry is not None and telemetry.targets:
            # In a thread: a collector that is away must not hold up the loop in which everything else ends.
            stack.push_async_callback(asyncio.to_thread, telemetry.shutdown)
            listener = telemetry.listener(backends, item_limit=settings.trace_items)
        else:
            # The caller's trace context goes on to the backend. Spans that nobody is told of would cost each request
            # 0.7 ms.
            listener = TraceListener(NoOpTracerProvider())
        path = slots_path(settings, os.environ)
        memory = SlotsFile(path) if path is not None else None
        if path is not None and memory is not None:
            _warn_of_state(path.parent)
            stack.push_async_callback(memory.close)
        drivers: dict[str, BackendDriver] = {}
        for one, backend in zip(configured, backends, strict=True):
            driver = drivers[one.name] = BackendDriver(
                backend,
                clock,
                slots=one.slots,
                max_in_flight=settings.max_in_flight,
                memory_factor=settings.memory_factor,
                settings=_arbiter_settings(settings, one),
                memory=memory,
                report_defect=report_defect,
                report_outage=partial(report_outage, one.name),
            )
            await _start_driver(driver, stack)
        has_door = parse_address(settings.metrics_listen) or (with_http and parse_address(settings.http_listen))
        series = Series(version=__version__) if with_metrics and has_door else None
        if series is not None:
            listener = BothListeners(listener, MetricsListener(series, tuple(drivers)))
        resolver = Resolver(drivers, clock, patience_s=settings.backend_patience)
        stack.push_async_callback(resolver.close)
        batches = Batches(
            drivers=drivers,
            resolver=resolver,
            journal=MemoryJournal(),
            listener=listener,
            clock=clock,
            report_defect=report_defect,
            limits=_limits(settings),
            settings=BatchesSettings(
                keep_ended_s=settings.keep_ended,
                item_timeout_s=settings.item_timeout,
                keep_alive_s=settings.keep_alive,
                detach_grace_s=settings.detach_grace,
                default_model=settings.default_model,
                memory=MemoryBounds(factor=settings.memory_factor, limit_bytes=settings.memory_limit),
                window=_window(settings),
            ),
        )
        metrics_url = ""
        if series is not None:
            series.registry.register(StandingCollector(drivers, unplanned=lambda: batches.unplanned))
            metrics_url = await serve_metrics(series, settings, stack)
        kept = await start_store(settings, batches, clock, stack) if with_store else None
        durable = kept.durable if kept is not None else None
        servicer = BatchInferenceServicer(
            batches=batches,
            durable=durable,
            drivers=drivers,
            clock=clock,
            facts=ServerFacts(
                version=__version__,
                started_at_ns=started_at_ns,
                max_receive_bytes=MAX_RECEIVE_BYTES,
                max_send_bytes=MAX_SEND_BYTES,
            ),
            report_defect=report_defect,
        )
        rest = await start_rest(settings, kept, batches, clock, stack, series=series) if with_http else None
        server = GrpcServer(servicer)
        port = await server.start(settings.listen)
        is_socket = settings.listen.startswith("unix:")
        target = settings.listen if is_socket else f"{settings.listen.rpartition(':')[0]}:{port}"
        try:
            yield RunningService(
                target=target,
                backend_description=await describe_all(backends),
                backends=tuple(backends),
                batches=batches,
                metrics_url=metrics_url,
                http_url=rest.url if rest is not None else "",
            )
        finally:
            await server.drain()
            ends = [batches.close(drain_s=settings.drain)]
            if durable is not None:
                ends.append(durable.close(drain_s=settings.drain))
            _ = await asyncio.gather(*ends)
            await server.stop(_LAST_WORDS_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningEngine:
    """The embedded engine by itself: a llama.cpp server, for a bench that asks it directly and through a service."""

    url: str
    # The bearer token that each request needs.
    token: str


@asynccontextmanager
async def running_engine(
    settings: Settings, *, on_progress: Callable[[str], None] = lambda _: None
) -> AsyncGenerator[RunningEngine, None]:
    """Runs the engine until the context is left. Raises UnisonoError where it cannot be had."""
    model = find_model(settings.embedded_model or None)
    on_progress(f"starting llama.cpp with {model.name}")
    engine = await EngineProcess.start(
        model,
        alias=model.stem if settings.embedded_model else MODEL,
        slots=settings.embedded_slots,
        context=settings.embedded_context,
        threads=None,
        timeout_s=_ENGINE_START_S,
    )
    try:
        yield RunningEngine(url=engine.url, token=engine.key)
    finally:
        await engine.stop()


def build_backend(
    one: BackendSettings, settings: Settings, on_progress: Callable[[str], None] = lambda _: None
) -> Backend:
    """A backend of the configuration; nothing is opened yet. Raises SettingError for an address that is none."""
    token = one.token.get_secret_value()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    if one.kind == EMBEDDED:
        return EmbeddedBackend(
            name=one.name,
            model_path=settings.embedded_model or None,
            slots=settings.embedded_slots,
            context=settings.embedded_context,
            on_progress=on_progress,
        )
    kind = LlamaServerBackend if one.kind == LLAMA_SERVER else OllamaBackend
    try:
        return kind(
            name=one.name,
            url=one.url,
            headers=headers,
            connect_timeout_s=settings.connect_timeout,
            load_timeout_s=settings.load_timeout,
        )
    except ValueError as error:
        raise SettingError(f"{one.written_in}: the address of backend {one.name}: {error}") from error


def _warn_of_state(folder: Path) -> None:
    """Says at once, and not when the first slots are learned, that they will not be remembered."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning(
            "learned slots will not be remembered: the folder cannot be written to. Set UNISONO_STATE_DIR to another "
            "one, or to none",
            folder=str(folder),
            error=error.strerror or type(error).__name__,
        )


async def usable_model(settings: Settings) -> str | None:
    """The model for items that name none, where the settings say; None: no backend is there, or none has one.

    The configured one; else one that is loaded; else the smallest that can complete a prompt. An embedded engine,
    which would have to be started, is not asked.
    """
    configured = [one for one in configured_backends(settings, os.environ) if one.kind != EMBEDDED]
    looks = await asyncio.gather(*(_look(build_backend(one, settings)) for one in configured))
    found = [each for look in looks if look is not None for each in look]
    if settings.default_model and any(look is not None for look in looks):
        return settings.default_model
    return min(found, key=lambda each: (not each[1], each[0].size_bytes))[0].name if found else None


async def _look(backend: Backend) -> list[tuple[ModelInfo, bool]] | None:
    """The models that can complete a prompt, and whether each is loaded; None: the backend is not there."""
    try:
        async with asyncio.timeout(_LOOK_S):
            models = [model for model in await backend.models() if not model.is_embedding]
            loaded = {there.digest for there in await backend.loaded()}
    except (UnisonoError, TimeoutError):
        return None
    finally:
        await backend.close()
    return [(model, model.digest in loaded) for model in models]


async def describe_all(backends: Sequence[Backend]) -> str:
    """What the backends are, for people."""
    found = await asyncio.gather(*map(describe, backends))
    if len(backends) == 1:
        return found[0]
    return ", ".join(f"{backend.name} ({what})" for backend, what in zip(backends, found, strict=True))


async def describe(backend: Backend) -> str:
    """What a backend is, for people: "Ollama 0.32.15 at http://127.0.0.1:11434"."""
    try:
        async with asyncio.timeout(_LOOK_S):
            known = await backend.version()
    except (UnisonoError, TimeoutError):
        known = ""
    if backend.kind == "embedded":
        return f"the embedded engine (llama.cpp with {', '.join([m.name for m in await backend.models()])})"
    name = {"ollama": "Ollama", "llama-server": "llama.cpp's server"}.get(backend.kind, backend.kind)
    return f"{name} {known} at {backend.url}" if known else f"{name} at {backend.url}, which does not answer yet"


def report_outage(backend: str, news: Away | Back) -> None:
    """Tells the log that a backend is away, or back."""
    # A log that nobody reads any more is no reason to leave its items alone.
    with suppress(BrokenPipeError):
        if isinstance(news, Away):
            log.warning("backend away", backend=backend, error=news.error.message, items_waiting=news.items)
        else:
            log.info("backend back", backend=backend, after_s=round(news.after_s, 3))


def _refuse_twins(backends: Sequence[Backend]) -> None:
    """Two drivers of one backend would not know of each other's requests."""
    names: dict[str, str] = {}
    for backend in backends:
        if backend.url and names.setdefault(backend.url, backend.name) != backend.name:
            both = f"{names[backend.url]} and {backend.name}"
            raise SettingError(f"UNISONO_BACKENDS: {both} are one, {backend.url}: leave one of them out")


def _window(settings: Settings) -> WindowSettings:
    window_s = settings.batch_timeout if settings.batch_enabled else 0.0
    is_asked_for = "batch_timeout" in settings.model_fields_set
    return WindowSettings(window_s=window_s, size=settings.batch_size, yields_to_slots=not is_asked_for)


def _arbiter_settings(settings: Settings, backend: BackendSettings) -> ArbiterSettings:
    conductor = ConductorSettings(stall_s=settings.stall_timeout, window=_window(settings))
    return ArbiterSettings(
        patience_s=settings.backend_patience,
        yield_every_s=settings.yield_every if backend.loads_on_demand else 0.0,
        conductor=conductor,
    )


async def _start_driver(driver: BackendDriver, stack: AsyncExitStack) -> None:
    """Runs a driver until the stack is left."""
    is_started = asyncio.Event()
    task = asyncio.get_running_loop().create_task(driver.run(is_started.set))

    async def stop() -> None:
        driver.stop()
        await task

    stack.push_async_callback(stop)
    _ = await is_started.wait()


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_items=settings.max_items,
        max_item_text_bytes=settings.max_item_text_bytes,
        max_image_bytes=settings.max_image_bytes,
        max_batches=settings.max_batches,
        max_journal_bytes=settings.max_journal_bytes,
        max_open_items=settings.max_open_items,
    )
