"""What a kept batch takes in memory while it runs: 200 MiB of lines through OpenAI's Batch API, over a stand-in.

    python -m tests.bench.kept [--lines N] [--mib N] [--tokens N]

The service is a process of its own. Printed is what it takes at each stage, beyond what it took before the upload.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import httpx

from tests.faults.backend import StandIn
from tests.faults.service import Service

_LOOK_S = 0.05


def resident_mib(pid: int) -> float:
    """What a process takes at this moment, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has ended")


class Watch:
    """The most that a process takes while something happens."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.most_mib = 0.0
        self._task = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        while True:
            self.most_mib = max(self.most_mib, resident_mib(self._pid))
            await asyncio.sleep(_LOOK_S)

    def stage(self) -> float:
        """The most since the last stage."""
        most, self.most_mib = max(self.most_mib, resident_mib(self._pid)), 0.0
        return most

    def stop(self) -> None:
        """Looks no more."""
        _ = self._task.cancel()


def write_lines(path: Path, lines: int, size: int, tokens: int) -> None:
    """A file of so many conversations, each of about so many bytes."""
    with path.open("w") as file:
        for number in range(lines):
            body = {
                "model": "first",
                "max_tokens": tokens,
                "messages": [{"role": "user", "content": f"{number} ".ljust(size - 160, "x")}],
            }
            line = {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            _ = file.write(json.dumps(line) + "\n")


async def run(*, lines: int, mib: int, tokens: int, folder: Path) -> dict[str, float]:
    """MiB above the beginning, by stage; and the seconds that the batch ran."""
    path = folder / "lines.jsonl"
    write_lines(path, lines, mib * 2**20 // lines, tokens)
    async with StandIn(folder, pass_s=0.0) as backend:
        service = Service(folder, backend.url)
        _ = await service.up()
        pid = service.process.pid
        async with httpx.AsyncClient(base_url=f"http://{service.http}", timeout=600) as client:
            # What the first of everything takes is no batch's.
            _ = await client.get("/v1/batches")
            watch = Watch(pid)
            before = resident_mib(pid)
            found: dict[str, float] = {"before": before}
            with path.open("rb") as file:
                sent = await client.post("/v1/files", files={"file": file}, data={"purpose": "batch"})
            found["upload"] = watch.stage() - before
            made = (
                await client.post(
                    "/v1/batches",
                    json={
                        "input_file_id": sent.json()["id"],
                        "endpoint": "/v1/chat/completions",
                        "completion_window": "24h",
                    },
                )
            ).json()
            began = time.monotonic()
            stage = "validating"
            while made["status"] in ("validating", "in_progress", "finalizing"):
                await asyncio.sleep(_LOOK_S)
                made = (await client.get(f"/v1/batches/{made['id']}")).json()
                if made["status"] != stage:
                    found[stage] = watch.stage() - before
                    stage = made["status"]
            found["seconds"] = time.monotonic() - began
            found["after"] = resident_mib(pid) - before
            watch.stop()
            print(made["status"], made["request_counts"])
        _ = service.kill()
    return found


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _ = parser.add_argument("--lines", type=int, default=50_000)
    _ = parser.add_argument("--mib", type=int, default=199)
    _ = parser.add_argument("--tokens", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kept") as name:
        found = asyncio.run(run(lines=asked.lines, mib=asked.mib, tokens=asked.tokens, folder=Path(name)))
    for stage, value in found.items():
        print(f"{stage:>12}: {value:8.1f} {'s' if stage == 'seconds' else 'MiB'}")


if __name__ == "__main__":
    main()
