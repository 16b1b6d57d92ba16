"""One batch read by every surface: the same items, the same answers, the same errors.

A surface is one more entry of SURFACES; whoever can read a batch that runs is named in WHILE_IT_RUNS too.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch

from tests.fakes.ollama import Answer, FakeModel
from tests.integration.openai_client import chat, create, lines_of, served, until_over
from tests.integration.service import LIMIT_S, House, reason_of, state_of
from unisono._generated.unisono.v1 import event_pb2, item_pb2

# One model, since one that is at work lets no other in for long.
ABLE = FakeModel(name="fake:latest", capabilities=("completion", "thinking", "tools"))
LARGE = ("x" * 600_000,) * 8
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# Twenty seconds, at five milliseconds a pass.
LONG = "Go on [[tokens=4000]]"
LINES = [
    chat("short", "Hello", max_tokens=90),
    chat("cut", "Tell me", max_tokens=3),
    chat("large", "the book", max_tokens=20),
    chat("thought", "Think hard", max_tokens=90),
    chat("call", "The weather?", max_tokens=90, tools=[TOOL]),
    chat('odd "ï"', "Hello", max_tokens=90),
    chat("gone", model="absent"),
    chat("wrong", temperature=-1.0),
    json.dumps({"custom_id": "none", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "fake"}}),
    chat("long0", LONG, max_tokens=4000),
    chat("long1", LONG, max_tokens=4000),
]
FAILED, CANCELLED = {"gone", "wrong", "none"}, {"long0", "long1"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an item, in words that all surfaces have."""

    # "completed", "failed" or "cancelled".
    state: str
    content: str = ""
    thinking: str = ""
    # Names, and arguments.
    calls: list[tuple[str, Any]] = field(default_factory=list)
    model: str = ""
    finish_reason: str = ""
    # Of the prompt, and of the answer.
    tokens: tuple[int, int] | None = None
    # The reason, in small letters; and what is said.
    error: str = ""
    message: str = ""


Outcomes = dict[str, Outcome]
Surface = Callable[[House, AsyncOpenAI, Batch], Awaitable[Outcomes]]

