"""`unisono run` over connections that are lost: it goes on with its batch, and nothing comes twice or is missing."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.clients.behaviour import answered, prompts
from tests.clients.programs import Program, Run, write_lines
from tests.clients.proxy import Proxy
from tests.fakes.ollama import Answer
from tests.integration.service import LIMIT_S, House, house
from unisono.edge.cli import run as command
from unisono.edge.cli.connect import Wish
from unisono.edge.cli.errors import ExitCode
from unisono.edge.cli.ports import StartedServer
from unisono.edge.cli.run import RunOptions
from unisono.edge.cli.terminal import Terminal

UNISONO = Program(command=(sys.executable, "-m", "unisono", "run", "--no-map"))


def _starts_none(**_: object) -> AbstractAsyncContextManager[StartedServer]:
    raise AssertionError("a service was started")


async def answer(h: House, count: int) -> None:
    """Lets the stand-in, whose passes are held, answer so many items in all."""
    while answered(h) < count:
        await h.fake.step()


async def until_regained(run: Run, times: int) -> None:
    """Returns once the connection was opened again for so many times."""
    await run.until(lambda: run.told.count("is there again") == times, "a new connection")


def is_whole(run: Run, count: int) -> bool:
    """Whether each item was answered, and told once."""
    return sorted(run.ids) == sorted(f"i{n}" for n in range(count)) and set(run.states) == {"completed"}


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("max_open_items", [4, 10_000], ids=["some_unsent", "all_sent"])
async def test_a_cut_connection_is_opened_again(tmp_path: Path, max_open_items: int, is_reset: bool) -> None:  # noqa: FBT001
    """Each item is told once and was computed once, whether or not all were sent; and what happened is said."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(12))
    settings = {"slots": 4, "max_open_items": max_open_items}
    async with house(num_parallel=4, settings=settings) as h, Proxy(h.target) as proxy:
        h.fake.hold_passes()
        proxy.is_reset = is_reset
        async with UNISONO.started("--model", "fake", "--server", proxy.target, file, target="") as run:
            await h.fake.wait_for(lambda fake: fake.busy_slots == 4, timeout_s=LIMIT_S)
            for count in (2, 5, 9):
                await answer(h, count)
                await run.until_lines(answered(h))
                proxy.cut()
                await until_regained(run, proxy.cuts)
            h.fake.release_passes()
            assert await run.exit_code() == 0, run.told
        assert len(h.work) == 12
    assert is_whole(run, 12)
    assert run.told.count("the connection was lost") == 3
    assert "12 completed" in run.told


@pytest.mark.parametrize("has_arrived", [True, False])
async def test_items_that_were_not_acknowledged_go_again(tmp_path: Path, has_arrived: bool) -> None:  # noqa: FBT001
    """Whether they had arrived, and only word of it was lost, or were lost themselves."""
    async with house(settings={"slots": 4}) as h, Proxy(h.target) as proxy:
        async with UNISONO.started("--model", "fake", "--server", proxy.target, "-", target="") as run:
            await run.say(*prompts(1))
            await run.until_lines(1)
            up = proxy.up
            proxy.swallows_up, proxy.swallows_down = not has_arrived, has_arrived
            await run.say({"id": "i1", "prompt": "[[tokens=5]]" + "x" * 2_000}, *prompts(3)[2:])
            async with asyncio.timeout(LIMIT_S):
                while answered(h) < 3 if has_arrived else proxy.up < up + 2_000:  # noqa: ASYNC110 - no one tells
                    await asyncio.sleep(0.005)
            proxy.cut()
            await run.until_lines(3)
            assert run.process.stdin is not None
            run.process.stdin.close()
            assert await run.exit_code() == 0, run.told
        assert len(h.work) == 3
    assert is_whole(run, 3)


async def test_a_cut_inside_an_answer_loses_none_of_it(tmp_path: Path) -> None:
    """A connection that is lost between the parts of a long answer: they are put together once."""
    text = "é" * 6_000_000
    file = write_lines(tmp_path / "batch.jsonl", [{"id": "long", "prompt": "long"}])
    async with house() as h, Proxy(h.target) as proxy:
        h.fake.answer("long", Answer(content=(text,)))
        proxy.cut_when(lambda proxy: proxy.down > 5_000_000)
        code, run = await UNISONO.run("--model", "fake", "--server", proxy.target, file, target="")
        assert proxy.cuts == 1
    assert code == 0, run.told
    assert [line["content"] for line in run.lines] == [text]


