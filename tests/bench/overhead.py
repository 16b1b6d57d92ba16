"""How much longer one item takes through the service than from the backend itself.

    python -m tests.bench.overhead [--json] [--rounds N] [--pause S]

The backend is the stand-in, in a process of its own, which answers at once with one token. In turn, one item goes
through the service (RunBatch over gRPC, from its first byte to the end of the stream), one through its drop-in,
and one goes to the backend directly (POST /api/chat over httpx with a warm pool, streamed, to its end). Of the last
two the time to the first token is told too, which is what the drop-in promises. Caller and service share a process,
so that what is measured is their work, one after the other. With a pause before each round, nothing is remembered of
the one before.
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

# What the service may add, at the median; and the drop-in to the first token.
TARGET_MS = 5.0
FIRST_TOKEN_TARGET_MS = 3.0
THROUGH, DIRECTLY = "through the service", "directly"
DROP_IN_FIRST, DIRECTLY_FIRST = "drop-in, first token", "directly, first token"
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


async def _post(client: httpx.AsyncClient, number: int) -> tuple[float, float]:
    """When the first token was there, and the last line; ms since it was sent."""
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": f"number {number}"}],
        "options": {"num_predict": 1},
    }
    began, first, last = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/api/chat", json=body) as answer:
        async for line in answer.aiter_lines():
            first, last = first or time.perf_counter(), line
    if '"done":true' not in last:
        raise RuntimeError(f"no answer: {last}")
    return (first - began) * 1e3, (time.perf_counter() - began) * 1e3


async def measure(*, rounds: int = 200, pause_s: float = 0.0) -> list[Row]:
    """Measures all ways in turn; the first rounds are thrown away."""
    times: dict[str, list[float]] = {THROUGH: [], DIRECTLY: [], "drop-in": [], DROP_IN_FIRST: [], DIRECTLY_FIRST: []}
    with stand_in() as url:
        settings = Settings(
            listen="127.0.0.1:0", http_listen="127.0.0.1:0", ollama_url=url, drain=0.0, state_dir="none"
        )
        async with (
            running(settings, with_http=True) as service,
            grpc.aio.insecure_channel(service.target) as channel,
            httpx.AsyncClient(base_url=url, trust_env=False) as client,
            httpx.AsyncClient(base_url=service.http_url, trust_env=False) as drop_in,
        ):
            batch = pb_grpc.BatchInferenceStub(channel)
            warm_up = _WARM_UP if not pause_s else 1
            for number in range(warm_up + rounds):
                await asyncio.sleep(pause_s)
                found: dict[str, float] = {}
                found[DROP_IN_FIRST], found["drop-in"] = await _post(drop_in, number)
                found[DIRECTLY_FIRST], found[DIRECTLY] = await _post(client, number)
                began = time.perf_counter()
                await _through(batch, number)
                found[THROUGH] = (time.perf_counter() - began) * 1e3
                if number >= warm_up:
                    for way, took_ms in found.items():
                        times[way].append(took_ms)
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
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of rest before each round (default 0)")
    wanted = parser.parse_args()
    about = machine()
    print("measuring …", file=sys.stderr)
    rows = asyncio.run(measure(rounds=wanted.rounds, pause_s=wanted.pause))
    median = {row.way: row.median_ms for row in rows}
    added = median[THROUGH] - median[DIRECTLY]
    added_first = median[DROP_IN_FIRST] - median[DIRECTLY_FIRST]
    if wanted.json:
        print(
            json.dumps(
                {
                    "machine": about,
                    "target_ms": TARGET_MS,
                    "added_ms": added,
                    "first_token_target_ms": FIRST_TOKEN_TARGET_MS,
                    "first_token_added_ms": added_first,
                    "rows": [asdict(row) for row in rows],
                },
                indent=1,
            )
        )
        return
    print("Time for one item whose answer is there at once")
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'way':<21}  {'median ms':>9}  {'quartiles ms':>14}")
    for row in rows:
        quartiles = f"{row.lower_quartile_ms:.2f}-{row.upper_quartile_ms:.2f}"
        print(f"{row.way:<21}  {row.median_ms:>9.2f}  {quartiles:>14}")
    for what, more, most in (
        ("added by the service", added, TARGET_MS),
        ("added by the drop-in, to the first token", added_first, FIRST_TOKEN_TARGET_MS),
    ):
        print(f"{what}: {more:.2f} ms; target: at most {most:.0f} ms: {'met' if more <= most else 'MISSED'}")


if __name__ == "__main__":
    main()
