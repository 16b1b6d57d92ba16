"""The backend service of the examples, as a process: a short soak, and what it does when things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from tests.bench.soak import (
    MAX_SLOPE,
    MIB,
    Example,
    Figures,
    Run,
    Sample,
    broken,
    example_at,
    memory,
    soak,
    table,
)
from tests.integration.service import LIMIT_S, House, house


class Caller:
    """One who asks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, *prompts: Any) -> Caller:
        """Questions, numbered from 0."""
        lines = [json.dumps({"id": n, "prompt": prompt}) for n, prompt in enumerate(prompts)]
        return await self.say("".join(f"{line}\n" for line in lines))

    async def say(self, text: str) -> Caller:
        """Anything."""
        self._writer.write(text.encode())
        await self._writer.drain()
        return self

    async def hear(self, count: int) -> dict[int, dict[str, Any]]:
        """So many answers, by number."""
        async with asyncio.timeout(LIMIT_S):
            told = [json.loads(await self._reader.readline()) for _ in range(count)]
        return {each["id"]: each for each in told}

    async def is_left(self) -> bool:
        """Whether the connection ends, with nothing more said."""
        async with asyncio.timeout(LIMIT_S):
            return await self._reader.read() == b""

    def leave(self) -> None:
        """Hangs up."""
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def calling(here: Example) -> AsyncGenerator[Callable[[], Awaitable[Caller]]]:
    """Makes callers of the example, whose connections end with the context."""
    writers: list[asyncio.StreamWriter] = []

    async def call() -> Caller:
        reader, writer = await asyncio.open_connection(here.host, here.port)
        writers.append(writer)
        return Caller(reader, writer)

    try:
        yield call
    finally:
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def example(*arguments: str) -> AsyncGenerator[tuple[House, Example, Callable[[], Awaitable[Caller]]]]:
    """The example over a service with four slots, and what makes callers of it."""
    async with (
        house(settings={"slots": 4}) as h,
        example_at(h.target, "--model", "fake", *arguments) as here,
        calling(here) as call,
    ):
        yield h, here, call
        if here.process.returncode is None:
            here.process.terminate()


async def ended(here: Example, *, tells: str) -> int:
    """The exit code of the example, which says something in its log."""
    async with asyncio.timeout(LIMIT_S):
        code = await here.process.wait()
        while not any(tells in line for line in here.log):  # noqa: ASYNC110 - its log is read beside
            await asyncio.sleep(0.005)
    return code


# -- For a long time -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_half_a_minute() -> None:
    """50 questions a second, a cut every six seconds: each has its answer once, memory is flat, all ends well."""
    run = Run(seconds=30, cut_every=6)
    figures = await soak(run, print)
    print("\n".join(table(figures, run)))  # noqa: T201
    assert broken(figures, run) == []
    assert figures.answered == 30 * 50 + run.at_the_end
    assert figures.drained > 0
    assert figures.batches >= 2


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_unisono_is_killed_again_and_again() -> None:
    """Its batches are lost each time: each question has its answer once all the same."""
    run = Run(seconds=15, cut_every=5, restart_every=3)
    figures = await soak(run, print)
    assert figures.restarts >= 1
    assert broken(figures, run) == []


