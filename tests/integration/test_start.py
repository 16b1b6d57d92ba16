"""The command as it is started: what is wrong with the settings is said in a line."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.integration.service import LIMIT_S

# Nothing is left behind, and no port is taken that others may want.
QUIET = {"UNISONO_STATE_DIR": "none", "UNISONO_METRICS_LISTEN": "none", "UNISONO_HTTP_LISTEN": "none"}


async def unisono(*arguments: str, **environ: str) -> tuple[int | None, str, str]:
    """Runs the command to its end: its exit code, and what it wrote."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "OLLAMA_"))}
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "unisono",
        *arguments,
        env={**inherited, **QUIET, "UNISONO_SERVER": "127.0.0.1:1", **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(started.communicate(), LIMIT_S)
    finally:
        if started.returncode is None:
            started.kill()
    return started.returncode, out.decode(), err.decode()


@pytest.mark.parametrize(
    ("command", "variable", "value", "said"),
    [
        ("serve", "UNISONO_BACKENDS", "gpu1", "UNISONO_BACKENDS: 'gpu1': each backend is NAME=ADDRESS"),
        ("doctor", "UNISONO_BACKENDS", "a=http://x, a=http://y", "UNISONO_BACKENDS: two backends are called 'a'"),
        ("serve", "UNISONO_BACKENDS", "a=x, b=x", "UNISONO_BACKENDS: a and b are one, http://x:11434: leave one"),
        ("doctor", "UNISONO_BACKENDS", "a=ftp://x", "UNISONO_BACKENDS: the address of backend a: the scheme must be"),
        ("serve", "UNISONO_BACKENDS", ",", "UNISONO_BACKENDS: it names no backend"),
        ("serve", "UNISONO_BACKENDS", "a=http://", "UNISONO_BACKENDS: the address of backend a: it names neither a"),
        ("serve", "UNISONO_OLLAMA_URL", ":", "UNISONO_OLLAMA_URL: the address of backend ollama: it names neither a"),
        ("serve", "OLLAMA_HOST", "x:0", "OLLAMA_HOST: the address of backend ollama: its port must be a number"),
        ("serve", "UNISONO_LLAMA_SERVER_URL", "x:0", "UNISONO_LLAMA_SERVER_URL: the address of backend llama-server"),
        ("serve", "UNISONO_LISTEN", "nonsense", "UNISONO_LISTEN: 'nonsense' is not HOST:PORT"),
        ("serve", "UNISONO_LISTEN", "127.0.0.1:99999", "UNISONO_LISTEN: '127.0.0.1:99999' is not HOST:PORT"),
        ("serve", "UNISONO_BACKEND_TOKEN", "s3cré", "UNISONO_BACKEND_TOKEN: has a character that cannot stand in"),
        ("serve", "UNISONO_SLOTS", "0", "UNISONO_SLOTS is '0'; it must be a whole number, 1 to 4096"),
        ("serve", "UNISONO_MEMORY_FACTOR", "abc", "UNISONO_MEMORY_FACTOR is 'abc'; it must be a number, above 0 and"),
        ("serve", "UNISONO_DATA_DIR", "~nobody-here/x", "UNISONO_DATA_DIR: ~nobody-here/x: there is no such home"),
        ("serve", "UNISONO_STATE_DIR", "~nobody-here", "UNISONO_STATE_DIR: ~nobody-here: there is no such home"),
        ("serve", "OLLAMA_BATCH_TIMEOUT", "soon", "OLLAMA_BATCH_TIMEOUT: 'soon' is not a duration"),
    ],
)
async def test_a_wrong_setting_is_named(command: str, variable: str, value: str, said: str) -> None:
    """With its variable, and without a traceback."""
    code, _, err = await unisono(command, **{variable: value})
    assert code == 2
    assert any(line.startswith(f"unisono: {said}") for line in err.splitlines()), err
    assert "Traceback" not in err


async def test_a_wrong_address_of_the_command_line_is_named_as_such() -> None:
    """And not by a variable that nobody has set."""
    code, _, err = await unisono("serve", "--ollama", "x:0")
    assert code == 2
    assert err.startswith("unisono: --ollama: the address of backend ollama: its port must be a number from 1")


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        # Of a net that is for documentation only.
        ("192.0.2.1:0", "it is not an address of this machine: choose one that is, or 0.0.0.0 for all of them"),
        ("nowhere.invalid:0", ": choose an address of this machine"),
        ("unix:/nowhere/unisono.sock", "No such file or directory: choose another one"),
    ],
)
async def test_where_nobody_can_listen(listen: str, why: str) -> None:
    """Why is said, and the address once."""
    code, _, err = await unisono("serve", UNISONO_LISTEN=listen)
    assert code == 3
    (line,) = [line for line in err.splitlines() if "cannot listen" in line]
    assert why in line
    assert line.count(listen) == 1
    assert line.endswith("(UNISONO_LISTEN, or --listen)")


