"""The command as a process: signals, pipes and terminals, which nothing in this process can stand for."""

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.unit.cli.fake_server import FakeServer, Script, serving

ROOT = Path(__file__).parents[3]
LIMIT_S = 60


@asynccontextmanager
async def process(*arguments: str, **streams: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """`unisono` with these arguments; killed if it is still there at the end."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'service'}{os.pathsep}{ROOT}", "GRPC_VERBOSITY": "NONE"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        environment.pop(name, None)
    environment.update(streams.pop("env", {}))  # type: ignore[call-overload]
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.unit.cli.program", *arguments,
        env=environment, cwd=ROOT, **{"stdout": -1, "stderr": -1, "stdin": -3, **streams},  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def ended(started: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """Its exit code and what it wrote."""
    out, err = await asyncio.wait_for(started.communicate(), LIMIT_S)
    assert started.returncode is not None
    return started.returncode, (out or b"").decode(), (err or b"").decode()


def batch(path: Path, *prompts: str) -> str:
    """A file of prompts."""
    path.write_text("".join(json.dumps({"id": f"i{n}", "prompt": prompt}) + "\n" for n, prompt in enumerate(prompts)))
    return str(path)


async def held(server: FakeServer) -> None:
    """Returns once an item hangs."""
    await asyncio.wait_for(server.is_holding.wait(), LIMIT_S)


@pytest.mark.usefixtures("heeds_hangup")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
async def test_an_interrupt_cancels_the_batch(tmp_path: Path, number: int, code: int) -> None:
    """The service is told, what finished is kept, the rest comes back as cancelled, and the report says so."""
    file = batch(tmp_path / "batch.jsonl", "done", "hold", "hold", "waiting " * 20)
    async with serving(Script(slots=2)) as server, process("run", file, "--server", server.target) as started:
        await held(server)
        started.send_signal(number)
        exit_code, out, err = await ended(started)
    assert exit_code == code, err
    states = {each["id"]: each["state"] for each in map(json.loads, out.splitlines())}
    assert states["i0"] == "completed"
    assert states["i1"] == states["i2"] == "cancelled"
    assert server.was_cancelled
    assert "cancelling the batch" in err
    assert "cancelled" in err.split("Report")[1]
    assert "Traceback" not in err


async def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    """Also where the service does not do what it is told; the call is cancelled, so it knows."""
    file = batch(tmp_path / "batch.jsonl", "done", "hold", "hold", "hold", "hold")
    script = Script(ignores_cancel=True)
    async with serving(script) as server, process("run", file, "--server", server.target) as started:
        await held(server)
        started.send_signal(signal.SIGINT)
        assert started.stderr is not None
        while b"cancelling" not in await asyncio.wait_for(started.stderr.readline(), LIMIT_S):
            pass
        started.send_signal(signal.SIGINT)
        exit_code, _, err = await ended(started)
        await asyncio.wait_for(server.call_ended.wait(), LIMIT_S)
    assert exit_code == 130
    assert "no result" in err


async def test_an_interrupt_while_waiting_for_input() -> None:
    """A pipe that says nothing does not keep the command."""
    reading, writing = os.pipe()
    async with (
        serving(Script(is_eager=True)) as server,
        process("run", "-", "--server", server.target, stdin=reading) as started,
    ):
        os.write(writing, b'{"prompt": "first"}\n')
        assert started.stdout is not None
        line = await asyncio.wait_for(started.stdout.readline(), LIMIT_S)
        assert json.loads(line)["content"] == "echo: first"
        started.send_signal(signal.SIGINT)
        exit_code, _, err = await ended(started)
    os.close(reading)
    os.close(writing)
    assert exit_code == 130
    assert "  not sent         the rest of the file" in err


async def test_standard_input_is_a_stream() -> None:
    """Results of early lines come while later ones are not written yet."""
    async with (
        serving(Script(is_eager=True)) as server,
        process("run", "-", "--server", server.target, "--no-map", stdin=-1) as started,
    ):
        assert started.stdin is not None
        assert started.stdout is not None
        for number in range(3):
            started.stdin.write(json.dumps({"prompt": f"{number}"}).encode() + b"\n")
            line = await asyncio.wait_for(started.stdout.readline(), LIMIT_S)
            assert json.loads(line)["index"] == number
        started.stdin.close()
        exit_code, _, _ = await ended(started)
    assert exit_code == 0


async def test_strict_reads_a_pipe_twice() -> None:
    """Through a temporary file."""
    async with (
        serving() as server,
        process("run", "-", "--strict", "--server", server.target, stdin=-1) as started,
    ):
        assert started.stdin is not None
        started.stdin.write(b'{"prompt": "a"}\n\n{"prompt": "b"}')
        started.stdin.close()
        exit_code, out, err = await ended(started)
    assert exit_code == 0, err
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["line-1", "line-3"]


async def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """As `| head -1` does: the batch is cancelled, and no traceback is left behind."""
    file = batch(tmp_path / "batch.jsonl", *["x"] * 2000)
    reading, writing = os.pipe()
    async with (
        serving(Script(first_credit=5)) as server,
        process("run", file, "--server", server.target, stdout=writing) as started,
    ):
        os.close(writing)
        os.close(reading)
        exit_code, _, err = await ended(started)
        await asyncio.wait_for(server.call_ended.wait(), LIMIT_S)
    assert exit_code == 1
    assert server.was_cancelled
    assert "The reader of the results went away." in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


async def on_terminal(file: str, **environment: str) -> str:
    """What a terminal shows of a run."""
    controller, terminal = pty.openpty()
    shown = bytearray()
    done = asyncio.Event()

    def read() -> None:
        try:
            data = os.read(controller, 65536)
        except OSError:  # the other end was closed
            data = b""
        shown.extend(data)
        if not data:
            asyncio.get_running_loop().remove_reader(controller)
            done.set()

    async with process(
        "run", file, stdin=terminal, stdout=terminal, stderr=terminal, env={"TERM": "xterm-256color", **environment}
    ) as started:
        os.close(terminal)
        asyncio.get_running_loop().add_reader(controller, read)
        await asyncio.wait_for(started.wait(), LIMIT_S)
        await asyncio.wait_for(done.wait(), LIMIT_S)
    os.close(controller)
    return shown.decode().replace("\r\n", "\n")


async def test_a_terminal_shows_answers_in_colour(tmp_path: Path) -> None:
    """Answers for a reader instead of JSON, a bar, and the map."""
    shown = await on_terminal(batch(tmp_path / "batch.jsonl", "hello you", "fail it"))
    assert "echo: hello you" in shown
    assert '"content"' not in shown
    assert "\x1b[" in shown
    assert "━" in shown  # the bar
    assert "MODEL_NOT_FOUND" in shown
    assert "Forward passes" in shown


async def test_colour_can_be_turned_off(tmp_path: Path) -> None:
    """NO_COLOR takes the colours, TERM=dumb everything that moves."""
    file = batch(tmp_path / "batch.jsonl", "hello you", "fail it")
    shown = await on_terminal(file, NO_COLOR="1")
    assert "\x1b[31m" not in shown
    assert "\x1b[36m" not in shown
    shown = await on_terminal(file, TERM="dumb")
    assert "\x1b" not in shown
    assert "unisono: 2 of 2 done, 1 failed" in shown


async def test_an_old_encoding_gets_plain_characters(tmp_path: Path) -> None:
    """The map is drawn with what the terminal can show, and no answer breaks the command."""
    file = batch(tmp_path / "batch.jsonl", "hello ü 首")
    async with process("run", file, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}) as started:
        exit_code, out, err = await ended(started)
    assert exit_code == 0, err
    assert json.loads(out)["content"] == "echo: hello ü 首"
    assert "  i0    |###" in err
    assert err.isascii()
