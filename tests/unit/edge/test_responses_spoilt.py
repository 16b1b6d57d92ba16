"""Bodies of `/v1/responses` that were spoilt by chance: refused by a field, or answered with what is a response."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from google.protobuf import text_format
from openai.types.responses import Response

from tests.integration.test_rest_fuzz import Spoiler
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.batchfile.fields import FieldError, Fields
from unisono.edge.batchfile.line import Form, read_openai
from unisono.edge.batchfile.responses_out import response_body, settings_of

COUNT = 20_000
BODY: dict[str, Any] = {
    "model": "m",
    "instructions": "be kind",
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "look"},
                {"type": "input_image", "image_url": f"data:image/png;base64,{base64.b64encode(b'P').decode()}"},
            ],
        },
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "sunny"},
    ],
    "include": ["message.output_text.logprobs"],
    "max_output_tokens": 9,
    "max_tool_calls": 1,
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": "k",
    "reasoning": {"effort": "low", "summary": "auto"},
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "temperature": 0.5,
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}, "verbosity": "medium"},
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}],
    "top_logprobs": 2,
    "top_p": 0.5,
    "truncation": "auto",
    "user": "u",
}
ANSWER = text_format.Parse('completion { model: "m" content: "Hi" } usage { prompt_tokens: 1 }', event_pb2.Result())


def test_spoilt_bodies() -> None:
    """What the reader takes can be said again in the answer."""
    spoiler = Spoiler(20_261_122)
    taken, refused = 0, list[FieldError]()
    for number in range(COUNT):
        body: Any = BODY
        for _ in range(1 + number % 3):
            body = spoiler.value(body)
        try:
            item = read_openai(Fields(body, "body"), Form.RESPONSES)
        except FieldError as error:
            refused.append(error)
            continue
        taken += 1
        assert item.ByteSize()
        text = msgspec.json.encode(response_body("1", 1, ANSWER, settings_of(body)))
        response = Response.model_validate_json(text, strict=True)
        assert response.output_text == "Hi"
    assert COUNT / 20 < taken < COUNT
    assert all(error.problem and error.path.startswith("body") for error in refused)


@pytest.mark.parametrize("name", ["max_output_tokens", "max_tool_calls", "top_logprobs"])
def test_whole_numbers_with_a_point(name: str) -> None:
    """Are whole numbers, and said again as such."""
    body = {"input": "hi", name: 8.0}
    _ = read_openai(Fields(body), Form.RESPONSES)
    said = response_body("1", 1, ANSWER, settings_of(body))
    _ = Response.model_validate_json(msgspec.json.encode(said), strict=True)
    assert str(said[name]) == "8"
