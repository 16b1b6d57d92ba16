"""The body of `/v1/responses` becomes a conversation, or says which field is wrong."""

# ruff: noqa: ISC004  # tables of bodies and what becomes of them

from __future__ import annotations

import base64
from typing import Any

import pytest
from google.protobuf import text_format

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.fields import FieldError, Fields
from unisono.edge.batchfile.line import Form, read_openai

PICTURE = f"data:image/png;base64,{base64.b64encode(b'PNG').decode()}"
USER: dict[str, Any] = {"role": "user", "content": "hi"}
HI = 'chat { messages { role: ROLE_USER content: "hi" } }'
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1.0}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
TOOL: dict[str, Any] = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}
OTHER_TOOL = {"type": "function", "name": "g"}


def item(**body: Any) -> item_pb2.Item:
    """The item of a body."""
    return read_openai(Fields(body, "body"), Form.RESPONSES)


def refusal(**body: Any) -> str:
    """What is said of a body that is wrong: the path of the field, and what it must be."""
    with pytest.raises(FieldError) as caught:
        _ = item(**{"input": "hi"} | body)
    return str(caught.value)


def parsed(text: str) -> item_pb2.Item:
    """An item in text format."""
    return text_format.Parse(text, item_pb2.Item())


def thought(*texts: str, **fields: Any) -> dict[str, Any]:
    """A reasoning item."""
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text} for text in texts], **fields}


# -- The conversation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("hi", 'messages { role: ROLE_USER content: "hi" }'),
        ([USER], 'messages { role: ROLE_USER content: "hi" }'),
        (
            [{"type": "message", "id": "m", "status": "completed", **USER}],
            'messages { role: ROLE_USER content: "hi" }',
        ),
        (
            [{"role": "developer", "content": "be kind"}, {"role": "system", "content": "and short"}, USER],
            'messages { role: ROLE_SYSTEM content: "be kind" } messages { role: ROLE_SYSTEM content: "and short" }'
            'messages { role: ROLE_USER content: "hi" }',
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "look"},
                        {"type": "input_image", "image_url": PICTURE, "detail": "high"},
                        {"type": "input_text", "text": "here"},
                    ],
                }
            ],
            'messages { role: ROLE_USER content: "look\\nhere" images: "PNG" }',
        ),
        (
            # An answer as it came, and the next question.
            [
                USER,
                thought("hm", id="rs_1", encrypted_content="xyz", status="completed"),
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "phase": "final_answer",
                    "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}],
                },
                {"role": "user", "content": "why?"},
            ],
            'messages { role: ROLE_USER content: "hi" }'
            'messages { role: ROLE_ASSISTANT content: "yes" thinking: "hm" }'
            'messages { role: ROLE_USER content: "why?" }',
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, USER],
            'messages { role: ROLE_USER content: "hi" } messages { role: ROLE_ASSISTANT content: "no" }'
            'messages { role: ROLE_USER content: "hi" }',
        ),
        (
            [USER, CALL, OUTPUT],
            'messages { role: ROLE_USER content: "hi" }'
            'messages { role: ROLE_ASSISTANT tool_calls { id: "c1" name: "f" arguments_json: \'{"a": 1.0}\' } }'
            'messages { role: ROLE_TOOL content: "sunny" tool_name: "f" tool_call_id: "c1" }',
        ),
        (
            # Calls beside each other, words before and between, thoughts twice: one message.
            [
                USER,
                thought("first", "second"),
                {"role": "assistant", "content": "I look."},
                CALL,
                thought("third"),
                {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
                {"role": "assistant", "content": "So."},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "B"}]},
                OUTPUT,
            ],
            'messages { role: ROLE_USER content: "hi" }'
            'messages { role: ROLE_ASSISTANT content: "I look.\\nSo." thinking: "first\\nsecond\\nthird"'
            ' tool_calls { id: "c1" name: "f" arguments_json: \'{"a": 1.0}\' }'
            ' tool_calls { id: "c2" name: "g" arguments_json: "{}" } }'
            'messages { role: ROLE_TOOL content: "B" tool_name: "g" tool_call_id: "c2" }'
            'messages { role: ROLE_TOOL content: "sunny" tool_name: "f" tool_call_id: "c1" }',
        ),
        (
            # The thoughts themselves go before their summary.
            [
                thought("short", content=[{"type": "reasoning_text", "text": "long"}]),
                {"role": "assistant", "content": "a"},
                USER,
            ],
            'messages { role: ROLE_ASSISTANT content: "a" thinking: "long" }'
            'messages { role: ROLE_USER content: "hi" }',
        ),
    ],
)
def test_input(given: object, messages: str) -> None:
    """Things beside each other become messages that hold them."""
    assert item(input=given) == parsed(f"chat {{ {messages} }}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "body.input: is missing"),
        ("", "body.input: is empty"),
        ([], "body.input: is empty"),
        (7, "body.input: must be text or a list of items, not a whole number"),
        (["hi"], "body.input[0]: must be an object, not text"),
        ([{}], "body.input[0].type: is missing; it must be one of message, function_call, "),
        ([{"type": "web_search_call"}], "body.input[0].type: must be one of message, function_call, "),
        ([{"type": "item_reference", "id": "x"}], "body.input[0].type: must not be item_reference: nothing is kept"),
        ([{"role": "tool", "content": "x"}], "body.input[0].role: must be one of user, assistant, system, developer"),
        ([{"type": "message", "content": "x"}], "body.input[0].role: must be one of user, assistant"),
        ([{"role": "user"}], "body.input[0].content: is missing"),
        ([{"role": "user", "content": 7}], "body.input[0].content: must be text or a list of parts"),
        ([{"role": "user", "content": "x", "n": 1}], "body.input[0].n: not known here"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "body.input[0].content[0].type: must be inp",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "body.input[0].content[0].type: must be input_text"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "body.input[0].content[0].text: is missing"),
        (
            [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}],
            'body.input[0].content[0].type: must be input_text, input_image or output_text, not "input_file"',
        ),
        (
            [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}],
            "body.input[0].content[0].file_id: must be left out",
        ),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "https://a.b/c.png"}]}],
            "body.input[0].content[0].image_url: must be a data: URL",
        ),
        ([USER, {**CALL, "call_id": ""}], "body.input[1].call_id: is missing"),
        ([USER, {**CALL, "name": None}], "body.input[1].name: is missing"),
        ([USER, {**CALL, "arguments": "{"}], "body.input[1].arguments: not JSON"),
        ([USER, OUTPUT], 'body.input[1].call_id: is "c1", and no function_call before it has that'),
        ([USER, CALL, {**OUTPUT, "call_id": None}], "body.input[2].call_id: is missing"),
        ([USER, CALL, {**OUTPUT, "output": None}], "body.input[2].output: is missing"),
        ([USER, thought("hm")], "body.input[1]: is reasoning without the assistant's message or call behind it"),
        ([thought("hm"), USER], "body.input[0]: is reasoning without"),
        ([CALL, thought("hm"), OUTPUT], "body.input[1]: is reasoning without"),
        (
            [{"type": "reasoning", "summary": [], "encrypted_content": "x"}],
            "body.input[0].encrypted_content: cannot ",
        ),
        (
            [{"type": "reasoning", "summary": [{"type": "text"}]}],
            "body.input[0].summary[0].type: must be summary_text",
        ),
    ],
)
def test_input_that_is_wrong(given: object, said: str) -> None:
    """By its place in the list."""
    assert refusal(input=given).startswith(said)


