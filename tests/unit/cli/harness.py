"""Runs commands in this process, against the stand-in service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

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
