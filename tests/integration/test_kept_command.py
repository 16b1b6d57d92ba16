"""Kept batches from the command line, as processes beside the real service."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.clients.behaviour import answered, prompts
from tests.clients.programs import Program, Run, write_lines
from tests.clients.proxy import Proxy
from tests.integration.service import LIMIT_S, House, chat, chats, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.edge.cli import follower, watch
from unisono.edge.cli.connect import Wish
from unisono.edge.cli.errors import StopError
from unisono.edge.cli.terminal import Terminal

COMMAND = (sys.executable, "-m", "unisono")
PROGRAM = Program(command=COMMAND)


def environment(target: str) -> dict[str, str]:
    """This machine's settings left out."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "UNISONO_"))}
    return {**usual, "UNISONO_SERVER": target}


async def unisono(target: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Runs a command to its end: its exit code, and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *map(str, arguments), env=environment(target), stdout=-1, stderr=-1, stdin=-3
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def answer(h: House, count: int) -> None:
    """Lets the stand-in, whose passes are held, answer so many items in all."""
    while answered(h) < count:
        await h.fake.step()


def lasting(text: str) -> dict[str, Any]:
    """Lines of results by id, without what differs from run to run."""
    found = {}
    for line in map(json.loads, text.splitlines()):
        for name in ("timings_ms", "passes", "shared_with", "release_reason", "usage"):
            line.pop(name, None)
        if "custom_id" in line:
            del line["id"]
        if response := line.get("response"):
            del response["request_id"], response["body"]["id"]
            for name in ("created", "created_at", "completed_at"):
                response["body"].pop(name, None)
            for each in response["body"].get("output", ()):
                del each["id"]
        found[line.get("custom_id") or line["id"]] = line
    return found


# -- From the beginning to the end -----------------------------------------------------------------------------


async def test_a_batch_from_its_submission_to_its_end(tmp_path: Path) -> None:
    """Submitted, watched, told of, written, tried again, deleted; results are those of `run`."""
    lines: list[dict[str, Any]] = [
        *prompts(3),
        {"custom_id": "o", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}},
        {"id": "gone", "prompt": "x", "model": "absent"},
        {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "Hi"}},
        {"custom_id": "r", "url": "/v1/responses", "body": {"input": "Hi"}},
        {"custom_id": "g", "url": "/v1/completions", "body": {"prompt": "Hi", "model": "absent"}},
    ]
    file = write_lines(tmp_path / "batch.jsonl", lines)
    async with house(keeps_in=tmp_path / "kept") as h:
        code, out, err = await unisono(h.target, "submit", file, "--model", "fake", "--metadata", "job=night")
        assert code == 0, err
        (batch_id,) = out.split()
        code, out, err = await unisono(h.target, "watch", batch_id)
        assert (code, out) == (1, ""), err
        assert "6 completed, 2 failed" in err
        assert "gone: failed, MODEL_NOT_FOUND" in err
        code, out, err = await unisono(h.target, "status", batch_id)
        assert (code, err) == (1, "")
        assert "  state            completed\n" in out
        assert "  items            6 of 8 completed, 2 failed\n" in out
        assert "  metadata         job=night\n" in out
        code, out, _ = await unisono(h.target, "results", batch_id)
        assert code == 1
        _, of_run, _ = await unisono(h.target, "run", file, "--model", "fake")
        assert lasting(out) == lasting(of_run)
        assert lasting(out)["r"]["response"]["body"]["object"] == "response"
        code, out, _ = await unisono(h.target, "results", batch_id, "--failed")
        assert set(lasting(out)) == {"gone", "g"}
        code, out, err = await unisono(h.target, "retry", batch_id)
        (child,) = out.split()
        code, again, _ = await unisono(h.target, "results", child, "--follow")
        # In the forms of the lines that the first batch was submitted in.
        assert {name: line.get("custom_id") for name, line in lasting(again).items()} == {"gone": None, "g": "g"}
        code, out, err = await unisono(h.target, "list", "--state", "completed")
        assert [line.split()[0] for line in out.splitlines()] == ["BATCH", child, batch_id]
        code, out, err = await unisono(h.target, "list", "--limit", "1", "--json")
        assert [json.loads(line)["parent_id"] for line in out.splitlines()] == [batch_id]
        assert "--limit shows more" in err
        assert (await unisono(h.target, "delete", batch_id))[0] == 0
        code, out, err = await unisono(h.target, "status", batch_id)
        assert (code, out) == (2, "")
        assert "(BATCH_NOT_FOUND)\n`unisono list` names" in err
        # The parent's forms are gone with it; the rest is there.
        code, out, _ = await unisono(h.target, "results", child)
        assert set(lasting(out)) == {"gone", "g"}


