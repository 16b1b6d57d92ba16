"""The service as a process of its own, as it is used: it shares no memory with the bench, and no event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from unisono.bench.backend import OLLAMA, Backend, BenchError

_START_S = 60.0
_STOP_S = 10.0
# Settings of the environment that name a backend, an address or a log level of its own; all others are kept.
_OURS = (
    "UNISONO_BACKENDS",
    "UNISONO_EMBEDDED",
    "UNISONO_LLAMA_SERVER_URL",
    "UNISONO_OLLAMA_URL",
    "UNISONO_BACKEND_TOKEN",
    "UNISONO_DEFAULT_MODEL",
)
_SHOWN_LINES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceProcess:
    """A service that answers."""

    # HOST:PORT.
    target: str
    pid: int

    def memory(self) -> int | None:
        """The bytes of memory that it has now; None where the system does not tell."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        return None


def environment_of(backend: Backend) -> dict[str, str]:
    """The environment of a service that uses this backend, and listens where there is room."""
    variables = {name: value for name, value in os.environ.items() if name not in _OURS}
    url = "UNISONO_OLLAMA_URL" if backend.kind == OLLAMA else "UNISONO_LLAMA_SERVER_URL"
    variables |= {
        url: backend.url,
        "UNISONO_LISTEN": "127.0.0.1:0",
        "UNISONO_LOG_LEVEL": "info",
        "UNISONO_DRAIN": "0s",
        # It begins without memory of earlier runs, and leaves none.
        "UNISONO_STATE_DIR": "none",
        # Its port is another service's.
        "UNISONO_METRICS_LISTEN": "none",
        "UNISONO_DEFAULT_MODEL": backend.models[0],
        # It is asked the same as the others, and they wait as long as it takes.
        "UNISONO_STALL_TIMEOUT": "1h",
        "UNISONO_LOAD_TIMEOUT": "1h",
    }
    if token := backend.headers.get("Authorization", "").removeprefix("Bearer "):
        variables["UNISONO_BACKEND_TOKEN"] = token
    return variables


@contextlib.asynccontextmanager
async def service_process(backend: Backend) -> AsyncGenerator[ServiceProcess, None]:
    """A service over this backend, until the context is left. Raises BenchError where it does not start."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "unisono",
        "serve",
        env=environment_of(backend),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        # A terminal's interrupt is for the bench, which then ends it.
        start_new_session=True,
    )
    log: deque[str] = deque(maxlen=_SHOWN_LINES)
    stderr = process.stderr
    reader: asyncio.Task[None] | None = None
    try:
        if stderr is None:
            raise BenchError("the service did not start: its log cannot be read")
        try:
            async with asyncio.timeout(_START_S):
                target = await _listening(stderr, log)
        except TimeoutError:
            target = ""
        if not target:
            raise BenchError("\n  ".join(["the service did not start:", *log]))
        # Read on to its end: a pipe that is full would stop it.
        reader = asyncio.get_running_loop().create_task(_read_on(stderr))
        yield ServiceProcess(target=target, pid=process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                _ = await process.wait()
        except TimeoutError:
            process.kill()
            _ = await process.wait()
        if reader is not None:
            await reader


async def _listening(stderr: asyncio.StreamReader, log: deque[str]) -> str:
    """Where it listens, by its log; "" where it ended before it did."""
    async for line in stderr:
        text = line.decode(errors="replace").rstrip()
        log.append(text)
        with contextlib.suppress(ValueError):
            event = json.loads(text)
            if isinstance(event, dict) and event.get("event") == "serving":
                return str(event["listen"])
    return ""


async def _read_on(stderr: asyncio.StreamReader) -> None:
    while await stderr.read(65_536):
        pass