_WORDS = {
    item_pb2.FINISH_REASON_STOP: "stop",
    item_pb2.FINISH_REASON_LENGTH: "length",
    item_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def of_message(result: event_pb2.Result) -> Outcome:
    """An outcome out of gRPC's message."""
    state = state_of(result).lower()
    if not result.HasField("completion"):
        return Outcome(state=state, error=reason_of(result).lower(), message=result.error.message)
    done, usage = result.completion, result.usage
    return Outcome(
        state=state,
        content=done.content,
        thinking=done.thinking,
        calls=[(call.name, json.loads(call.arguments_json)) for call in done.tool_calls],
        model=done.model,
        finish_reason=_WORDS[done.finish_reason],
        tokens=(usage.prompt_tokens, usage.completion_tokens),
    )


async def by_list_results(h: House, _client: AsyncOpenAI, batch: Batch) -> Outcomes:
    """`ListResults`, in small pages."""
    seen = await h.list_results(batch.id, page_size=2)
    return {name: of_message(result) for name, result in seen.results.items()}


async def by_attach(h: House, _client: AsyncOpenAI, batch: Batch) -> Outcomes:
    """`AttachBatch`, from the first event to the last."""
    return {name: of_message(result) for name, result in (await h.attach(batch.id)).results.items()}


async def by_command(h: House, _client: AsyncOpenAI, batch: Batch) -> Outcomes:
    """`unisono results`."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "UNISONO_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unisono", "results", batch.id),
        env={**usual, "UNISONO_SERVER": h.target},
        stdout=-1,
        stderr=-1,
        stdin=-3,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    # 1: some items failed.
    assert process.returncode in (0, 1), err.decode()
    found: Outcomes = {}
    for line in map(json.loads, out.decode().splitlines()):
        assert line["id"] not in found
        if "error" in line:
            error = line["error"]
            found[line["id"]] = Outcome(state=line["state"], error=error["reason"].lower(), message=error["message"])
        else:
            usage = line["usage"]
            found[line["id"]] = Outcome(
                state=line["state"],
                content=line["content"],
                thinking=line.get("thinking", ""),
                calls=[(call["name"], call["arguments"]) for call in line.get("tool_calls", ())],
                model=line["model"],
                finish_reason=line["finish_reason"],
                tokens=(usage["prompt_tokens"], usage["completion_tokens"]),
            )
    return found


def of_openai(line: dict[str, Any]) -> Outcome:
    """An outcome out of a line of OpenAI's batch output, or of its file of errors."""
    if line["response"] is None:
        assert line["error"]["code"] == "batch_cancelled"
        return Outcome(state="cancelled", error="cancelled", message=line["error"]["message"])
    assert line["error"] is None
    body = line["response"]["body"]
    if line["response"]["status_code"] != 200:
        return Outcome(state="failed", error=body["error"]["code"], message=body["error"]["message"])
    (choice,) = body["choices"]
    message, usage = choice["message"], body["usage"]
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return Outcome(
        state="completed",
        content=message["content"],
        thinking=message.get("reasoning", ""),
        calls=[(one["name"], json.loads(one["arguments"])) for one in functions],
        model=body["model"],
        finish_reason=choice["finish_reason"],
        tokens=(usage["prompt_tokens"], usage["completion_tokens"]),
    )


async def by_files(_h: House, client: AsyncOpenAI, batch: Batch) -> Outcomes:
    """The files that OpenAI's batch leaves: answers in one, all else in the other."""
    answers, errors = [await lines_of(client, each) for each in (batch.output_file_id, batch.error_file_id)]
    assert not set(answers) & set(errors)
    assert {one["response"]["status_code"] for one in answers.values()} == {200}
    return {name: of_openai(line) for name, line in (answers | errors).items()}


SURFACES: dict[str, Surface] = {
    "ListResults": by_list_results,
    "AttachBatch": by_attach,
    "unisono results": by_command,
    "files": by_files,
}
WHILE_IT_RUNS = ("ListResults", "unisono results")


async def ran(h: House, client: AsyncOpenAI, while_it_runs: Callable[[Batch], Awaitable[None]]) -> Batch:
    """A batch of mixed outcomes: all has ended but what is long; then it is cancelled, and over."""
    h.fake.answer("Hello", Answer(content=("Hi", "!")))
    h.fake.answer("the book", Answer(content=LARGE))
    h.fake.answer("Think", Answer(thinking="so it is", content="Yes"))
    h.fake.answer("weather", Answer(tool_calls=(("weather", {"city": "Oslo", "n": 1.5}),)))
    batch = await create(client, LINES)
    ended = len(LINES) - len(CANCELLED)
    async with asyncio.timeout(LIMIT_S):
        while (counts := batch.request_counts) is None or counts.completed + counts.failed < ended:
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    assert batch.status == "in_progress"
    await while_it_runs(batch)
    return await until_over(client, await client.batches.cancel(batch.id))


async def test_every_surface_tells_the_same(tmp_path: Path) -> None:
    """While it runs what has ended, and then all of it: nothing that was read once reads otherwise later."""
    early: dict[str, Outcomes] = {}
    async with served(tmp_path, models=[ABLE], pass_s=0.005, num_parallel=4) as (h, client):

        async def read(batch: Batch) -> None:
            early.update({name: await SURFACES[name](h, client, batch) for name in WHILE_IT_RUNS})

        batch = await ran(h, client, read)
        assert batch.status == "cancelled"
        late = {name: await surface(h, client, batch) for name, surface in SURFACES.items()}
    reference = late["ListResults"]
    assert set(reference) == {json.loads(line)["custom_id"] for line in LINES}
    assert {name for name, one in reference.items() if one.state == "failed"} == FAILED
    assert {name for name, one in reference.items() if one.state == "cancelled"} == CANCELLED
    assert {one.finish_reason for one in reference.values()} == {"stop", "length", "tool_calls", ""}
    assert reference["large"].content == "".join(LARGE)
    for name, found in late.items():
        assert lasting(found) == lasting(reference), name
    for name, found in early.items():
        assert set(found) == set(reference) - CANCELLED, name
        assert found == {each: late[name][each] for each in found}, name


def lasting(found: Outcomes) -> dict[str, Any]:
    """Without what each surface says in its own words."""
    return {name: {**vars(one), "message": bool(one.message)} for name, one in found.items()}