async def test_submit_waits_where_it_is_told_to(tmp_path: Path) -> None:
    """The id is printed at once, and nothing else on standard output."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(4))
    async with house(keeps_in=tmp_path / "kept") as h:
        code, out, err = await unisono(h.target, "submit", file, "--model", "fake", "--wait")
        assert code == 0, err
        (batch,) = (await h.stub.ListBatches(pb.ListBatchesRequest())).batches
    assert out == f"{batch.batch_id}\n"
    assert "Forward passes\n" in err
    assert "  items            4 completed\n" in err


async def test_the_same_request_is_the_same_batch(tmp_path: Path) -> None:
    """Under the same name; other content is refused as wrong usage."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(1))
    words = ("--model", "fake", "--request-id", "night-7")
    async with house(keeps_in=tmp_path / "kept") as h:
        first, again = [await unisono(h.target, "submit", file, *words) for _ in range(2)]
        _ = write_lines(file, prompts(2))
        other = await unisono(h.target, "submit", file, *words)
        assert len((await h.stub.ListBatches(pb.ListBatchesRequest())).batches) == 1
    assert first[:2] == again[:2]
    assert other[:2] == (2, "")
    assert "(REQUEST_ID_REUSED)" in other[2]


# -- What is larger than a message -----------------------------------------------------------------------------

LARGE = 40


def large_lines(path: Path, count: int = LARGE) -> Path:
    """A file of so many MiB, a bad line among them."""
    lines = [{"id": f"q{n}", "prompt": f"{n} ".ljust(2**20, "x"), "max_tokens": 1} for n in range(count)]
    return write_lines(path, [*lines[:3], {"id": "bad"}, *lines[3:]])


async def test_a_file_of_many_messages_is_one_batch(tmp_path: Path) -> None:
    """From a file and from a pipe; the same request again is the same batch, while it runs and when it has ended."""
    file = large_lines(tmp_path / "large.jsonl")
    words = ("--model", "fake", "--request-id", "night-8", "--metadata", "job=night")
    async with house(keeps_in=tmp_path / "kept") as h:
        code, out, err = await unisono(h.target, "submit", file, *words)
        assert code == 1, err
        batch = await h.kept(out.strip())
        assert (batch.counts.accepted, batch.input_open, dict(batch.metadata)) == (LARGE, False, {"job": "night"})
        assert err.count("line 4: ") == 1
        assert f"{LARGE} items kept by the service" in err
        assert (await unisono(h.target, "submit", file, *words))[1] == out
        seen = await h.attach(batch.batch_id)
        assert set(seen.states()) == {f"q{n}" for n in range(LARGE)}
        assert set(seen.states().values()) == {"COMPLETED"}
        assert (await unisono(h.target, "submit", file, *words))[1] == out
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "submit", "-", "--model", "fake", env=environment(h.target), stdin=-1, stdout=-1, stderr=-1
        )
        piped, told = await asyncio.wait_for(process.communicate(file.read_bytes()), 60)
        assert process.returncode == 1, told
        assert (await h.kept(piped.decode().strip())).counts.accepted == LARGE
        assert len((await h.stub.ListBatches(pb.ListBatchesRequest())).batches) == 2


