"""`unisono` as a process of its own, with stand-ins for what the composition root gives it.

    python -m tests.unit.cli.program run FILE …

Where the command starts a service, it gets the stand-in of fake_server.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tests.unit.cli.fake_server import FakeServer, Script, serving
from unisono.core.errors import BackendUnavailableError
from unisono.edge.cli import connect
from unisono.edge.cli.main import build_cli

# A service that runs on this machine, where one is looked for by default, is not this test's.
connect.DEFAULT_SERVER = "127.0.0.1:1"


@asynccontextmanager
async def start(
    *, embedded: bool | None, ollama_url: str | None, on_progress: Callable[[str], None]
) -> AsyncIterator[FakeServer]:
    """Starts the stand-in, or fails as the composition root would."""
    if ollama_url:
        raise BackendUnavailableError(f"nothing answers at {ollama_url}; start it with `ollama serve`")
    on_progress("starting a stand-in")
    async with serving(Script()) as server:
        server.backend_description = "the embedded engine" if embedded else "a stand-in"
        yield server


def serve(*, listen: str | None, ollama_url: str | None, embedded: bool, log_level: str | None) -> None:
    """Says what it was given."""
    print(f"{listen=} {ollama_url=} {embedded=} {log_level=}")  # noqa: T201
    if listen == "bad":
        raise OSError("the address is not one")


cli = build_cli(start, serve, version="1.2.3")

if __name__ == "__main__":
    cli()
