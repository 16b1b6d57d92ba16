"""Runs commands in this process, against the stand-in service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from typer.testing import CliRunner, Result

from tests.unit.cli.fake_server import FakeServer, Script, serving
from unisono.core.errors import BackendUnavailableError
from unisono.edge.cli.main import build_cli


def invoke(
    runner: CliRunner, arguments: Sequence[str], script: Script | None = None
) -> tuple[Result, list[FakeServer]]:
    """Runs a command; a service that it starts behaves by the script. Returns the services that were started."""
    started: list[FakeServer] = []

    @asynccontextmanager
    async def start(
        *, embedded: bool | None, ollama_url: str | None, on_progress: Callable[[str], None]
    ) -> AsyncIterator[FakeServer]:
        if ollama_url:
            raise BackendUnavailableError(f"nothing answers at {ollama_url}")
        on_progress("starting a stand-in")
        async with serving(script) as server:
            server.backend_description = "the embedded engine" if embedded else "a stand-in"
            started.append(server)
            yield server

    def serve(*, listen: str | None, ollama_url: str | None, embedded: bool, log_level: str | None) -> None:
        if listen == "taken":
            raise OSError("address already in use")
        if ollama_url == "away":
            raise BackendUnavailableError("nothing answers there")
        raise KeyboardInterrupt

    result = runner.invoke(build_cli(start, serve, version="1.2.3"), list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result, started


@contextmanager
def beside(script: Script | None = None) -> Iterator[FakeServer]:
    """A service that runs beside the command, in a thread: one that outlives it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = serving(script)
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
    finally:
        _ = asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
        _ = loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