async def test_a_large_file_goes_on_where_the_connection_was_cut(tmp_path: Path) -> None:
    """Again and again; each item is there once."""
    file = large_lines(tmp_path / "large.jsonl")
    async with house(keeps_in=tmp_path / "kept", starts_away=True) as h, Proxy(h.target) as proxy:
        running = asyncio.ensure_future(unisono(proxy.target, "submit", file, "--model", "fake"))
        for accepted in (5, 15, 30):
            async with asyncio.timeout(60):
                while not any(  # noqa: ASYNC110 - nobody tells
                    one.counts.accepted >= accepted
                    for one in (await h.stub.ListBatches(pb.ListBatchesRequest())).batches
                ):
                    await asyncio.sleep(0.01)
            proxy.cut()
        code, out, err = await running
        assert code == 1, err
        assert "the connection was lost" in err
        batch = await h.kept(out.strip())
        assert (batch.counts.accepted, batch.input_open) == (LARGE, False)
        assert await h.cancel(batch.batch_id) == (LARGE, 0)


async def test_items_are_cancelled(tmp_path: Path) -> None:
    """Some, then the others; an item that is none is wrong usage."""
    async with house(keeps_in=tmp_path) as h:
        h.fake.hold_passes()
        batch = await h.submit(chats(4, num_predict=5))
        code, _, err = await unisono(h.target, "delete", batch.batch_id)
        assert code == 2
        assert "(BATCH_RUNNING)\n`unisono watch` follows it" in err
        assert (await unisono(h.target, "cancel", batch.batch_id, "nobody"))[0] == 2
        assert await unisono(h.target, "cancel", batch.batch_id, "i3") == (0, "", "unisono: 1 item cancelled\n")
        code, _, err = await unisono(h.target, "cancel", batch.batch_id)
        assert (code, err) == (0, "unisono: 3 items cancelled; 1 had ended\n")
        h.fake.release_passes()
        code, out, _ = await unisono(h.target, "results", batch.batch_id, "--follow", "--failed")
        assert code == 1
        assert {json.loads(line)["state"] for line in out.splitlines()} == {"cancelled"}