# -- Around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"model": "m"}, 'model: "m"'),
        (
            {"max_output_tokens": 9, "temperature": 0.5, "top_p": 1},
            "options { num_predict: 9 temperature: 0.5 top_p: 1 }",
        ),
        ({"options": {"num_ctx": 512}, "max_output_tokens": 1}, "options { num_predict: 1 runner { num_ctx: 512 } }"),
        ({"truncation": "auto"}, "chat { truncate: true }"),
        ({"truncation": "disabled"}, "chat { truncate: false }"),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, "chat { think: THINK_OFF }"),
        ({"reasoning": {"effort": "minimal"}}, "chat { think: THINK_LOW }"),
        ({"reasoning": {"effort": "medium", "generate_summary": "concise"}}, "chat { think: THINK_MEDIUM }"),
        ({"reasoning": {"effort": "high"}}, "chat { think: THINK_HIGH }"),
        ({"reasoning": {"effort": "xhigh"}}, "chat { think: THINK_MAX }"),
        ({"reasoning": {"summary": "detailed"}}, ""),
        ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, ""),
        ({"text": {"format": {"type": "json_object"}}}, "chat { format { json: true } }"),
        (
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "n",
                        "description": "d",
                        "strict": True,
                        "schema": {"type": "object"},
                    }
                }
            },
            'chat { format { json_schema: \'{"type":"object"}\' } }',
        ),
        ({"top_logprobs": 3}, "chat { logprobs { top: 3 } }"),
        ({"include": ["message.output_text.logprobs"]}, "chat { logprobs { } }"),
        (
            {"tools": [{**TOOL, "strict": False}], "tool_choice": "auto", "parallel_tool_calls": True},
            'chat { tools { name: "f" description: "d" parameters_json: \'{"type":"object"}\' } }',
        ),
        ({"tools": [TOOL], "tool_choice": "none"}, ""),
        (
            {
                "tools": [TOOL, OTHER_TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "g"}],
                },
            },
            'chat { tools { name: "g" } }',
        ),
        (
            {
                "metadata": {"a": "b"},
                "store": True,
                "user": "u",
                "safety_identifier": "s",
                "prompt_cache_key": "k",
                "prompt_cache_retention": "24h",
                "service_tier": "flex",
                "max_tool_calls": 3,
                "parallel_tool_calls": False,
                "background": False,
                "stream": False,
                "previous_response_id": None,
                "conversation": None,
            },
            "",
        ),
    ],
)
def test_settings(fields: dict[str, Any], more: str) -> None:
    """What a conversation can be asked for; what keeps OpenAI's books changes nothing."""
    expected = parsed(HI)
    expected.MergeFrom(parsed(more))
    assert item(input="hi", **fields) == expected


