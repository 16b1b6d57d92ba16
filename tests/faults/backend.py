"""The stand-in for Ollama as a process that can be killed: what it was asked for is in a file that outlives it.

python -m tests.faults.backend PORT LOG [--slots N] [--pass-s S]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.fakes.ollama.http import Exchange

SLOTS = 8
MODEL = "first"
# Before the ports that the system gives to those who take any, so that nobody takes one while its owner is away.
_PORTS = (15_000, 30_000)
_UP_S = 30.0


class Recorded(FakeOllama):
    """Writes down each prompt as soon as its request is there to the last byte."""

    def __init__(self, log: int, *, port: int, slots: int, pass_s: float) -> None:
        super().__init__([FakeModel(name=MODEL)], port=port, num_parallel=slots, pass_s=pass_s)
        self._asked = log

    def start(self, exchange: Exchange) -> None:
        """See the stand-in."""
        if exchange.live.path == "/api/chat":
            messages = json.loads(exchange.body).get("messages")
            if messages:
                # One write a line, straight to the system: a kill that comes now loses nothing.
                _ = os.write(self._asked, f"{messages[-1]['content']}\n".encode())
        super().start(exchange)


def free_port() -> int:
    """A port of loopback that nobody has, and that the system gives to nobody by itself."""
    while True:
        port = random.randrange(*_PORTS)
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class StandIn:
    """A backend that is there within the context, and between `kill` and `start` is not."""

    def __init__(self, folder: Path, *, slots: int = SLOTS, pass_s: float = 0.01) -> None:
        """`folder`: for its log."""
        self._log = folder / "asked"
        self._log.touch()
        self._complaints = folder / "backend.log"
        self._arguments = ["--slots", str(slots), "--pass-s", str(pass_s)]
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.address}"

    async def start(self) -> None:
        """Starts it, and returns when it listens."""
        command = [sys.executable, "-m", "tests.faults.backend", str(self.port), str(self._log), *self._arguments]
        with self._complaints.open("ab") as complaints:
            self._process = subprocess.Popen(command, stderr=complaints)  # noqa: ASYNC220 - ends by a signal only
        began = time.monotonic()
        while time.monotonic() - began < _UP_S and self._process.poll() is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
        raise RuntimeError(f"the stand-in does not listen on port {self.port}; exit {self._process.poll()}")

    def kill(self) -> None:
        """Kill -9, and its end waited for."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            _ = self._process.wait(10)
            self._process = None

    def calls(self) -> Counter[str]:
        """How often it was asked for each prompt, in all its lives."""
        return Counter(self._log.read_text().splitlines())


async def _serve(port: int, log: Path, *, slots: int, pass_s: float) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
    async with Recorded(descriptor, port=port, slots=slots, pass_s=pass_s):
        parent = os.getppid()
        # Whoever started it may have been killed itself.
        while os.getppid() == parent:  # noqa: ASYNC110 - the system tells nobody
            await asyncio.sleep(0.5)


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.backend")
    parser.add_argument("port", type=int)
    parser.add_argument("log", type=Path)
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--pass-s", type=float, default=0.01)
    given = parser.parse_args()
    asyncio.run(_serve(given.port, given.log, slots=given.slots, pass_s=given.pass_s))


if __name__ == "__main__":
    main()
