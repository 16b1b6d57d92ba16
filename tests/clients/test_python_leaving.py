"""Leaving: by `break`, an exception, the end of the client or of the program. Each cancels the batch, and at once.

The garbage collector is off: what counts on it does not pass.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from tests.clients.served import served
from unisono_client import Client, ClosedError, Options, Result, Run, State, sync

PACKAGE = Path(__file__).resolve().parents[2] / "clients" / "python" / "src"
# Each takes far longer than a test.
SLOW = [f"[[tokens=100000]] {n}" for n in range(3)]
ITEMS = ["[[say=first]]", *SLOW]
OPTIONS: Options = {"num_ctx": 200_000}
LIMIT_S = 20
# "At once": the service keeps a batch whose caller is merely lost for more than two minutes.
SOON_S = 5


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Where a service listens."""
    with served(pass_s=0.002) as found:
        yield found


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    """For the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
async def client(target: str) -> AsyncGenerator[Client, None]:
    """A client."""
    async with Client(target) as made, asyncio.timeout(LIMIT_S):
        yield made


def run_of(client: Client, name: str, **config: object) -> Run:
    """A run whose batch can be found by its name: `request_id` joins the same batch."""
    return client.run(ITEMS, request_id=name, model="first", options=OPTIONS, **config)  # type: ignore[arg-type]


async def states(target: str, batch_id: str) -> list[State]:
    """How the items of a batch ended, as another client hears it; raises TimeoutError where they go on."""
    async with Client(target) as other, asyncio.timeout(SOON_S):
        return [result.state async for result in other.attach(batch_id)]


CANCELLED = [State.COMPLETED, *[State.CANCELLED] * len(SLOW)]


async def test_break_and_exception_cancel(client: Client, target: str) -> None:
    """A plain loop that is left by `break`, or by an exception of its body."""
    ids: list[str] = []

    async def broken() -> None:
        async for result in (run := run_of(client, "break")):
            ids.append(run.batch_id)
            del run
            assert result.content == "first"
            break

    async def raised() -> None:
        async for _ in (run := run_of(client, "raise")):
            ids.append(run.batch_id)
            del run
            raise ZeroDivisionError

    await broken()
    with pytest.raises(ZeroDivisionError):
        await raised()
    for each in ids:
        assert await states(target, each) == CANCELLED
    assert len(ids) == 2


async def test_a_run_that_is_kept_goes_on(client: Client, target: str) -> None:
    """`break` alone does not end what a variable holds; `aclose`, `async with` and the client's end do."""
    run = run_of(client, "kept")
    async for _ in run:
        break
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            _ = await anext(run)
    await run.cancel()
    assert [result.state async for result in run] == [State.CANCELLED] * 3
    with pytest.raises(ClosedError, match="make another one"):
        _ = aiter(run)
    with pytest.raises(StopAsyncIteration):
        _ = await anext(run)
    async with run_of(client, "with") as left:
        async for _ in left:
            break
    assert await states(target, left.batch_id) == CANCELLED
    with pytest.raises(ClosedError, match="closed"):
        _ = await anext(left)


async def test_a_closed_client_cancels_what_is_open(target: str) -> None:
    """Runs, sessions and streams; but not what was to go on without its caller."""
    async with asyncio.timeout(LIMIT_S):
        async with Client(target) as client:
            run, detached = run_of(client, "open"), run_of(client, "detached", on_disconnect="DETACH")
            session = client.session(release={"size": 1}, model="first", options=OPTIONS)
            await session.add(*ITEMS)
            for each in (run, detached):
                _ = await anext(each)
            _ = await session.take()
        for batch_id in (run.batch_id, session.batch_id):
            assert await states(target, batch_id) == CANCELLED
        with pytest.raises(TimeoutError):
            _ = await states(target, detached.batch_id)
        async with Client(target) as client:
            _ = await client.cancel(detached.batch_id)
        with pytest.raises(ClosedError):
            _ = await anext(run)


async def test_a_cancelled_wait_loses_nothing(client: Client) -> None:
    """`anext` that is given up, again and again: all results come, once."""
    run = client.run([f"[[tokens={3 + n % 7}]] {n}" for n in range(60)], model="first", max_concurrency=4)
    found: list[Result] = []
    given_up = 0
    while True:
        try:
            found.append(await asyncio.wait_for(anext(run), 0.004))
        except TimeoutError:
            given_up += 1
        except StopAsyncIteration:
            break
    assert given_up > 3
    assert sorted(result.place for result in found) == list(range(60))
    assert run.report is not None


def test_sync_break_and_exception_cancel(target: str) -> None:
    """The same, in plain loops."""
    with sync.Client(target) as client:
        ids: list[str] = []
        for _ in (run := client.run(ITEMS, model="first", options={"num_ctx": 200_000})):
            ids.append(run.batch_id)
            del run
            break

        def raised() -> None:
            for _ in (run := client.run(ITEMS, model="first", options={"num_ctx": 200_000})):
                ids.append(run.batch_id)
                del run
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            raised()
        for each in ids:
            assert asyncio.run(states(target, each)) == CANCELLED
        assert len(ids) == 2
        run = client.run(ITEMS, model="first", options={"num_ctx": 200_000})
        assert next(run).content == "first"
    assert asyncio.run(states(target, run.batch_id)) == CANCELLED
    done = list(ended := sync.Client(target).run(["[[say=x]]"]))
    assert len(done) == 1
    with pytest.raises(ClosedError):
        _ = iter(ended)


PROGRAMS = {
    "async": """
import asyncio, sys
from unisono_client import Client
async def main():
    client = Client(sys.argv[1])
    run = client.run({items}, model="first", options={options})
    async for _ in run:
        print(run.batch_id, flush=True)
        return
asyncio.run(main())
""",
    "sync": """
import sys
from unisono_client.sync import Client
run = Client(sys.argv[1]).run({items}, model="first", options={options})
for _ in run:
    print(run.batch_id, flush=True)
    break
""",
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_end_of_the_program_cancels(target: str, kind: str) -> None:
    """A program that ends, and closes nothing."""
    program = PROGRAMS[kind].format(items=ITEMS, options=OPTIONS)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, target],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < LIMIT_S / 2
    assert asyncio.run(states(target, done.stdout.strip())) == CANCELLED
