"""Batches of `/v1/responses`, by OpenAI's own package, unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseReasoningItem

from tests.fakes.ollama import Answer
from tests.integration.openai_client import create, line, lines_of, served, until_over
from unisono.app.file_batches import FileBatches

RESPONSES: Literal["/v1/responses"] = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


def ask(custom_id: str, given: Any = "Hello", *, model: str = "fake", **fields: Any) -> str:
    """A line that wants a response."""
    body = {"model": model, "input": given, "max_output_tokens": 3, **fields}
    return line(custom_id, body, url=RESPONSES)


def response_of(one: dict[str, Any]) -> Response:
    """The response of a line of output, as strictly as the package's type says."""
    assert (one["error"], one["response"]["status_code"]) == (None, 200)
    return Response.model_validate_json(msgspec.json.encode(one["response"]["body"]), strict=True)


async def test_upload_create_poll_download(tmp_path: Path) -> None:
    """The whole way: text, a conversation, thoughts, a call and its output, a shape; each with its own settings."""
    lines = [
        "",
        ask("text", "Hello", instructions="be kind", temperature=0.5, metadata={"a": "b"}),
        "",
        ask("long", [{"role": "user", "content": [{"type": "input_text", "text": "Go on"}]}], user="me"),
        ask("thought", "Think about it", model="fake-think", reasoning={"effort": "none"}, max_output_tokens=90),
        ask("thoughts", "Think hard", model="fake-think", reasoning={"summary": "auto"}, max_output_tokens=90),
        ask("call", "The weather?", model="fake-tools", tools=[TOOL], max_output_tokens=90),
        ask(
            "called",
            [
                {"role": "user", "content": "The weather?"},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
                {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            ],
            model="fake-tools",
            tools=[TOOL],
        ),
        ask(
            "shape",
            "Give",
            text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            max_output_tokens=90,
        ),
    ]
    async with served(tmp_path) as (h, client):
        h.fake.answer("Hello", Answer(content=("Hi", "!")))
        h.fake.answer("hard", Answer(thinking="so it is", content="Yes"))
        h.fake.answer("weather?", Answer(tool_calls=(("weather", {"city": "Oslo"}),)))
        h.fake.answer("sunny", Answer(content=("It", " is")))
        batch = await until_over(client, await create(client, lines, endpoint=RESPONSES))
        assert (batch.status, batch.endpoint, batch.error_file_id) == ("completed", RESPONSES, None)
        found = {name: response_of(one) for name, one in (await lines_of(client, batch.output_file_id)).items()}
        kept = (await h.list_results(batch.id)).results
        asked = {request.body["messages"][-1]["content"]: request.body for request in h.work}
    assert set(found) == set(kept) == {"text", "long", "thought", "thoughts", "call", "called", "shape"}
    for name, response in found.items():
        assert response.output_text == kept[name].completion.content
        assert response.usage is not None
        usage = (response.usage.input_tokens, response.usage.output_tokens)
        assert usage == (kept[name].usage.prompt_tokens, kept[name].usage.completion_tokens)
    text = found["text"]
    assert (text.status, text.output_text, text.model) == ("completed", "Hi!", "fake:latest")
    assert (text.instructions, text.temperature, text.metadata) == ("be kind", 0.5, {"a": "b"})
    assert (text.max_output_tokens, text.user, found["long"].user) == (3, None, "me")
    assert [message["role"] for message in asked["Hello"]["messages"]] == ["system", "user"]
    assert asked["Hello"]["options"]["temperature"] == 0.5
    assert found["long"].status == "incomplete"
    assert found["long"].incomplete_details is not None
    assert found["long"].incomplete_details.reason == "max_output_tokens"
    assert asked["Think about it"]["think"] is False
    assert [each.type for each in found["thought"].output] == ["message"]
    thought = found["thoughts"].output[0]
    assert isinstance(thought, ResponseReasoningItem)
    assert thought.summary[0].text == "so it is"
    (call,) = found["call"].output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
    assert [tool.name for tool in found["call"].tools if tool.type == "function"] == ["weather"]
    assert found["called"].output_text == "It is"
    assert asked["sunny"]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert json.loads(found["shape"].output_text) is not None
    assert asked["Give"]["format"] == {"type": "object"}


async def test_what_cannot_be_honoured_fails_alone(tmp_path: Path) -> None:
    """By the name that the request has for it, also where the limits of all requests refuse it."""
    wrong = {
        "tools[0].type": ask("a", tools=[{"type": "web_search"}]),
        "previous_response_id": ask("b", previous_response_id="resp_1"),
        "input": line("c", {"model": "fake"}, url=RESPONSES),
        "tool_choice": ask("d", tools=[TOOL], tool_choice="required"),
        "max_output_tokens": ask("e", max_output_tokens=0),
        "input[0].role": ask("f", [{"role": "nobody", "content": "?"}]),
        "input ": ask("g", [{"role": "user", "content": "hi"}] * 1_100),
    }
    async with served(tmp_path) as (_, client):
        batch = await until_over(client, await create(client, [*wrong.values(), ask("good")], endpoint=RESPONSES))
        assert batch.status == "completed"
        assert set(await lines_of(client, batch.output_file_id)) == {"good"}
        failed = await lines_of(client, batch.error_file_id)
    for name, (param, one) in zip("abcdefg", zip(wrong, wrong.values(), strict=True), strict=True):
        assert json.loads(one)["custom_id"] == name
        answer = failed[name]["response"]
        assert answer["status_code"] == 400
        assert answer["body"]["error"]["param"] == param.strip()
        assert answer["body"]["error"]["message"]


async def test_a_file_that_was_deleted_while_its_batch_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are there; what was asked for is not known any more."""
    lines_there = FileBatches._lines

    async def late(self: FileBatches, batch: Any) -> Any:
        assert await self.files.delete(batch.input_file_id)
        return await lines_there(self, batch)

    monkeypatch.setattr(FileBatches, "_lines", late)
    async with served(tmp_path) as (_, client):
        batch = await until_over(client, await create(client, [ask("a", temperature=0.5)], endpoint=RESPONSES))
        response = response_of((await lines_of(client, batch.output_file_id))["a"])
    assert response.output_text
    assert (response.temperature, response.max_output_tokens) == (None, None)


async def test_files_with_a_mark_of_byte_order_and_other_line_ends(tmp_path: Path) -> None:
    """Each answer has the settings of its own line."""
    text = "\ufeff" + "\r\n\r\n".join(ask(f"i{n}", instructions=f"rule {n}") for n in range(40))
    async with served(tmp_path) as (_, client):
        file = await client.files.create(file=("a.jsonl", text.encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=RESPONSES, completion_window="24h")
        found = await lines_of(client, (await until_over(client, batch)).output_file_id)
    assert {name: response_of(one).instructions for name, one in found.items()} == {
        f"i{n}": f"rule {n}" for n in range(40)
    }
