"""What the Python client's README says is so: its snippets run, and its figures are the code's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.clients.served import served
from unisono_client import client, patience, session
from unisono_client import run as run_module

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "clients" / "python" / "README.md").read_text()
SCRIPT, PROGRAM, LANGCHAIN = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(snippet: str, target: str) -> dict[str, object]:
    """Runs a snippet as it stands, but for the address of the service; its names."""
    for call in ("batch_generate(", "ChatUnisono("):
        snippet = snippet.replace(f"= {call}", f"= {call}target={target!r}, ")
        snippet = snippet.replace(f"in {call}", f"in {call}target={target!r}, prompts=")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)  # that it runs is the point
    return names


async def test_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """The asynchronous snippet answers everything that it asks."""
    names: dict[str, object] = {}
    with served() as target:
        exec(compile(PROGRAM, "README.md", "exec"), names)  # that it runs is the point
        main = names["main"]
        assert callable(main)
        await main(target)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("france ")
    assert lines[1].startswith("1 ")


def test_the_script_and_the_chat_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The synchronous snippets print two answers each."""
    with served() as target:
        _ = run(SCRIPT, target)
        if importlib.util.find_spec("langchain_core") is not None:
            _ = run(LANGCHAIN, target)
    assert len([line for line in capsys.readouterr().out.splitlines() if line]) in {2, 4}


def test_its_figures() -> None:
    """Limits and times that the README names are those of the code."""
    assert f"{session.MAX_UNREAD:,} results or {session.MAX_UNREAD_BYTES // 2**20} MiB" in README
    assert f"takes {run_module.AHEAD:,} items beforehand" in README
    assert f"give_up_after_s={client.GIVE_UP_AFTER_S:g}" in README
    assert f"from {patience._FIRST_S * 1000:g} ms to {patience._LONGEST_S:g} s" in README
    assert len(README.splitlines()) < 90


def test_links_lead_somewhere() -> None:
    """Every relative link names a file that is there."""
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / "clients" / "python" / link).exists(), link
