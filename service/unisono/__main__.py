"""The command `unisono`: gives the command line what it may not import, and runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError

# First: it keeps gRPC's core, which is imported with the rest, from writing to standard error.
from unisono.edge.cli.main import build_cli  # isort: split

from unisono import __version__
from unisono.bootstrap import running, running_engine, usable_model
from unisono.config import SettingError, Settings, idle_settings, wrong_settings
from unisono.edge.cli.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from unisono.bootstrap import RunningEngine, RunningService

log = structlog.get_logger("unisono")


def main() -> None:
    """The command line."""
    build_cli(start=_start, serve=_serve, start_engine=_start_engine, version=__version__)()


@asynccontextmanager
async def _start(
    *, embedded: bool | None, ollama_url: str | None, on_progress: Callable[[str], None]
) -> AsyncGenerator[RunningService, None]:
    """A service for one command: what is configured; the embedded engine where nothing is, and no Ollama answers."""
    _configure_log("warning")
    settings = _settings(listen="127.0.0.1:0", ollama_url=ollama_url, embedded=embedded)
    _tell_idle(settings)
    with _settings_told():
        if settings.backends or not (settings.embedded or settings.llama_server_url):
            model = await usable_model(settings)
            if model is not None:
                settings = settings.model_copy(update={"default_model": model})
                on_progress(f"items that name no model are answered by {model}")
            elif embedded is None and not ollama_url and not settings.backends:
                settings = settings.model_copy(update={"embedded": True})
        async with running(settings.model_copy(update={"drain": 0.0}), on_progress=on_progress) as service:
            yield service


@asynccontextmanager
async def _start_engine(
    *, slots: int | None, on_progress: Callable[[str], None]
) -> AsyncGenerator[RunningEngine, None]:
    """The embedded engine by itself, as configured."""
    _configure_log("warning")
    async with running_engine(_settings(embedded_slots=slots), on_progress=on_progress) as engine:
        yield engine


def _serve(*, listen: str | None, ollama_url: str | None, embedded: bool, log_level: str | None) -> None:
    """Runs the service until SIGINT or SIGTERM; a second one ends it at once."""
    settings = _settings(listen=listen, ollama_url=ollama_url, embedded=embedded or None, log_level=log_level)
    _configure_log(settings.log_level)
    _tell_idle(settings)
    with _settings_told():
        asyncio.run(_serve_until_told(settings))


async def _serve_until_told(settings: Settings) -> None:
    is_told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if is_told.is_set():
            sys.exit(130)
        # First: the log may have nobody any more who reads it, and is no reason to go on.
        is_told.set()
        log.info("stopping", drain_s=settings.drain)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    async with running(settings, on_progress=log.info, with_metrics=True, with_store=True, with_http=True) as service:
        # Thousands of items live for a while: at Python's own thresholds, going through them again and again takes a
        # tenth of the time. What is there from the beginning stays.
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        log.info(
            "serving",
            listen=service.target,
            http=service.http_url or "none",
            backend=service.backend_description,
            metrics=service.metrics_url or "none",
            version=__version__,
        )
        _ = await is_told.wait()
    log.info("stopped")


def _settings(**values: Any) -> Settings:
    """What was said on the command line, and for the rest the environment.

    A backend that is named on the command line is the only one.
    """
    if values.get("ollama_url") or values.get("embedded"):
        others: dict[str, Any] = {"backends": (), "llama_server_url": "", "embedded": False, "ollama_url": ""}
        values = others | {name: value for name, value in values.items() if value is not None}
    with _settings_told():
        return Settings(**{name: value for name, value in values.items() if value is not None})


def _tell_idle(settings: Settings) -> None:
    for line in idle_settings(settings, os.environ):
        log.warning(line)


@contextmanager
def _settings_told() -> Generator[None]:
    """Ends the process where a setting cannot be what it is, and says which: nobody needs a traceback for that."""
    try:
        yield
    except ValidationError as error:
        for line in wrong_settings(error, os.environ):
            sys.stderr.write(f"unisono: {line}\n")
        sys.exit(ExitCode.USAGE)
    except SettingError as error:
        sys.stderr.write(f"unisono: {error}\n")
        sys.exit(ExitCode.USAGE)


def _configure_log(level: str) -> None:
    """One line an event, to standard error: for people on a terminal, JSON otherwise."""
    is_terminal = sys.stderr.isatty()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if is_terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


if __name__ == "__main__":
    main()
