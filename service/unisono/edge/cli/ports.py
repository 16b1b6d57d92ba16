"""What the command line needs of the house and may not import: starting a service, and being one.

The composition root passes these to `build_cli`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class StartedServer(Protocol):
    """A service that runs in this process until its context is left."""

    @property
    def target(self) -> str:
        """Where it listens, "127.0.0.1:50051"; its health is SERVING."""
        ...

    @property
    def backend_description(self) -> str:
        """Which backend it uses, as the object of "using": "Ollama 0.32.15 at http://127.0.0.1:11434"."""
        ...


class StartServer(Protocol):
    """Starts a service for one command, on a loopback port that is free."""

    def __call__(
        self,
        *,
        # True: the embedded engine. None: the configured Ollama, and the embedded engine where there is none.
        embedded: bool | None,
        # Instead of the configured one.
        ollama_url: str | None,
        # Told, in a few words each, what is being waited for: "loading SmolLM2-135M-Instruct".
        on_progress: Callable[[str], None],
    ) -> AbstractAsyncContextManager[StartedServer]:
        """Entering waits until it serves; leaving stops it and what it started.

        Raises a `core.errors.UnisonoError` whose message says what is missing and what to do.
        """
        ...


class StartedEngine(Protocol):
    """The embedded engine by itself, until its context is left: a llama.cpp server."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    @property
    def token(self) -> str:
        """What every request to it bears."""
        ...


class StartEngine(Protocol):
    """Starts the embedded engine, for a bench that asks it directly and through a service."""

    def __call__(
        self,
        *,
        # How many requests it computes side by side; None: as configured.
        slots: int | None,
        on_progress: Callable[[str], None],
    ) -> AbstractAsyncContextManager[StartedEngine]:
        """Entering waits until it answers; raises a `core.errors.UnisonoError` where it cannot be had."""
        ...


class Serve(Protocol):
    """Runs the service until it is told to stop."""

    def __call__(
        self,
        *,
        # HOST:PORT. None, here and below: as configured.
        listen: str | None,
        ollama_url: str | None,
        # True: the embedded engine instead of an Ollama.
        embedded: bool,
        # "debug", "info", "warning" or "error".
        log_level: str | None,
    ) -> None:
        """Blocks. Raises a `core.errors.UnisonoError`, or an OSError, where it cannot start."""
        ...
