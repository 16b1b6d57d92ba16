"""How close together a wave of requests arrives: held and released, beside `asyncio.gather` over httpx.

    python -m tests.bench.release [--json] [--rounds N] [--sizes 8 64 256]

What is measured is the time from the first to the last request at the receiving server, which is a process of its
own (`receiver.py`): a request has arrived when its last byte was received there, which is when an inference server
would begin with it. Three ways of sending the same POST of about 1 kB are measured in turn, in one run:

- held: each request on its own connection, all but its last byte sent; then one loop releases them;
- fresh pool: `asyncio.gather` over an `httpx.AsyncClient` that was just made, without a limit of connections;
- warm pool: the same once more with that client, which now holds an idle connection for every request.

Beside it stands the time from the word "go" (the release; the call of `gather`) to the last arrival. The server
answers when all of a wave have arrived, so answering does not slow arriving. The held way is measured more often,
because it is quick. Client and server share the machine's cores, as the service and Ollama may.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpcore
import httpx

from tests.bench.receiver import receiver
from unisono.adapters.held import HeldTransport, parse_endpoint, release

SIZES = (8, 64, 256)
HELD, FRESH, WARM = "held", "fresh pool", "warm pool"
# Held releases for each round of the slow ways.
HELD_PER_ROUND = 5
LIMIT_S = 60.0
# Medians in ms that a held release shall not exceed.
TARGETS_MS = {64: 1.0, 256: 4.0}
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 190}]}).encode()

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Row:
    """The times of one way of sending, for one number of requests, in ms."""

    size: int
    way: str
    times_ms: tuple[float, ...]
    # From the word "go" to the last arrival.
    from_go_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.times_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile."""
        if len(self.times_ms) < 2:
            return self.times_ms[0], self.times_ms[0]
        first, _, third = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return first, third


# The spread of a wave's arrivals, and the time from the word "go" to the last of them, in ms.
Times = tuple[float, float]


def _times(go_ns: int, arrivals_ns: Sequence[int]) -> Times:
    return (max(arrivals_ns) - min(arrivals_ns)) / 1e6, (max(arrivals_ns) - go_ns) / 1e6


async def send_held(port: int, size: int) -> Times:
    """Stages and releases a wave."""
    transport = HeldTransport(parse_endpoint(f"127.0.0.1:{port}", default_port=port), backend="bench")
    path = f"/wave/{next(_numbers)}/{size}"
    held = await asyncio.gather(*[transport.stage(path, BODY) for _ in range(size)])
    go_ns = time.monotonic_ns()
    release(held)
    return _times(go_ns, [int(b"".join([chunk async for chunk in one.chunks()])) for one in held])


async def send_pooled(port: int, size: int) -> tuple[Times, Times]:
    """Sends a wave through a fresh pool, and once more through the same pool."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    times = []
    async with httpx.AsyncClient(limits=limits, timeout=LIMIT_S, trust_env=False) as client:
        for _ in range(2):
            url = f"http://127.0.0.1:{port}/wave/{next(_numbers)}/{size}"
            go_ns = time.monotonic_ns()
            answers = await asyncio.gather(*[client.post(url, content=BODY) for _ in range(size)])
            times.append(_times(go_ns, [int(answer.text) for answer in answers]))
    return times[0], times[1]


async def measure(
    *, sizes: Sequence[int] = SIZES, rounds: int = 7, held_per_round: int = HELD_PER_ROUND, progress: bool = False
) -> list[Row]:
    """Measures all ways for all sizes, in turn; a first round is thrown away."""
    times: dict[tuple[int, str], list[Times]] = {(s, w): [] for s in sizes for w in (HELD, FRESH, WARM)}
    with receiver() as port:
        for number in range(rounds + 1):
            for size in sizes:
                if progress:
                    print(f"\rround {number} of {rounds}, {size} requests   ", end="", file=sys.stderr, flush=True)
                async with asyncio.timeout(LIMIT_S * 2):
                    held = [await send_held(port, size) for _ in range(held_per_round)]
                    fresh, warm = await send_pooled(port, size)
                gc.collect()
                if number:
                    times[size, HELD] += held
                    times[size, FRESH].append(fresh)
                    times[size, WARM].append(warm)
    if progress:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    return [
        Row(size=size, way=way, times_ms=tuple(t for t, _ in found), from_go_ms=tuple(t for _, t in found))
        for (size, way), found in times.items()
    ]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "httpx": httpx.__version__,
        "httpcore": httpcore.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text: medians, quartiles, extremes, and how many times the held release's median."""
    held = {row.size: row.median_ms for row in rows if row.way == HELD}
    heads = ("requests", "sent by", "median ms", "quartiles ms", "min-max ms", "× held", "go to last ms", "runs")
    widths = (8, -10, 9, 19, 19, 7, 13, 4)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.ljust(-w) if w < 0 else c.rjust(w) for c, w in zip(cells, widths, strict=True))

    lines = [line(heads)]
    for row in rows:
        low, high = row.quartiles_ms
        cells = (
            str(row.size),
            row.way,
            f"{row.median_ms:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{min(row.times_ms):.2f}-{max(row.times_ms):.2f}",
            f"{row.median_ms / held[row.size]:.1f}",
            f"{statistics.median(row.from_go_ms):.2f}",
            str(len(row.times_ms)),
        )
        lines.append(line(cells))
    for size, target in TARGETS_MS.items():
        if size in held:
            verdict = "met" if held[size] <= target else "MISSED"
            lines.append(f"target: held, {size} requests, at most {target:.0f} ms: {verdict} ({held[size]:.2f} ms)")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.release", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of requests")
    wanted = parser.parse_args()
    about = machine()
    rows = asyncio.run(measure(sizes=wanted.sizes, rounds=wanted.rounds, progress=True))
    if wanted.json:
        found = [asdict(row) | {"median_ms": row.median_ms, "quartiles_ms": row.quartiles_ms} for row in rows]
        print(json.dumps({"machine": about, "targets_ms": TARGETS_MS, "rows": found}, indent=1))
    else:
        print("Time from the first to the last request at the receiving server")
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(table(rows))


if __name__ == "__main__":
    main()
