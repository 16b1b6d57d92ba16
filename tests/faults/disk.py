"""Fills the disk in truth: a small file system in memory, which only root may mount.

    python -m tests.faults.disk [--times N] [--mib N]

While a batch runs, a file takes all the room that is left. Then a submit is refused with RESOURCE_EXHAUSTED, and so
is an upload; what is kept can be read. When the file is deleted, all that was accepted goes on by itself. Every other
time, the service is killed meanwhile, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx

from tests.faults import validators
from tests.faults.backend import MODEL, SLOTS, StandIn
from tests.faults.callers import Caller, all_histories, batch_ids, dial, events_of, items_of, results_of
from tests.faults.history import Asked
from tests.faults.service import AGAIN_S, Service
from tests.faults.streams import Streamer
from tests.faults.table import Figures, SkippedError, report
from tests.faults.uploads import Uploader
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

_MIB = 1024 * 1024
# Healed: what waited goes on so soon after there is room.
HEALS_S = 10.0
_REACHED_S = 30.0
_MOST_FILLERS = 100
# The journal's files have room inside themselves: so much is submitted until that is gone, too.
_LARGE_BYTES = 512 * 1024


@dataclass
class Found:
    """What a run showed."""

    refused: int = 0
    uploads_refused: int = 0
    # Reads while there was no room, and the longest of them, in seconds.
    reads: int = 0
    longest_read_s: float = 0.0
    kills: int = 0
    starts_refused: int = 0
    # From there being room to the next result of what waited, and to the next accepted submit.
    heals_s: list[float] = field(default_factory=list)
    accepts_s: list[float] = field(default_factory=list)
    results: int = 0
    batches: int = 0


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[None]:
    """Mounts a file system in memory at a folder; raises SkippedError."""
    folder.mkdir()
    if os.geteuid() != 0:
        raise SkippedError("only root may mount a file system")
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SkippedError("there is no mount command") from error
    if done.returncode != 0:
        raise SkippedError(f"mount says: {done.stderr.strip()}")
    try:
        yield
    finally:
        _ = subprocess.run(["umount", "-l", str(folder)], check=True)


async def run(*, times: int = 5, mib: int = 96, tell: Callable[[str], None] = lambda _: None) -> Found:
    """Fills the disk so often; raises BrokenPromiseError, SkippedError."""
    found = Found()
    folder = Path(tempfile.mkdtemp(prefix="unisono-disk-"))
    with small_disk(folder / "small", mib):
        async with StandIn(folder) as backend:
            data = folder / "small" / "data"
            service = Service(folder, backend.url, {"DATA_DIR": str(data)})
            callers = [
                Caller(service.target, items=60),
                Streamer(service.target, items=40),
                Uploader(service.http, items=20),
            ]
            calling = asyncio.gather(*(caller.run() for caller in callers))
            try:
                _ = await service.up()
                for number in range(times):
                    await _fill_and_heal(service, callers, folder / "small" / "filler", found, number=number)
                    tell(f"{number + 1} of {times}")
                    if calling.done():
                        _ = calling.result()
                for caller in callers:
                    caller.stop()
                async with asyncio.timeout(120.0):
                    _ = await calling
                await _check(callers, service, backend, found)
            finally:
                _ = calling.cancel()
                _ = await asyncio.gather(calling, return_exceptions=True)
                _ = service.kill()
            promise("well", not service.complaints, service.complaints[:3])
    shutil.rmtree(folder)
    return found


async def _fill_and_heal(service: Service, callers: list[Caller], filler: Path, found: Found, *, number: int) -> None:
    async with dial(service.target) as channel:
        stub: Any = pb_grpc.BatchInferenceStub(channel)
        ended = await _until_one_has_ended(callers)
        _fill(filler)
        fillers = await _fill_journal(stub, f"full-{number}", found)
        await _upload_refused(service, found)
        await _readable(stub, ended, found)
        # Whatever was accepted waits, and nothing else comes.
        if number % 2:
            _ = service.kill()
            found.kills += 1
            service.start()
            if await service.wait_up() is None:
                # A start writes down whose journal it is. Without room for that, it ends and says so.
                promise("refuses", "cannot grow" in service.last_line, service.last_line)
                found.starts_refused += 1
            else:
                await _readable(stub, ended, found)
        seen = _answered(callers)
        await asyncio.to_thread(filler.unlink)
        if service.process.poll() is not None:
            _ = await service.up()
        began = time.monotonic()
        await _until(lambda: _answered(callers) > seen, "nothing goes on where there is room again")
        found.heals_s.append(time.monotonic() - began)
        promise("heals", found.heals_s[-1] <= HEALS_S, f"went on after {found.heals_s[-1]:.1f} s")
        request = _large(f"full-{number}-{len(fillers)}")
        while (accepted := await _submitted(stub, request)) is None:
            promise("heals", time.monotonic() - began < HEALS_S, "submits are still refused")
            await asyncio.sleep(AGAIN_S)
        found.accepts_s.append(time.monotonic() - began)
        for batch_id in (*fillers, accepted):
            await _delete(stub, batch_id)


async def _until_one_has_ended(callers: list[Caller]) -> str:
    """A batch that has ended, and another that runs: with the first one's id."""
    histories = callers[0].histories
    before = sum(one.is_over for one in histories)
    await _until(lambda: sum(one.is_over for one in histories) > before and histories[-1].ends, "no batch ended")
    return next(one.batch_id for one in reversed(histories) if one.is_over)