async def test_a_service_that_keeps_nothing(tmp_path: Path) -> None:
    """What to do is told; the exit code is that of wrong usage."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(1))
    async with house() as h:
        code, out, err = await unisono(h.target, "submit", file, "--model", "fake")
    assert (code, out) == (2, "")
    assert "UNISONO_DATA_DIR" in err


@pytest.mark.parametrize(
    "command", ["status {id}", "list", "list --json", "results {id}", "submit {file}", "retry {id}"]
)
async def test_a_full_disk_behind_standard_output(tmp_path: Path, command: str) -> None:
    """It is told in a line, and the exit code says that not all went well; of what was kept, the id is told too."""
    file = write_lines(tmp_path / "batch.jsonl", [{"id": "gone", "prompt": "x", "model": "absent"}])
    async with house(keeps_in=tmp_path / "kept") as h:
        batch = await h.submit([chat("gone", model="absent")])
        _ = await h.attach(batch.batch_id)
        words = command.format(id=batch.batch_id, file=file).split()
        full = os.open("/dev/full", os.O_WRONLY)
        process = await asyncio.create_subprocess_exec(
            *(*COMMAND, *words), env=environment(h.target), stdin=-3, stdout=full, stderr=-1
        )
        os.close(full)
        _, told = await asyncio.wait_for(process.communicate(), LIMIT_S)
        newest = (await h.stub.ListBatches(pb.ListBatchesRequest())).batches[0]
    err = told.decode()
    assert process.returncode == 1
    assert "cannot be written" in err
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1
    if words[0] in ("submit", "retry"):
        assert f"batch {newest.batch_id} is kept" in err


async def test_a_standard_output_that_is_closed(tmp_path: Path) -> None:
    """There is nowhere to write results to: that is told, with what to do."""
    async with house(keeps_in=tmp_path) as h:
        batch = await h.submit(chats(1))
        _ = await h.attach(batch.batch_id)
        script = 'exec "$@" >&-'
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", script, "sh", *COMMAND, "results", batch.batch_id, env=environment(h.target), stderr=-1
        )
        _, told = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 2
    assert told.decode() == "Standard output is closed: name a file for the results with --output.\n"


# -- While it runs ---------------------------------------------------------------------------------------------


async def test_results_so_far_and_the_others_as_they_come(tmp_path: Path) -> None:
    """Each once; a file holds the same."""
    async with house(keeps_in=tmp_path / "kept", num_parallel=2, settings={"slots": 2}) as h:
        h.fake.hold_passes()
        batch = await h.submit(chats(6, num_predict=2))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
        file = tmp_path / "answers.jsonl"
        file.write_text("of yesterday\n")
        assert (await unisono(h.target, "results", batch.batch_id, "-o", file))[0] == 0
        assert not file.read_bytes()
        await answer(h, 2)
        async with asyncio.timeout(LIMIT_S):
            while (await h.kept(batch.batch_id)).counts.completed < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        code, out, err = await unisono(h.target, "results", batch.batch_id)
        assert (code, len(out.splitlines())) == (0, 2)
        assert "2 of 6 items have ended so far; --follow waits for the others" in err
        async with PROGRAM.started("results", batch.batch_id, "--follow", "--server", h.target, target="") as run:
            await run.until_lines(2)
            h.fake.release_passes()
            assert await run.exit_code() == 0, run.told
        assert sorted(run.ids) == [f"i{n}" for n in range(6)]
        assert (await unisono(h.target, "results", batch.batch_id, "-o", file))[0] == 0
        assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == run.ids


async def test_results_that_were_there_before_make_nothing_look_faster(tmp_path: Path) -> None:
    """The speed that is shown is the batch's, and not that at which its results are read again."""
    async with house(keeps_in=tmp_path, num_parallel=2, pass_s=0.02) as h:
        batch = await h.submit(chats(6, num_predict=20))
        _ = await h.attach(batch.batch_id)
        ended = await h.kept(batch.batch_id)
        _, _, told = await unisono(h.target, "results", batch.batch_id, "--follow")
    took_s = (ended.ended_at.ToNanoseconds() - ended.started_at.ToNanoseconds()) / 1e9
    shown = re.search(r"6 of 6 done, ([0-9,]+) tokens/s", told)
    assert shown is not None, told
    assert 0 < int(shown[1].replace(",", "")) <= 120 / took_s + 1


async def test_watching_is_left_and_joined_again(tmp_path: Path) -> None:
    """An interrupt ends the command alone; the next one goes on from where the batch stands."""
    async with house(keeps_in=tmp_path, num_parallel=2, settings={"slots": 2}) as h:
        h.fake.hold_passes()
        batch = await h.submit(chats(4, num_predict=2))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
        async with PROGRAM.started("watch", batch.batch_id, "--server", h.target, target="") as run:
            await run.until_told("0 of 4 done")
            run.interrupt()
            assert await run.exit_code() == 130, run.told
        assert f"goes on; unisono watch {batch.batch_id} joins it again" in run.told
        assert "Traceback" not in run.told
        await answer(h, 2)
        async with asyncio.timeout(LIMIT_S):
            while (await h.kept(batch.batch_id)).counts.completed < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        async with PROGRAM.started("watch", batch.batch_id, "--server", h.target, target="") as run:
            await run.until_told("2 of 4 done")
            h.fake.release_passes()
            assert await run.exit_code() == 0, run.told
        assert "0 of 4 done" not in run.told
        assert "  i3    │" in run.told
        assert "  items            4 completed" in run.told