def test_instructions_go_first() -> None:
    """As a system message, before those of the conversation."""
    made = item(instructions="be kind", input=[{"role": "system", "content": "and short"}, USER])
    assert [message.content for message in made.chat.messages] == ["be kind", "and short", "hi"]
    assert made.chat.messages[0].role == item_pb2.ROLE_SYSTEM


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"previous_response_id": "resp_1"}, "body.previous_response_id: must be left out: nothing is kept"),
        ({"conversation": "conv_1"}, "body.conversation: must be left out"),
        ({"prompt": {"id": "p"}}, "body.prompt: must be left out"),
        ({"background": True}, "body.background: must be false"),
        ({"stream": True}, "body.stream: must be false"),
        ({"tools": [{"type": "web_search"}]}, 'body.tools[0].type: must be function, not "web_search"'),
        ({"tools": [TOOL, {"type": "mcp"}]}, 'body.tools[1].type: must be function, not "mcp"'),
        ({"tools": [{"name": "f"}]}, "body.tools[0].type: must be function, and is missing"),
        ({"tools": [{"type": "function"}]}, "body.tools[0].name: is missing"),
        ({"tools": [{**TOOL, "parameters": []}]}, "body.tools[0].parameters: must be a JSON schema"),
        ({"tools": [{**TOOL, "strict": True}]}, "body.tools[0].strict: must be false"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "body.tools[0].name: is missing"),
        ({"tools": [TOOL], "tool_choice": "required"}, "body.tool_choice: must be auto, none or allowed_tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
            "body.tool_choice.type: must be allowed_tools",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}},
            "body.tool_choice.mode: must be auto",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [OTHER_TOOL]}},
            "body.tool_choice.tools[0]: is none of the functions in tools",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "body.tool_choice.tools: is missing"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "body.parallel_tool_calls: must be true"),
        (
            {"text": {"format": {"type": "grammar"}}},
            "body.text.format.type: must be text, json_object or json_schema",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "body.text.format.schema: must be a JSON schema",
        ),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "body.text.format.name: is missing"),
        ({"text": {"verbosity": "low"}}, "body.text.verbosity: must be medium"),
        ({"reasoning": {"effort": "some"}}, "body.reasoning.effort: must be one of none, minimal, low"),
        ({"reasoning": {"mode": "pro"}}, "body.reasoning.mode: not known here"),
        ({"reasoning": {"summary": "all"}}, "body.reasoning.summary: must be one of auto, concise, detailed"),
        ({"truncation": "middle"}, "body.truncation: must be one of auto, disabled"),
        ({"include": ["file_search_call.results"]}, "body.include[0]: must be message.output_text.logprobs"),
        ({"top_logprobs": 21}, "body.top_logprobs: must be from 0 to 20"),
        ({"max_output_tokens": 0}, "body.max_output_tokens: is 0; it must be 1 or more"),
        ({"temperature": 2.5}, "body.temperature: is 2.5; it may be 0 to 2"),
        ({"top_p": -0.5}, "body.top_p: is -0.5; it may be 0 to 1"),
        ({"max_output_tokens": 1, "options": {"num_predict": 1}}, "body.max_output_tokens: says again"),
        ({"metadata": {"a": 1}}, "body.metadata: must hold texts only"),
        ({"metadata": "a"}, "body.metadata: must be an object"),
        ({"user": 7}, "body.user: must be text"),
        ({"keep_alive": "1h"}, "body.keep_alive: belongs to the whole batch"),
        ({"max_tokens": 7}, "body.max_tokens: not known here"),
        ({"messages": [USER]}, "body.messages: not known here"),
    ],
)
def test_settings_that_cannot_be_honoured(fields: dict[str, Any], said: str) -> None:
    """By their names."""
    assert refusal(**fields).startswith(said)
