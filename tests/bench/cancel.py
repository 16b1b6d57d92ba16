"""How long a cancelled batch's connections stay open at the backend.

    python -m tests.bench.cancel [--json] [--rounds N] [--size N]

A wave of calls is staged; for "held" it stays so, for "streaming" it is released and each call has read its first
line. Then all are aborted in one loop. What is measured is the time from the word "go" until the receiving server
(a process of its own, `receiver.py`) has seen each connection closed.

For "a batch" a whole batch runs through the service on the stand-in, every item is being answered, and CancelBatch
is called: measured from the call until the stand-in has no connection open. All three share a process here.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import grpc.aio
import httpx

from tests.bench.receiver import receiver
from tests.bench.release import BODY, LIMIT_S, machine
from tests.fakes.ollama import FakeOllama
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import item_pb2
from unisono.adapters.held import HeldTransport, parse_endpoint, release
from unisono.bootstrap import running
from unisono.config import Settings

HELD, STREAMING, BATCH = "held", "streaming", "a batch"
# A median in ms that closing shall not exceed.
TARGET_MS = 50.0

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times from the abort to the close, of all connections of all rounds, in ms."""

    state: str
    size: int
    median_ms: float
    slowest_ms: float
    count: int


async def cancel(port: int, size: int, state: str) -> list[float]:
    """Aborts a wave; returns each connection's time in ms."""
    transport = HeldTransport(parse_endpoint(f"127.0.0.1:{port}", default_port=port), backend="bench")
    wave = f"c{next(_numbers)}"
    calls = await asyncio.gather(*[transport.stage(f"/stream/{wave}/{size}", BODY) for _ in range(size)])
    readers = [call.chunks() for call in calls]
    if state == STREAMING:
        release(calls)
        for reader in readers:
            await anext(reader)
    go_ns = time.monotonic_ns()
    for call in calls:
        call.abort()
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(LIMIT_S):
        closed: list[int] = []
        while len(closed) < size:
            await asyncio.sleep(0.01)
            closed = (await client.get(f"http://127.0.0.1:{port}/closed/{wave}")).json()
    for reader in readers:
        await reader.aclose()
    return [(at_ns - go_ns) / 1e6 for at_ns in closed]


async def cancel_batches(size: int, rounds: int) -> list[float]:
    """Cancels whole batches by rpc; returns each one's time in ms until all its connections are closed."""
    message = item_pb2.Message(role=item_pb2.ROLE_USER, content="[[tokens=1000000]]")
    items = [item_pb2.Item(item_id=str(n), chat=item_pb2.ChatRequest(messages=[message])) for n in range(size)]
    request = pb.RunBatchRequest(config=pb.BatchConfig(model="fake"), items=items)
    found: list[float] = []
    async with FakeOllama(num_parallel=size, pass_s=0.005) as fake:
        settings = Settings(listen="127.0.0.1:0", ollama_url=fake.url, slots=size, drain=0.0, state_dir="none")
        async with running(settings) as service, grpc.aio.insecure_channel(service.target) as channel:
            batch = pb_grpc.BatchInferenceStub(channel)
            for _ in range(rounds + 1):
                events = batch.RunBatch(request)
                first = await anext(aiter(events))
                await fake.wait_for(lambda f: f.busy_slots == size, timeout_s=LIMIT_S)
                began = time.monotonic()
                _ = await batch.CancelBatch(pb.CancelBatchRequest(batch_id=first.event.accepted.batch_id))
                await fake.wait_for(lambda f: f.open_connections == 0, timeout_s=LIMIT_S)
                found.append((time.monotonic() - began) * 1e3)
                async for _ in events:
                    pass
    return found[1:]


async def measure(*, size: int = 64, rounds: int = 20) -> list[Row]:
    """Measures the states in turn; a first round is thrown away."""
    times: dict[str, list[float]] = {HELD: [], STREAMING: []}
    with receiver() as port:
        for number in range(rounds + 1):
            for state, found in times.items():
                taken = await cancel(port, size, state)
                found.extend(taken if number else ())
    times[BATCH] = await cancel_batches(size, rounds)
    return [
        Row(state=state, size=size, median_ms=statistics.median(t), slowest_ms=max(t), count=len(t))
        for state, t in times.items()
    ]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cancel", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count (default 20)")
    parser.add_argument("--size", type=int, default=64, help="calls that are cancelled together (default 64)")
    wanted = parser.parse_args()
    about = machine()
    print("measuring …", file=sys.stderr)
    rows = asyncio.run(measure(size=wanted.size, rounds=wanted.rounds))
    if wanted.json:
        print(json.dumps({"machine": about, "target_ms": TARGET_MS, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    print("Time from the abort of all calls until the server sees a connection closed")
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'calls':>6}  {'state':<10}  {'median ms':>9}  {'slowest ms':>10}  {'closes':>6}")
    for row in rows:
        print(f"{row.size:>6}  {row.state:<10}  {row.median_ms:>9.2f}  {row.slowest_ms:>10.2f}  {row.count:>6}")
    worst = max(row.median_ms for row in rows)
    print(f"target: at most {TARGET_MS:.0f} ms: {'met' if worst <= TARGET_MS else 'MISSED'} ({worst:.2f} ms)")


if __name__ == "__main__":
    main()