def _fill(filler: Path) -> None:
    """Takes all the room that there is, to the byte."""
    with filler.open("wb", buffering=0) as file:
        size = _MIB
        while size:
            try:
                _ = file.write(b"x" * size)
            except OSError:
                size //= 2


async def _fill_journal(stub: Any, name: str, found: Found) -> list[str]:
    """Submits until that is refused; answers with the batches that found room before."""
    accepted: list[str] = []
    while (batch_id := await _submitted(stub, _large(f"{name}-{len(accepted)}"))) is not None:
        accepted.append(batch_id)
        promise("refuses", len(accepted) < _MOST_FILLERS, "submits are accepted on a full disk")
    found.refused += 1
    return accepted


async def _submitted(stub: Any, request: pb.SubmitBatchRequest) -> str | None:
    """The batch's id; None: it was refused, for want of room."""
    try:
        answer = await stub.SubmitBatch(request)
    except grpc.aio.AioRpcError as error:
        is_told = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        promise("refuses", is_told, f"{error.code()}: {error.details()}")
        return None
    return str(answer.batch.batch_id)


async def _delete(stub: Any, batch_id: str) -> None:
    """Ends and deletes a batch that was for its size only."""
    _ = await stub.CancelBatch(pb.CancelBatchRequest(batch_id=batch_id))
    while True:
        try:
            _ = await stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch_id))
        except grpc.aio.AioRpcError as error:
            promise("heals", error.code() is grpc.StatusCode.FAILED_PRECONDITION, error.details())
            await asyncio.sleep(AGAIN_S)
        else:
            return


async def _upload_refused(service: Service, found: Found) -> None:
    async with httpx.AsyncClient(base_url=f"http://{service.http}", timeout=20.0) as client:
        files = {"file": ("requests.jsonl", b"x" * _LARGE_BYTES)}
        response = await client.post("/v1/files", files=files, data={"purpose": "batch"})
    promise("refuses", response.status_code >= 400 and "error" in response.json(), response.text[:200])
    found.uploads_refused += 1


async def _readable(stub: Any, batch_id: str, found: Found) -> None:
    """All that can be read is."""
    for read in (
        lambda: stub.GetBatch(pb.GetBatchRequest(batch_id=batch_id)),
        lambda: results_of(stub, batch_id),
        lambda: events_of(stub, batch_id),
        lambda: batch_ids(stub),
    ):
        began = time.monotonic()
        async with asyncio.timeout(_REACHED_S):
            promise("readable", await read(), "there is nothing")
        found.reads += 1
        found.longest_read_s = max(found.longest_read_s, time.monotonic() - began)


def _large(request_id: str) -> pb.SubmitBatchRequest:
    items = items_of("large", 2)
    items[0].chat.messages[0].content = "x" * _LARGE_BYTES
    return pb.SubmitBatchRequest(config=pb.BatchConfig(model=MODEL, request_id=request_id), items=items)


def _answered(callers: list[Caller]) -> int:
    return sum(len(history.ends) for history in all_histories(callers))


async def _until(is_so: Callable[[], object], what: str) -> None:
    began = time.monotonic()
    while not is_so():
        promise("going again", time.monotonic() - began < _REACHED_S, what)
        await asyncio.sleep(AGAIN_S)


async def _check(callers: list[Caller], service: Service, backend: StandIn, found: Found) -> None:
    async with dial(service.target) as channel:
        stub = pb_grpc.BatchInferenceStub(channel)
        for caller in callers:
            await caller.finish(stub)
        ids = await batch_ids(stub)
    histories = all_histories(callers)
    for history in histories:
        validators.well(history)
    validators.listed(histories, ids)
    calls = backend.calls()
    for prompt in [one for one in calls if one.startswith(("x", "large"))]:
        del calls[prompt]
    # Answers that found no room are in memory, all of them, when the service is killed.
    waiting = max(len(one.wanted) for one in histories) * len(callers)
    asked = Asked(calls=calls, service_kills=found.kills, a_kill=2 * SLOTS + waiting)
    _ = validators.accounted(histories, asked)
    found.results = sum(len(one.ends) for one in histories)
    found.batches = len(histories)


def figures(found: Found) -> Figures:
    """What a run showed, for people."""
    return [
        ("disk full", f"{len(found.heals_s)} times, {found.kills} of them with a kill -9 and a start meanwhile"),
        ("of these starts", f"{found.starts_refused} ended, saying that there is no room"),
        ("refused", f"{found.refused} submits with RESOURCE_EXHAUSTED, {found.uploads_refused} uploads"),
        ("read meanwhile", f"{found.reads} times, the longest took {found.longest_read_s * 1e3:.0f} ms"),
        ("healed", f"next result after {max(found.heals_s):.2f} s, next submit after {max(found.accepts_s):.2f} s"),
        ("results", f"{found.results:,} of {found.batches} batches: none lost, none twice, none changed"),
    ]


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.disk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=5, help="times that it is full (default 5)")
    parser.add_argument("--mib", type=int, default=96, help="its size in MiB (default 96)")
    given = parser.parse_args()
    return report("disk", lambda tell: run(times=given.times, mib=given.mib, tell=tell), figures)


if __name__ == "__main__":
    sys.exit(main())
