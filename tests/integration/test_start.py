"""The command as it is started: what is wrong with the settings is said in a line."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.integration.service import LIMIT_S


async def unisono(*arguments: str, **environ: str) -> tuple[int | None, str, str]:
    """Runs the command to its end: its exit code, and what it wrote."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "OLLAMA_"))}
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "unisono",
        *arguments,
        env={**inherited, "UNISONO_STATE_DIR": "none", "UNISONO_SERVER": "127.0.0.1:1", **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(started.communicate(), LIMIT_S)
    return started.returncode, out.decode(), err.decode()


@pytest.mark.parametrize(
    ("command", "variable", "value", "said"),
    [
        ("serve", "UNISONO_BACKENDS", "gpu1", "UNISONO_BACKENDS: 'gpu1': each backend is NAME=ADDRESS"),
        ("doctor", "UNISONO_BACKENDS", "a=http://x, a=http://y", "UNISONO_BACKENDS: two backends are called 'a'"),
        ("serve", "UNISONO_BACKENDS", "a=x, b=x", "UNISONO_BACKENDS: a and b are one"),
        ("doctor", "UNISONO_BACKENDS", "a=ftp://x", "the address of backend a: the scheme must be http or https"),
        ("serve", "UNISONO_SLOTS", "0", "UNISONO_SLOTS is '0'; it must be a whole number, 1 to 4096"),
        ("serve", "UNISONO_MEMORY_FACTOR", "abc", "UNISONO_MEMORY_FACTOR is 'abc'; it must be a number, above 0 and"),
        ("serve", "OLLAMA_BATCH_TIMEOUT", "soon", "OLLAMA_BATCH_TIMEOUT: 'soon' is not a duration"),
    ],
)
async def test_a_wrong_setting_is_named(command: str, variable: str, value: str, said: str) -> None:
    """With its variable, and without a traceback."""
    code, _, err = await unisono(command, **{variable: value})
    assert code == 2
    assert any(line.startswith(f"unisono: {said}") for line in err.splitlines()), err
    assert "Traceback" not in err


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