def test_what_the_soak_calls_broken() -> None:
    """A double, a loss, an item computed twice, a leak, a bad end: each is told."""
    run = Run(seconds=100, cut_every=50)

    def figures(**fields: Any) -> Figures:
        flat = [Sample(float(second), 40 * MIB, 80 * MIB) for second in range(100)]
        good: dict[str, Any] = {
            "asked": 10,
            "answered": 10,
            "computed": 10,
            "cuts": 2,
            "exit_code": 0,
            "samples": flat,
        }
        return Figures(**(good | fields))

    leak = [Sample(float(second), 40 * MIB, 80 * MIB + second * MIB // 5) for second in range(100)]
    peak = [Sample(float(second), (60 if second == 70 else 40) * MIB, 80 * MIB) for second in range(100)]
    warm = [Sample(float(second), min(second, 20) * 2 * MIB, 80 * MIB) for second in range(100)]
    assert broken(figures(), run) == broken(figures(samples=warm), run) == []
    for wrong, words in (
        ({"wrong": ["3 was answered twice"]}, "1 answers were wrong: 3 was answered twice"),
        ({"answered": 9, "missing": 1}, "1 have no answer"),
        ({"computed": 11}, "11 items were computed for 10 questions"),
        ({"exit_code": None}, "ended with None"),
        ({"cuts": 1}, "cut 1 times only"),
        ({"samples": leak}, "the memory of Unisono is not flat"),
        ({"samples": peak}, "the memory of the example is not flat"),
    ):
        (told,) = broken(figures(**wrong), run)
        assert words in told
    assert memory(leak, lambda sample: sample.service, 100).slope == pytest.approx(12 * MIB, rel=0.05)
    # A slow one is seen where there is time enough.
    slow = [Sample(float(second), 40 * MIB, 80 * MIB + second * MIB // 180) for second in range(600)]
    assert memory(slow, lambda sample: sample.service, 600).slope > MAX_SLOPE
    assert not memory(slow, lambda sample: sample.service, 600).is_flat
    assert memory(slow[:200], lambda sample: sample.service, 200).is_flat
    assert broken(figures(computed=12, restarts=1, samples=leak), run) == []


# -- When things go wrong --------------------------------------------------------------------------------------


async def test_what_callers_are_told() -> None:
    """Answers as they come; an error of an item, and what cannot be sent, to whom it concerns alone."""
    async with example() as (_, _, call):
        caller = await (await call()).ask("[[say=one]]", 17, "\ud800", "[[say=two]]", "")
        told = await caller.hear(5)
        assert told[0]["answer"] == "one"
        assert told[3]["answer"] == "two"
        assert told[1]["error"].startswith("INVALID_REQUEST")
        assert told[2]["error"].startswith("INVALID_REQUEST")
        assert "error" in told[4]


async def test_a_caller_that_does_not_speak_as_it_should() -> None:
    """It is left, and so is one that hangs up; the others are answered."""
    async with example() as (h, _, call):
        h.fake.hold_passes()
        gone = await (await call()).ask("[[say=nobody]]")
        other = await (await call()).ask("[[say=here]]")
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        for nonsense in ("nonsense\n", '{"id": 1}\n', "[]\n"):
            wrong = await (await call()).say(nonsense)
            assert await wrong.is_left()
        gone.leave()
        h.fake.release_passes()
        assert (await other.hear(1))[0]["answer"] == "here"
        assert (await (await other.ask("[[say=again]]")).hear(1))[0]["answer"] == "again"


async def test_work_that_comes_faster_than_it_is_answered() -> None:
    """A caller with many open questions is not read on; all are answered when the backend is."""
    async with example() as (h, _, call):
        h.fake.hold_passes()
        caller = await (await call()).ask(*(f"[[say={n}]]" for n in range(700)))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        batch = next(iter(h.batches._batches.values()))
        async with asyncio.timeout(LIMIT_S):
            while batch.accepted_count < 500:  # noqa: ASYNC110 - there is nothing to wait for
                await asyncio.sleep(0.005)
        # What is not read is not sent: another caller's question is the next that comes.
        other = await (await call()).ask("[[say=other]]")
        async with asyncio.timeout(LIMIT_S):
            while batch.accepted_count < 501:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        h.fake.release_passes()
        assert (await other.hear(1))[0]["answer"] == "other"
        told = await caller.hear(700)
        assert [told[n]["answer"] for n in range(700)] == [str(n) for n in range(700)]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_it_drains(by: signal.Signals) -> None:
    """Told to stop, it answers what it took, and takes no more."""
    async with example() as (h, here, call):
        h.fake.hold_passes()
        caller = await (await call()).ask(*(f"[[say={n}]]" for n in range(20)))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        here.process.send_signal(by)
        async with asyncio.timeout(LIMIT_S):
            while not any("stopping: 20 questions" in line for line in here.log):  # noqa: ASYNC110 - as `ended`
                await asyncio.sleep(0.005)
        with pytest.raises(OSError):
            _ = await call()
        _ = await caller.ask("[[say=too late]]")
        h.fake.release_passes()
        told = await caller.hear(20)
        assert [told[n]["answer"] for n in range(20)] == [str(n) for n in range(20)]
        assert await caller.is_left()
        assert await ended(here, tells="all are answered") == 0
        assert len(h.work) == 20


async def test_a_drain_that_takes_too_long() -> None:
    """What is not answered in time is cancelled, and the exit code tells."""
    async with example("--drain", "0.5") as (h, here, call):
        h.fake.hold_passes()
        caller = await (await call()).ask("[[say=never]]", "[[say=never]]")
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        here.process.terminate()
        assert await ended(here, tells="2 questions were not answered within 0.5 s") == 1
        assert await caller.is_left()
        await h.until_running(0)
        h.fake.release_passes()


async def test_unisono_stays_away() -> None:
    """It says so, with the address, and ends: whoever supervises it hears of it."""
    async with example_at("127.0.0.1:9", "--give-up-after", "0.3") as here, calling(here) as call:
        _ = await (await call()).ask("[[say=one]]")
        assert await ended(here, tells="127.0.0.1:9 could not be reached for 0.3 s") == 1