async def test_a_cut_connection_is_opened_again(tmp_path: Path) -> None:
    """By watch and by results; no result comes twice."""
    async with (
        house(keeps_in=tmp_path, num_parallel=2, settings={"slots": 2}) as h,
        Proxy(h.target) as proxy,
        PROGRAM.started("watch", (batch := await held_batch(h)), "--server", proxy.target, target="") as watching,
        PROGRAM.started("results", batch, "-f", "--server", proxy.target, target="") as writing,
    ):
        await watching.until_told("of 6 done")
        for count in (2, 4):
            await answer(h, count)
            await writing.until_lines(count)
            proxy.cut()
            for run in (watching, writing):
                await until_regained(run, proxy.cuts)
        h.fake.release_passes()
        assert await watching.exit_code() == 0, watching.told
        assert await writing.exit_code() == 0, writing.told
    assert sorted(writing.ids) == [f"i{n}" for n in range(6)]
    assert watching.told.count("the connection was lost") == 2
    assert "6 completed" in watching.told


async def until_regained(run: Run, times: int) -> None:
    """Returns once the connection was opened again for so many times."""
    await run.until(lambda: run.told.count("is there again") == times, "a new connection")


async def held_batch(h: House) -> str:
    """Six items, whose passes are held."""
    h.fake.hold_passes()
    batch_id = (await h.submit(chats(6, num_predict=2))).batch_id
    await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
    return batch_id


async def test_the_service_is_started_again_meanwhile(tmp_path: Path) -> None:
    """The command goes on with the successor; nothing is missing, and nothing comes twice."""
    settings = {"slots": 2}
    async with Proxy("127.0.0.1:1") as proxy:
        watching: Run
        async with house(keeps_in=tmp_path, num_parallel=2, settings=settings) as h:
            proxy.move_to(h.target)
            batch = await held_batch(h)
            starting = [
                PROGRAM.started(name, batch, *more, "--server", proxy.target, target="")
                for name, *more in (("watch",), ("results", "--follow"))
            ]
            watching, writing = [await each.__aenter__() for each in starting]
            await watching.until_told("of 6 done")
            await answer(h, 2)
            await writing.until_lines(2)
        for run in (watching, writing):
            await run.until_told("the connection was lost")
        async with house(keeps_in=tmp_path, num_parallel=2, settings=settings) as h:
            proxy.move_to(h.target)
            assert await watching.exit_code() == 0, watching.told
            assert await writing.exit_code() == 0, writing.told
            assert (await h.kept(batch)).restarts == 1
            code, out, _ = await unisono(h.target, "status", batch)
            assert code == 0
            assert "completed; the service was started again once meanwhile" in out
        for each in starting:
            _ = await each.__aexit__(None, None, None)
    assert sorted(writing.ids) == [f"i{n}" for n in range(6)]
    assert set(writing.states) == {"completed"}
    assert "the connection is there again" in watching.told
    assert "  items            6 completed" in watching.told


