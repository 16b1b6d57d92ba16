"""How long a cancelled batch's connections stay open at the backend.

    python -m tests.bench.cancel [--json] [--rounds N] [--size N]

A wave of calls is staged; for "held" it stays so, for "streaming" it is released and each call has read its first
line. Then all are aborted in one loop. What is measured is the time from the word "go" until the receiving server
(a process of its own, `receiver.py`) has seen each connection closed.
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

import httpx

from tests.bench.receiver import receiver
from tests.bench.release import BODY, LIMIT_S, machine
from unisono.adapters.held import HeldTransport, parse_endpoint, release

HELD, STREAMING = "held", "streaming"
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


async def measure(*, size: int = 64, rounds: int = 20) -> list[Row]:
    """Measures both states in turn; a first round is thrown away."""
    times: dict[str, list[float]] = {HELD: [], STREAMING: []}
    with receiver() as port:
        for number in range(rounds + 1):
            for state, found in times.items():
                taken = await cancel(port, size, state)
                found.extend(taken if number else ())
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