@pytest.mark.parametrize("before", [1, 3])
async def test_a_full_batch_that_was_cut(tmp_path: Path, before: int) -> None:
    """Credit that will never come is not waited for: what the batch does not take is told."""
    async with house(settings={"max_items": 3, "slots": 4}) as h, Proxy(h.target) as proxy:
        h.fake.hold_passes()
        async with UNISONO.started("--model", "fake", "--server", proxy.target, "-", target="") as run:
            await run.say(*prompts(3))
            await h.fake.wait_for(lambda fake: fake.busy_slots == 3, timeout_s=LIMIT_S)
            await answer(h, before)
            await run.until_lines(before)
            proxy.cut()
            h.fake.release_passes()
            await run.say(*prompts(5)[3:])
            assert run.process.stdin is not None
            run.process.stdin.close()
            assert await run.exit_code() == 1, run.told
    assert sorted(run.ids) == [f"i{n}" for n in range(5)]
    reasons = {line["id"]: line["error"]["reason"] for line in run.lines if "error" in line}
    assert reasons == {"i3": "BATCH_FULL", "i4": "BATCH_FULL"}


async def test_an_interrupt_while_the_connection_is_lost(tmp_path: Path) -> None:
    """It is not waited for; the exit code is that of an interrupt."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(2))
    async with house() as h, Proxy(h.target) as proxy:
        h.fake.hold_passes()
        async with UNISONO.started("--model", "fake", "--server", proxy.target, file, target="") as run:
            await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
            proxy.is_away = True
            proxy.cut()
            await run.until_told("the connection was lost")
            run.interrupt()
            assert await run.exit_code() == 130, run.told
        assert "no result        2 that had been sent" in run.told
        h.fake.release_passes()


@pytest.mark.usefixtures("heeds_hangup")
async def test_leaving_on_purpose_cancels_the_batch(tmp_path: Path) -> None:
    """The service keeps a batch whose caller is lost, so one that is left says so: by hang-up, as by Ctrl-C."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(2))
    async with house() as h:
        h.fake.hold_passes()
        async with UNISONO.started("--model", "fake", "--server", h.target, file, target="") as run:
            await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
            run.process.send_signal(signal.SIGHUP)
            assert await run.exit_code() == 128 + signal.SIGHUP, run.told
        assert run.states == ["cancelled"] * 2
        await h.until_running(0)


async def test_a_service_that_was_started_anew(tmp_path: Path) -> None:
    """It does not know the batch: that is told, and not tried again."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(2))
    async with house() as h, house() as successor, Proxy(h.target) as proxy:
        h.fake.hold_passes()
        async with UNISONO.started("--model", "fake", "--server", proxy.target, file, target="") as run:
            await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
            proxy.move_to(successor.target)
            proxy.cut()
            assert await run.exit_code() == 1, run.told
        h.fake.release_passes()
    assert "(BATCH_NOT_FOUND)" in run.told
    assert "was restarted, or has forgotten the batch" in run.told


async def test_another_stream_takes_the_batch(tmp_path: Path) -> None:
    """It is not taken back, nor cancelled: somebody goes on with it."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(2))
    async with house() as h:
        h.fake.hold_passes()
        async with UNISONO.started("--model", "fake", "--server", h.target, file, target="") as run:
            await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
            (batch_id,) = h.batches._batches
            other = await h.stream().reopen(batch_id)
            assert await run.exit_code() == 1, run.told
        h.fake.release_passes()
        seen = await (await other.half_close()).to_end()
        assert seen.states() == {"i0": "COMPLETED", "i1": "COMPLETED"}
    assert "(STREAM_REPLACED)" in run.told
    assert "the connection was lost" not in run.told


async def test_a_service_that_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once the time is over, it says where it was, and how to go on; which has the rest."""
    monkeypatch.setattr(command, "GIVE_UP_AFTER_S", 0.5)
    file = write_lines(tmp_path / "a batch.jsonl", prompts(2))
    async with house() as h, Proxy(h.target) as proxy:
        h.fake.hold_passes()
        output = str(tmp_path / "answers.jsonl")
        options = RunOptions(
            file=str(file), wish=Wish(server=proxy.target), model="fake", output=output, draw_map=False
        )
        running = asyncio.create_task(command.run(options, _starts_none, Terminal.standard()))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
        await answer(h, 1)
        async with asyncio.timeout(LIMIT_S):
            while not Path(output).exists() or "i0" not in Path(output).read_text():  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(0.005)
            proxy.is_away = True
            proxy.cut()
            assert await running == ExitCode.UNREACHABLE
        told = capfd.readouterr().err
        found = re.search(rf"--target {proxy.target} --resume (\S+) --after (\d+) '{file}'", told)
        assert found is not None, told
        assert "Or run the same command with --resume" in told
        h.fake.release_passes()
        rest = await h.attach(found[1], after=int(found[2]))
        assert rest.states() == {"i1": "COMPLETED"}