async def test_a_service_that_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once the time is over, it is told how to go on; the exit code says that nobody is there."""
    monkeypatch.setattr(watch, "GIVE_UP_AFTER_S", 0.3)
    monkeypatch.setattr(follower, "GIVE_UP_AFTER_S", 0.3)
    async with house(keeps_in=tmp_path, num_parallel=2, settings={"slots": 2}) as h, Proxy(h.target) as proxy:
        batch = await held_batch(h)
        options = watch.WatchOptions(wish=Wish(server=proxy.target), batch_id=batch)
        watching = asyncio.create_task(watch.watch(options, Terminal.standard()))
        async with asyncio.timeout(LIMIT_S):
            while "of 6 done" not in capfd.readouterr().err:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            proxy.is_away = True
            proxy.cut()
            with pytest.raises(StopError) as stopped:
                _ = await watching
        h.fake.release_passes()
    assert stopped.value.code == 3
    assert stopped.value.lines[-1] == f"  unisono watch {batch}"
    assert "for 300 ms" in stopped.value.lines[1]


@pytest.mark.parametrize("has_ended", [False, True])
async def test_the_beginning_of_a_long_batch_is_not_read_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    has_ended: bool,  # noqa: FBT001
) -> None:
    """Figures are those of the whole batch all the same."""
    monkeypatch.setattr(watch, "_REPLAYED_EVENTS", 3)
    async with house(keeps_in=tmp_path, num_parallel=2, settings={"slots": 2}) as h:
        batch = await held_batch(h)
        await answer(h, 4)
        async with asyncio.timeout(LIMIT_S):
            while (await h.kept(batch)).counts.completed < 4:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        if has_ended:
            h.fake.release_passes()
            _ = await h.attach(batch)
        options = watch.WatchOptions(wish=Wish(server=h.target), batch_id=batch)
        watching = asyncio.create_task(watch.watch(options, Terminal.standard()))
        told = ""
        async with asyncio.timeout(LIMIT_S):
            while "of 6 done" not in told:
                told += capfd.readouterr().err
                await asyncio.sleep(0.01)
            h.fake.release_passes()
            assert await watching == 0
    told += capfd.readouterr().err
    assert f"{6 if has_ended else 4} of 6 done" in told
    assert "  items            6 completed" in told


async def test_failures_of_a_long_batch_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first few, though its beginning is not read again; the rest are counted."""
    monkeypatch.setattr(watch, "_REPLAYED_EVENTS", 3)
    async with house(keeps_in=tmp_path) as h:
        batch = await h.submit([*chats(2, num_predict=1), *(chat(f"gone-{n}", model="absent") for n in range(12))])
        _ = await h.attach(batch.batch_id)
        options = watch.WatchOptions(wish=Wish(server=h.target), batch_id=batch.batch_id)
        assert await watch.watch(options, Terminal.standard()) == 1
    told = capfd.readouterr().err
    assert told.count("failed, MODEL_NOT_FOUND") == 10
    assert "  … and 2 more" in told
    assert "  items            2 completed, 12 failed" in told


class Screen:
    """A terminal, and what is shown on it."""

    def __init__(self) -> None:
        self._controller, self.terminal = pty.openpty()
        _ = fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self._bytes = bytearray()
        self._changed = asyncio.Event()
        self._is_open = True
        asyncio.get_running_loop().add_reader(self._controller, self._read)

    @property
    def shown(self) -> str:
        """All that was written to it."""
        return self._bytes.decode(errors="replace")

    def _read(self) -> None:
        try:
            data = os.read(self._controller, 65536)
        except OSError:  # the other end was closed
            data = b""
        self._bytes.extend(data)
        if not data:
            asyncio.get_running_loop().remove_reader(self._controller)
        self._changed.set()

    async def until(self, text: str) -> None:
        """Returns once that is shown."""
        async with asyncio.timeout(LIMIT_S):
            while text not in self.shown:
                self._changed.clear()
                _ = await self._changed.wait()

    def close(self) -> None:
        """Hangs up."""
        if self._is_open:
            self._is_open = False
            asyncio.get_running_loop().remove_reader(self._controller)
            os.close(self._controller)


@asynccontextmanager
async def on_a_screen(target: str, *arguments: str) -> AsyncGenerator[tuple[asyncio.subprocess.Process, Screen]]:
    """A command on a terminal of its own; ended, if it has not ended."""
    screen = Screen()
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *arguments),
        env={**environment(target), "TERM": "xterm-256color"},
        stdin=screen.terminal,
        stdout=screen.terminal,
        stderr=screen.terminal,
    )
    os.close(screen.terminal)
    try:
        yield process, screen
    finally:
        if process.returncode is None:
            process.kill()
            _ = await process.wait()
        screen.close()


