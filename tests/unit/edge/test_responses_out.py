"""An answer as a Response object, as OpenAI's own types have it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from google.protobuf import text_format
from openai.types.responses import (
    FunctionTool,
    Response,
    ResponseFormatTextJSONSchemaConfig,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
)

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.batchfile.responses_out import response_body, settings_of

USAGE = """usage { prompt_tokens: 10 cached_prompt_tokens: 4 completion_tokens: 12 }
timings { total { seconds: 3 nanos: 9 } }"""
# What OpenAI answers with, and its package's type does not have.
BESIDE = {"store"}


def body(completion: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body of a completion in text format, as it is written; it is what the package calls a response."""
    result = text_format.Parse(f'completion {{ model: "m" {completion} }} {USAGE}', event_pb2.Result())
    text = msgspec.json.encode(response_body("7-3", 1_000, result, settings))
    found: dict[str, Any] = msgspec.json.decode(text)
    _ = Response.model_validate_json(text, strict=True)
    assert set(found) - BESIDE <= set(Response.model_fields)
    return found


def typed(completion: str, settings: dict[str, Any] | None = None) -> Response:
    """The same, as the package's object."""
    return Response.model_validate_json(msgspec.json.encode(body(completion, settings)), strict=True)


def test_an_answer() -> None:
    """Whole; what was not asked for is null, or what it is then."""
    assert body('content: "Hi" finish_reason: FINISH_REASON_STOP') == {
        "id": "resp_7-3",
        "object": "response",
        "created_at": 997,
        "completed_at": 1_000,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": "m",
        "output": [
            {
                "id": "msg_7-3",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}],
            }
        ],
        "usage": {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 12,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 22,
        },
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "prompt_cache_key": None,
        "safety_identifier": None,
        "temperature": None,
        "tool_choice": "auto",
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
        "user": None,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None},
        "tools": [],
        "conversation": None,
        "previous_response_id": None,
        "prompt": None,
        "service_tier": None,
        "store": False,
    }


def test_what_was_thought_said_and_called() -> None:
    """Each is an item, in this order; a call without an id gets one."""
    response = typed(
        """thinking: "hm" content: "I look." finish_reason: FINISH_REASON_TOOL_CALLS
        tool_calls { id: "c" name: "f" arguments_json: '{"a":1}' } tool_calls { name: "g" arguments_json: '{}' }"""
    )
    thought, said, first, second = response.output
    assert isinstance(thought, ResponseReasoningItem)
    assert [(part.type, part.text) for part in thought.summary] == [("summary_text", "hm")]
    assert isinstance(said, ResponseOutputMessage)
    assert response.output_text == "I look."
    assert isinstance(first, ResponseFunctionToolCall)
    assert isinstance(second, ResponseFunctionToolCall)
    assert (first.call_id, first.name, first.arguments) == ("c", "f", '{"a":1}')
    assert (second.call_id, second.id, second.status) == ("call_7-3_1", "fc_7-3_1", "completed")
    assert len({each.id for each in (thought, said, first, second)}) == 4


def test_only_a_call() -> None:
    """Has no message without words."""
    response = typed('finish_reason: FINISH_REASON_TOOL_CALLS tool_calls { id: "c" name: "f" arguments_json: "{}" }')
    assert [each.type for each in response.output] == ["function_call"]
    assert response.status == "completed"


def test_an_answer_without_words() -> None:
    """Is a message all the same."""
    response = typed("finish_reason: FINISH_REASON_STOP")
    assert [each.type for each in response.output] == ["message"]
    assert response.output_text == ""


@pytest.mark.parametrize(
    ("completion", "kinds"),
    [
        ('content: "once upon"', [("message", "incomplete")]),
        ('thinking: "hm"', [("reasoning", "incomplete")]),
        ('thinking: "hm" content: "on"', [("reasoning", "completed"), ("message", "incomplete")]),
    ],
)
def test_an_answer_that_was_cut(completion: str, kinds: list[tuple[str, str]]) -> None:
    """Is incomplete, says why, and was never completed."""
    response = typed(f"{completion} finish_reason: FINISH_REASON_LENGTH")
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.completed_at is None
    assert [
        (each["type"], each["status"]) for each in body(f"{completion} finish_reason: FINISH_REASON_LENGTH")["output"]
    ] == kinds


def test_logprobs() -> None:
    """Of each token, with the likeliest at its place."""
    response = typed('content: "x" logprobs { token: "x" logprob: -0.5 bytes: "x" top { token: "y" bytes: "y" } }')
    said = response.output[0]
    assert isinstance(said, ResponseOutputMessage)
    text = said.content[0]
    assert isinstance(text, ResponseOutputText)
    assert text.logprobs is not None
    (one,) = text.logprobs
    assert (one.token, one.logprob, one.bytes) == ("x", -0.5, [120])
    assert [(top.token, top.bytes) for top in one.top_logprobs] == [("y", [121])]


def test_what_was_asked_for_stands_in_it_again() -> None:
    """As it was written, but for what never applies here."""
    asked: dict[str, Any] = {
        "model": "alias",
        "input": "hi",
        "instructions": "be kind",
        "max_output_tokens": 9,
        "max_tool_calls": 2,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "service_tier": "flex",
        "store": True,
        "temperature": 1,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "top_logprobs": 2,
        "top_p": 0.5,
        "truncation": "auto",
        "user": None,
    }
    settings = settings_of(asked)
    assert "input" not in settings
    response = typed('content: "Hi"', settings)
    names = [
        *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls"),
        *("prompt_cache_key", "safety_identifier", "temperature", "top_logprobs", "top_p", "truncation", "user"),
    ]
    assert {name: getattr(response, name) for name in names} == {name: asked[name] for name in names}
    assert (response.model, response.service_tier) == ("m", None)
    assert response.reasoning is not None
    assert (response.reasoning.effort, response.reasoning.summary) == ("low", "auto")
    assert response.text is not None
    assert isinstance(response.text.format, ResponseFormatTextJSONSchemaConfig)
    assert response.text.format.schema_ == {"type": "object"}
    (tool,) = response.tools
    assert isinstance(tool, FunctionTool)
    assert (tool.name, tool.parameters, tool.strict) == ("f", {"type": "object"}, False)
    assert body('content: "Hi"', settings)["tool_choice"] == asked["tool_choice"]
