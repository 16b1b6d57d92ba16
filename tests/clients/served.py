"""A service, and the stand-in behind it, each in a process of its own: as a client meets them that is not a test."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from tests.bench.work import stand_in


@contextlib.contextmanager
def served(*, settings: dict[str, str] | None = None, port: int = 0, **costs: Any) -> Iterator[str]:
    """Where the service listens; both processes end with the context. `costs` are those of the stand-in."""
    with stand_in(**costs) as url, service_at(url, settings=settings, port=port) as target:
        yield target


@contextlib.contextmanager
def service_at(url: str, *, settings: dict[str, str] | None = None, port: int = 0) -> Iterator[str]:
    """A service over a backend: where it listens."""
    with service_process(url, settings=settings, port=port) as (target, _):
        yield target


@contextlib.contextmanager
def service_process(
    url: str, *, settings: dict[str, str] | None = None, port: int = 0
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A service over a backend: where it listens, and its process."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("UNISONO_")} | {
        "UNISONO_OLLAMA_URL": url,
        "UNISONO_LISTEN": f"127.0.0.1:{port}",
        "UNISONO_DRAIN": "0s",
        "UNISONO_STATE_DIR": "none",
        "UNISONO_METRICS_LISTEN": "none",
        "UNISONO_HTTP_LISTEN": "none",
        "UNISONO_DEFAULT_MODEL": "first",
        **{f"UNISONO_{name.upper()}": value for name, value in (settings or {}).items()},
    }
    with subprocess.Popen(
        [sys.executable, "-m", "unisono", "serve"],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        try:
            yield _listening(process.stderr), process
        finally:
            process.terminate()
            try:
                _ = process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _listening(stderr: IO[bytes]) -> str:
    """Where it listens, by its log, which is read on to its end: a pipe that is full would stop it."""
    lines: list[str] = []
    for line in stderr:
        lines.append(line.decode(errors="replace"))
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "serving":
                threading.Thread(target=stderr.read, daemon=True).start()
                return str(event["listen"])
    raise AssertionError("the service did not start:\n" + "".join(lines))
