"""How much longer one item takes through the service than from the backend itself.

    python -m tests.bench.overhead [--json] [--rounds N]

The backend is the stand-in, in a process of its own, which answers at once with one token. In turn, one item goes
through the service (RunBatch over gRPC, from its first byte to the end of the stream) and one goes to the backend
directly (POST /api/chat over httpx with a warm pool, streamed, to its end). Caller and service share a process, so
that what is measured is their work, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import grpc.aio
import httpx

from tests.bench.release import machine
from tests.fakes.ollama import FakeOllama
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import item_pb2
from unisono.bootstrap import running
from unisono.config import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

# What the service may add, at the median.
TARGET_MS = 5.0
_WARM_UP = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times of one way, in ms."""

    way: str
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        async with FakeOllama() as fake:
            pipe.send(fake.url)
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    with contextlib.suppress(EOFError):
        asyncio.run(serve())


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """The address of a stand-in in a process of its own, which ends with the context."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
        ours.send("done")
    finally:
        ours.close()
        process.join(10)


async def _through(batch: pb_grpc.BatchInferenceStub, number: int) -> None:
    item = item_pb2.Item(
        item_id="one",
        chat=item_pb2.ChatRequest(messages=[item_pb2.Message(role=item_pb2.ROLE_USER, content=f"number {number}")]),
        options=item_pb2.Options(num_predict=1),
    )
    async for response in batch.RunBatch(pb.RunBatchRequest(config=pb.BatchConfig(model="fake"), items=[item])):
        if response.event.HasField("result") and not response.event.result.HasField("completion"):
            raise RuntimeError(f"the item failed: {response.event.result.error}")


async def _direct(client: httpx.AsyncClient, number: int) -> None:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": f"number {number}"}],
        "options": {"num_predict": 1},
    }
    async with client.stream("POST", "/api/chat", json=body) as answer:
        lines = [line async for line in answer.aiter_lines()]
    if '"done":true' not in lines[-1]:
        raise RuntimeError(f"no answer: {lines}")


async def measure(*, rounds: int = 200) -> list[Row]:
    """Measures both ways in turn; the first rounds are thrown away."""
    times: dict[str, list[float]] = {"through the service": [], "directly": []}
    with stand_in() as url:
        settings = Settings(listen="127.0.0.1:0", ollama_url=url, drain=0.0, state_dir="none")
        async with (
            running(settings) as service,
            grpc.aio.insecure_channel(service.target) as channel,
            httpx.AsyncClient(base_url=url, trust_env=False) as client,
        ):
            batch = pb_grpc.BatchInferenceStub(channel)
            for number in range(_WARM_UP + rounds):
                for way, found in times.items():
                    began = time.perf_counter()
                    await (_direct(client, number) if way == "directly" else _through(batch, number))
                    if number >= _WARM_UP:
                        found.append((time.perf_counter() - began) * 1e3)
    return [_row(way, found) for way, found in times.items()]


def _row(way: str, found: list[float]) -> Row:
    lower, median, upper = statistics.quantiles(found, n=4)
    return Row(way=way, median_ms=median, lower_quartile_ms=lower, upper_quartile_ms=upper)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.overhead", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=200, help="rounds that count (default 200)")
    wanted = parser.parse_args()
    about = machine()
    print("measuring …", file=sys.stderr)
    rows = asyncio.run(measure(rounds=wanted.rounds))
    added = rows[0].median_ms - rows[1].median_ms
    if wanted.json:
        print(
            json.dumps(
                {
                    "machine": about,
                    "target_ms": TARGET_MS,
                    "added_ms": added,
                    "rows": [asdict(row) for row in rows],
                },
                indent=1,
            )
        )
        return
    print("Time for one item whose answer is there at once")
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'way':<20}  {'median ms':>9}  {'quartiles ms':>14}")
    for row in rows:
        quartiles = f"{row.lower_quartile_ms:.2f}-{row.upper_quartile_ms:.2f}"
        print(f"{row.way:<20}  {row.median_ms:>9.2f}  {quartiles:>14}")
    print(f"added: {added:.2f} ms; target: at most {TARGET_MS:.0f} ms: {'met' if added <= TARGET_MS else 'MISSED'}")


if __name__ == "__main__":
    main()
