"""10,000 items over one connection, against a stand-in that answers at once. Figures are printed: `pytest -s`."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tests.clients.proxy import Proxy
from tests.clients.served import served
from unisono_client import Client, Result

COUNT = 10_000
# The client is meant for 1,000 a second, which is printed and not asserted: a machine that is busy with other things
# has less, and a test must not fail for that. This bound is only for what is broken.
LEAST_PER_S = 150
LIMIT_S = 100


def say(what: str, count: int, took_s: float) -> None:
    """One line of figures."""
    print(f"{what}: {count:,} items in {took_s:.1f} s, {count / took_s:,.0f} a second; load {os.getloadavg()[0]:.1f}")  # noqa: T201


@pytest.mark.slow
async def test_all_is_written_before_anything_is_read() -> None:
    """10,000 items are added before the first result is read: no deadlock, and at least so many a second."""
    with served() as target:
        async with Client(target) as client, asyncio.timeout(LIMIT_S), client.session() as session:
            began = time.monotonic()
            for n in range(COUNT):
                await session.add(f"[[say=ok]] {n}")
            await session.close_input()
            say("added", COUNT, time.monotonic() - began)
            done = 0
            async for result in session:
                done += result.content == "ok"
            took_s = time.monotonic() - began
            say("answered", done, took_s)
    assert done == COUNT
    assert done / took_s > LEAST_PER_S


async def test_the_connection_is_cut_in_the_middle() -> None:
    """2,000 items, and the connection is cut five times among them: nothing is lost, the caller notices nothing."""
    with served() as target:
        async with Proxy(target) as proxy, Client(proxy.target) as client, asyncio.timeout(LIMIT_S):
            results: list[Result] = []
            began = time.monotonic()
            async for result in client.run([f"[[say=answer {n}]]" for n in range(2_000)]):
                results.append(result)
                if len(results) % 350 == 0:
                    proxy.cut()
            say(f"with {proxy.cuts} cuts", len(results), time.monotonic() - began)
    assert proxy.cuts == 5
    assert sorted((result.place, result.content) for result in results) == [(n, f"answer {n}") for n in range(2_000)]