async def test_a_port_that_another_program_has() -> None:
    """It is said so, and nothing is shared with it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = await unisono("serve", UNISONO_LISTEN=f"127.0.0.1:{port}")
    assert code == 3
    assert "another program listens there: end it, or choose another port" in err


async def test_the_command_line_names_the_only_backend() -> None:
    """Whatever the environment lists; without it, all of these are there."""
    async with FakeOllama([FakeModel(name="listed")]) as listed, FakeOllama([FakeModel(name="named")]) as named:
        environ = {"UNISONO_BACKENDS": f"one={listed.url}, two={named.url}", "UNISONO_SERVER": "127.0.0.1:1"}
        code, out, _ = await unisono("doctor", **environ)
        assert code == 0
        for name in ("Backend one", "Backend two", "listed:latest", "named:latest"):
            assert name in out
        code, out, _ = await unisono("doctor", "--ollama", named.url, **environ)
        assert code == 0
        assert "named:latest" in out
        assert "listed:latest" not in out


async def test_the_command_line_wins_over_an_embedded_engine_of_the_environment() -> None:
    """The backend that it names is the only one, and nobody is told of what it passes over."""
    async with FakeOllama([FakeModel(name="named")]) as named:
        code, out, err = await unisono("doctor", "--ollama", named.url, UNISONO_EMBEDDED="true")
        assert code == 0
        assert "named:latest" in out
        assert "ignored" not in err


async def test_a_token_out_of_a_file_is_sent_without_its_newline() -> None:
    """And not repeated in an error."""
    async with FakeOllama([FakeModel(name="only")]) as fake:
        environ = {"UNISONO_BACKEND_TOKEN": "s3cret\n", "OLLAMA_HOST": fake.url}
        code, out, err = await unisono("doctor", **environ)
        assert code == 0, out + err
        assert {request.headers.get("authorization") for request in fake.requests} == {"Bearer s3cret"}
        assert "s3cret" not in out + err


async def test_what_does_nothing_is_told_at_the_start(tmp_path: Path) -> None:
    """A setting that does not exist, and a folder that cannot be written to."""
    (tmp_path / "file").touch()
    async with FakeOllama([FakeModel(name="only")]) as fake:
        state_dir = str(tmp_path / "file" / "folder")
        code, _, err = await unisono(
            "doctor", UNISONO_SLOT="8", OLLAMA_BATCH_ENABLED="", OLLAMA_HOST=fake.url, UNISONO_STATE_DIR=state_dir
        )
    assert code == 0
    assert "UNISONO_SLOT is ignored: there is no such setting; is UNISONO_SLOTS meant?" in err
    assert "learned slots will not be remembered" in err
    assert state_dir in err


async def test_a_service_whose_log_nobody_reads_is_stopped_all_the_same() -> None:
    """One SIGTERM ends it, also where the program that started it, and read its log, is gone."""
    environ = {**QUIET, "UNISONO_LISTEN": "127.0.0.1:0", "OLLAMA_HOST": "127.0.0.1:1"}
    reading, writing = os.pipe()
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unisono", "serve"), env=os.environ | environ, stderr=writing
    )
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as log:
            while b"serving" not in await asyncio.wait_for(asyncio.to_thread(log.readline), LIMIT_S):
                pass
        started.terminate()
        _ = await asyncio.wait_for(started.wait(), LIMIT_S)
    finally:
        if started.returncode is None:
            started.kill()