async def test_a_terminal_shows_the_map_while_the_batch_runs(tmp_path: Path) -> None:
    """Above the bar, in colour; and whole at the end."""
    async with house(keeps_in=tmp_path, num_parallel=2, pass_s=0.02) as h:
        batch = (await h.submit(chats(6, num_predict=100))).batch_id
        async with on_a_screen(h.target, "watch", batch) as (process, screen):
            await screen.until("Forward passes")
            assert "Report" not in screen.shown
            assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
            await screen.until("  items            6 completed")
    assert "\x1b[36m" in screen.shown


@pytest.mark.usefixtures("heeds_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["watch", "results --follow"])
async def test_a_signal_leaves_the_terminal_as_it_was(tmp_path: Path, command: str, number: signal.Signals) -> None:
    """The cursor is shown again, it is told that the batch goes on, and the exit code names the signal."""
    async with house(keeps_in=tmp_path, num_parallel=2, settings={"slots": 2}) as h:
        batch = await held_batch(h)
        name, *more = command.split()
        async with on_a_screen(h.target, name, batch, *more) as (process, screen):
            await screen.until("0/6")
            process.send_signal(number)
            assert await asyncio.wait_for(process.wait(), LIMIT_S) == 128 + number
            await screen.until("goes on; unisono")
        h.fake.release_passes()
    assert screen.shown.rindex("\x1b[?25h") > screen.shown.rindex("\x1b[?25l")
    assert "Traceback" not in screen.shown


# -- A local run that was broken off ---------------------------------------------------------------------------


async def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """With --resume: what stands in its output is not asked again, and what it tore is left out."""
    file = write_lines(tmp_path / "batch.jsonl", prompts(8))
    output = tmp_path / "answers.jsonl"
    words = ("run", file, "--model", "fake", "--output", output, "--no-map")
    async with house(num_parallel=2, settings={"slots": 2}) as h:
        h.fake.hold_passes()
        async with PROGRAM.started(*words, "--server", h.target, target="") as run:
            await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=LIMIT_S)
            await answer(h, 3)
            async with asyncio.timeout(LIMIT_S):
                while not output.exists() or output.read_bytes().count(b"\n") < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            run.process.send_signal(signal.SIGKILL)
            assert await run.exit_code() == -signal.SIGKILL
        (batch_id,) = h.batches._batches
        _ = await h.cancel(batch_id)
        h.fake.release_passes()
        await h.until_running(0)
        before = [json.loads(line)["id"] for line in output.read_text().splitlines()]
        with output.open("ab") as stream:
            stream.write(b'{"id":"i7","index":7,"sta')
        asked = len(h.work)
        code, _, err = await unisono(h.target, *words, "--resume")
        assert code == 0, err
        assert len(h.work) - asked == 8 - len(before)
        assert f"{len(before)} items are answered in {output}" in err
        assert "its last line, which was broken off, is left out" in err
        code, _, err = await unisono(h.target, *words, "--resume")
        assert (code, len(h.work) - asked) == (0, 8 - len(before))
        assert "nothing is left to do: 8 of 8 items are answered" in err
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids[: len(before)] == before
    assert sorted(ids) == [f"i{n}" for n in range(8)]


async def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    """Its new line stands below the old one, which stays; also of OpenAI's lines."""
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    lines = [
        {"custom_id": "good", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "bad", "url": "/v1/chat/completions", "body": {**body, "model": "absent"}},
    ]
    file, output = write_lines(tmp_path / "batch.jsonl", lines), tmp_path / "answers.jsonl"
    words = ("run", file, "--model", "fake", "-o", output, "--resume", "--order", "input")
    async with house() as h:
        assert (await unisono(h.target, *words))[0] == 1
        file.write_text(file.read_text().replace("absent", "fake"))
        code, _, err = await unisono(h.target, *words)
        assert code == 0, err
        assert len(h.work) == 2
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["custom_id"], line["response"] is not None) for line in found] == [
        ("good", True),
        ("bad", False),
        ("bad", True),
    ]
