"""From Ollama's client to Unisono: what stands side by side gives the same, and what is said to differ does."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.ollama import Answer, FakeModel
from tests.guides import ROOT, block, code_in, section, table
from tests.integration.service import LIMIT_S, House, house
from unisono_client import Chat, Client, ItemError, RefusedError

ollama = pytest.importorskip("ollama", reason="Ollama's own client is not installed")

GUIDE = "clients/README.md"
TARGET = "127.0.0.1:50051"
EVERYTHING = FakeModel(name="llama3.2", capabilities=("completion", "tools", "vision", "thinking"))
EMBEDDER = FakeModel(name="nomic-embed-text", capabilities=("embedding",), family="nomic-bert")
MODELS = [EVERYTHING, EMBEDDER]
# The least picture that is one.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001"
    "e221bc330000000049454e44ae426082"
)
ROWS = table(section(GUIDE, "## From Ollama's client to Unisono"), "")


def names_of(words: str, target: str) -> dict[str, Any]:
    """The names that a block makes, as it stands but for the address."""
    names: dict[str, Any] = {}
    exec(compile(block(GUIDE, words).replace(TARGET, target), GUIDE, "exec"), names)  # that it runs is the point
    return names


async def test_a_gather_becomes_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both functions, asked the same, give the same; ours in requests that were released together."""
    questions = [f"Question {number}?" for number in range(9)]
    async with house(models=MODELS) as h:
        monkeypatch.setenv("OLLAMA_HOST", h.fake.url)
        theirs: Callable[[list[str]], Awaitable[list[str]]] = names_of("from ollama import AsyncClient", h.target)[
            "ask"
        ]
        ours: Callable[[list[str]], Awaitable[list[str]]] = names_of("result.content async for", h.target)["ask"]
        answers = await theirs(questions)
        assert await ours(questions) == answers
        assert len(set(answers)) == len(questions)


async def test_both_sides_get_the_same(tmp_path: Path) -> None:
    """Every row of the table, in a program that has the names of the block before it: equal values, equal options."""
    (tmp_path / "picture.png").write_bytes(PNG)
    async with house(models=MODELS) as h:
        # What a model does with a tool has to be told to a stand-in, which looks for it in the prompt.
        tool_row = next(row for row in ROWS if row[0] == "tools")
        rest = [row for row in ROWS if row is not tool_row]
        pairs = await evaluated(rest, h, tmp_path)
        h.fake.answer("capital of France", Answer(tool_calls=(("weather", {"city": "Paris"}),)))
        pairs |= await evaluated([tool_row], h, tmp_path)
        bodies = [request.body for request in h.work]
    assert pairs.keys() == {row[0] for row in ROWS}
    for name, (theirs, ours) in pairs.items():
        assert theirs, name
        assert same(ours, theirs), name
    asked_for = [body["options"] for body in bodies if "temperature" in (body.get("options") or {})]
    assert asked_for == [{"temperature": 0, "num_ctx": 8192}] * 2


def same(ours: Any, theirs: Any) -> bool:
    """Whether they are equal; a vector's numbers but for what 32 bits leave out."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == pytest.approx(theirs, rel=1e-5)) if isinstance(ours, float) else bool(ours == theirs)


async def evaluated(rows: list[list[str]], h: House, folder: Path) -> dict[str, tuple[Any, Any]]:
    """What both cells of each row give."""
    lines = [block(GUIDE, "import ollama\n").replace(TARGET, h.target), "import json"]
    for name, theirs, ours in rows:
        ((left,), (right,)) = code_in(theirs), code_in(ours)
        lines.append(f"print(json.dumps([{name!r}, {left}, {right}], default=list))")
    path = f"{ROOT / 'clients' / 'python' / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "\n".join(lines)),
        cwd=folder,
        env={**os.environ, "OLLAMA_HOST": h.fake.url, "PYTHONPATH": path},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), LIMIT_S * 2)
    assert process.returncode == 0, err.decode()
    return {name: (theirs, ours) for name, theirs, ours in map(json.loads, out.splitlines())}


async def test_a_prompt_that_is_too_long_is_an_error_here() -> None:
    """There it is cut, and here with `truncate`."""
    long = "word " * 5000
    async with house(models=MODELS) as h, Client(h.target) as client, ollama.AsyncClient(h.fake.url) as theirs:
        cut = await theirs.chat(model="llama3.2", messages=[{"role": "user", "content": long}])
        assert cut.message.content
        with pytest.raises(ItemError) as caught:
            _ = await client.infer(Chat(long), model="llama3.2")
        assert caught.value.reason == "PROMPT_TOO_LONG"
        assert caught.value.metadata.keys() >= {"n_prompt_tokens", "n_ctx"}
        allowed = await client.infer(Chat(long, truncate=True), model="llama3.2")
        assert allowed.content


async def test_an_item_that_fails_fails_alone() -> None:
    """The others of a batch are answered, each by its place; a gather gives the first error and nothing else."""
    models = ("llama3.2", "nosuch", "llama3.2")
    async with house(models=MODELS) as h, Client(h.target) as client, ollama.AsyncClient(h.fake.url) as theirs:
        with pytest.raises(ollama.ResponseError, match="nosuch"):
            await asyncio.gather(
                *(theirs.chat(model=model, messages=[{"role": "user", "content": "Hello"}]) for model in models)
            )
        results = {
            result.item_id: result async for result in client.run([Chat("Hello", model=model) for model in models])
        }
    assert sorted(results) == ["0", "1", "2"]
    assert [bool(results[name].content) for name in ("0", "1", "2")] == [True, False, True]
    with pytest.raises(Exception, match="MODEL_NOT_FOUND"):
        _ = results["1"].raise_for_error()


async def test_options() -> None:
    """An item's own lie over the batch's; a name that is not known is refused here and passed over there."""
    async with house(models=MODELS) as h, Client(h.target) as client, ollama.AsyncClient(h.fake.url) as theirs:
        talk = [{"role": "user", "content": "Hello"}]
        assert (await theirs.chat(model="llama3.2", messages=talk, options={"tempreature": 0})).message.content
        with pytest.raises(RefusedError, match="tempreature"):
            _ = await client.infer(Chat("Hello"), model="llama3.2", options={"tempreature": 0})  # type: ignore[typeddict-unknown-key]
        items = [Chat("one"), Chat("two", options={"seed": 2})]
        options: Any = {"seed": 1, "num_predict": 3, "extra_options": {"of_tomorrow": 1}}
        _ = [result async for result in client.run(items, model="llama3.2", options=options, in_order=True)]
        sent = {body["messages"][0]["content"]: body["options"] for body in (each.body for each in h.work[-2:])}
    shared = {"num_predict": 3, "of_tomorrow": 1}
    # The context is that of the runner, which is loaded.
    assert {text: options | {"num_ctx": 0} for text, options in sent.items()} == {
        "one": {"seed": 1, "num_ctx": 0, **shared},
        "two": {"seed": 2, "num_ctx": 0, **shared},
    }
