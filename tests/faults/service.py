"""The service as a process that can be killed and started again, and what is measured of it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from tests.faults.backend import MODEL, SLOTS, free_port
from tests.faults.history import Sample
from tests.faults.validators import BrokenPromiseError
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

# A caller asks again so soon after its connection was cut.
AGAIN_S = 0.02
# Each channel has connections of its own, and tries again at once.
CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 50),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Up:
    """How long a service took from the start of its process until it answered, in seconds."""

    wall_s: float
    # Of these, it waited for a processor that other programs had.
    waited_s: float

    @property
    def own_s(self) -> float:
        """What it would have taken on a machine that does nothing else."""
        return self.wall_s - self.waited_s


class Service:
    """`unisono serve` as a process."""

    def __init__(self, folder: Path, backend_url: str, settings: Mapping[str, str] | None = None) -> None:
        """`folder`: for its data, its socket and its log; a short path, since a socket's may be no longer.

        `settings`: further ones, without UNISONO_.
        """
        self.target = f"unix:{folder / 's'}"
        self.http = f"127.0.0.1:{free_port()}"
        self.data = folder / "data"
        self._log = folder / "service.log"
        ours = {
            "LISTEN": self.target,
            "HTTP_LISTEN": self.http,
            "DATA_DIR": str(self.data),
            "STATE_DIR": "none",
            "METRICS_LISTEN": "none",
            "OLLAMA_URL": backend_url,
            "DEFAULT_MODEL": MODEL,
            "SLOTS": str(SLOTS),
            **(settings or {}),
        }
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "OTEL_"))},
            **{f"UNISONO_{name}": value for name, value in ours.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, failpoints: str = "") -> None:
        """Starts it; `failpoints`: see adapters/journal/failpoints.py."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unisono", "serve"],
                env={**self._environ, "UNISONO_FAILPOINTS": failpoints},
                stderr=log,
                stdout=log,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The one that was started last."""
        if self._process is None:
            raise RuntimeError("the service was not started")
        return self._process

    async def wait_up(self, limit_s: float = 60.0) -> Up | None:
        """Waits until it answers; with how long that took. None: it ended before."""
        began = time.monotonic()
        async with grpc.aio.insecure_channel(self.target, options=CHANNEL) as channel:
            stub = pb_grpc.BatchInferenceStub(channel)
            while time.monotonic() - began < limit_s:
                if self.process.poll() is not None:
                    return None
                with contextlib.suppress(grpc.aio.AioRpcError):
                    _ = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=1.0)
                    return Up(time.monotonic() - began, self._waited_s())
                await asyncio.sleep(AGAIN_S)
        raise BrokenPromiseError(f"going again: it did not answer within {limit_s:g} s; see {self._log}")

    async def up(self) -> Up:
        """Starts it and waits until it answers."""
        self.start()
        found = await self.wait_up()
        if found is None:
            raise BrokenPromiseError(f"going again: the service ended by itself; see {self._log}")
        return found

    def _waited_s(self) -> float:
        """How long its main thread wanted a processor that others had; 0 where the system does not tell."""
        try:
            _, waited_ns, _ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        except (OSError, ValueError):
            return 0.0
        return int(waited_ns) / 1e9

    async def wait_dead(self, limit_s: float) -> bool:
        """Waits until it has ended; whether it has."""
        began = time.monotonic()
        while self.process.poll() is None:
            if time.monotonic() - began > limit_s:
                return False
            await asyncio.sleep(AGAIN_S)
        return True

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Ends it, and waits for its end; with its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def complaints(self) -> list[str]:
        """Lines of its log that speak of an error or a defect."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return [line for line in lines if '"level": "error"' in line or line.startswith("Traceback")]

    @property
    def last_line(self) -> str:
        """The last line of its log."""
        return ["", *self._log.read_text(errors="replace").splitlines()][-1]

    async def sample(self, stub: pb_grpc.BatchInferenceStub) -> Sample | None:
        """How large it is now; None where it is not there."""
        try:
            info = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=2.0)
            resident = self._resident_bytes()
        except (grpc.aio.AioRpcError, OSError):
            return None
        return Sample(
            memory_bytes=resident,
            folder_bytes=folder_bytes(self.data),
            running=info.running_batches,
            in_flight=sum(one.in_flight for one in info.backends),
            queued=sum(one.queued for one in info.backends),
        )

    def _resident_bytes(self) -> int:
        """What its process has in memory; raises OSError where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), "0"))


def folder_bytes(folder: Path) -> int:
    """What the files of a folder hold, those that are deleted meanwhile left out."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
