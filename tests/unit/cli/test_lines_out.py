"""A result's line has the form of the line that asked."""

# ruff: noqa: E501  # a result in text format

import json

from google.protobuf import text_format
from openai.types.responses import Response

from tests.unit.cli.fake_server import status
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.batchfile.line import Form
from unisono.edge.cli.lines_in import Origin
from unisono.edge.cli.lines_out import Ended, to_line

ANSWER = """
item_id: "a" index: 5 state: ITEM_STATE_COMPLETED attempts: 2 shared_with: 7 passes: 12 group: 0
release_reason: RELEASE_REASON_PREFIX_HELD disturbed: 1
completion { model: "tiny" content: "Ünter \\"quotes\\"" thinking: "hm" finish_reason: FINISH_REASON_STOP finish_reason_raw: "stop" }
usage { prompt_tokens: 10 cached_prompt_tokens: 4 completion_tokens: 12 }
timings { queued { nanos: 1500000 } slot_wait { nanos: 0 } total { seconds: 2 nanos: 123456789 } }
"""


def line(result: str, form: Form = Form.PLAIN, error: object = None) -> object:
    """The line of a result in text format, read back."""
    parsed = text_format.Parse(result, event_pb2.Result())
    if error is not None:
        parsed.error.CopyFrom(error)  # type: ignore[arg-type]
    origin = Origin(item_id="a", position=6, line=9, form=form)
    written = to_line(Ended(origin=origin, result=parsed, batch_id="b-1", time_s=1700000000))
    assert written.endswith(b"\n")
    assert written.count(b"\n") == 1
    return json.loads(written)


def test_plain_answer() -> None:
    """Everything that is known of an answer; the index is the line's place among the file's items."""
    assert line(ANSWER) == {
        "id": "a",
        "index": 6,
        "state": "completed",
        "model": "tiny",
        "content": 'Ünter "quotes"',
        "thinking": "hm",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "completion_tokens": 12, "cached_prompt_tokens": 4},
        "timings_ms": {"queued": 1.5, "slot_wait": 0.0, "total": 2123.457},
        "attempts": 2,
        "passes": 12,
        "shared_with": 7,
        "release_reason": "prefix_held",
        "disturbed": 1,
    }


def test_plain_failure() -> None:
    """A reason for programs, a message for people with the fields at fault."""
    error = status("INVALID_REQUEST", "wrong", ("options.top_p", "must be from 0 to 1"))
    assert line("state: ITEM_STATE_EXPIRED attempts: 1", error=error) == {
        "id": "a",
        "index": 6,
        "state": "expired",
        "attempts": 1,
        "passes": 0,
        "shared_with": 0,
        "error": {"reason": "INVALID_REQUEST", "message": "wrong; options.top_p: must be from 0 to 1"},
    }


def test_a_reason_of_a_newer_service() -> None:
    """Is no word that is known here."""
    assert line("state: ITEM_STATE_COMPLETED release_reason: 99")["release_reason"] == "unknown"  # type: ignore[index]


def test_plain_tools_vectors_and_logprobs() -> None:
    """Arguments are the object itself, its keys and numbers as the model wrote them; vectors are exact."""
    result = text_format.Parse(
        """state: ITEM_STATE_COMPLETED completion { finish_reason: FINISH_REASON_TOOL_CALLS
        tool_calls { id: "c" name: "f" arguments_json: '{"z":1.50,"a":10000000000000000000000}' }
        tool_calls { name: "g" arguments_json: 'not JSON' }
        logprobs { token: "x" logprob: -0.5 bytes: "x" top { token: "y" logprob: -1 bytes: "y" } } }""",
        event_pb2.Result(),
    )
    origin = Origin(item_id="a", position=0, line=1, form=Form.PLAIN)
    written = to_line(Ended(origin=origin, result=result, batch_id="b", time_s=0)).decode()
    assert '"arguments":{"z":1.50,"a":10000000000000000000000}}' in written
    value = json.loads(written)
    assert value["finish_reason"] == "tool_calls"
    assert value["tool_calls"][1] == {"id": "", "name": "g", "arguments": "not JSON"}
    assert value["logprobs"] == [
        {
            "token": "x",
            "logprob": -0.5,
            "bytes": [120],
            "top_logprobs": [{"token": "y", "logprob": -1.0, "bytes": [121]}],
        }
    ]

    value = line("state: ITEM_STATE_COMPLETED completion { embeddings { values: 0.1 values: 16777216 } }")
    assert isinstance(value, dict)
    assert value["embeddings"] == [[0.100000001, 16777216.0]]
    assert "content" not in value
    assert value["finish_reason"] == "unknown"


def test_openai_chat() -> None:
    """OpenAI's batch output with a chat.completion in it."""
    assert line(ANSWER, Form.CHAT) == {
        "id": "batch_req_b-1-6",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req_b-1-6",
            "body": {
                "id": "chatcmpl-b-1-6",
                "object": "chat.completion",
                "created": 1700000000,
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": 'Ünter "quotes"', "reasoning": "hm"},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": 12,
                    "total_tokens": 22,
                    "prompt_tokens_details": {"cached_tokens": 4},
                },
            },
        },
        "error": None,
    }


def test_openai_response() -> None:
    """A whole response, with what was asked for where that is known."""
    parsed = text_format.Parse(ANSWER, event_pb2.Result())
    for settings, user in (({"user": "u"}, "u"), (None, None)):
        origin = Origin(item_id="a", position=6, line=9, form=Form.RESPONSES, settings=settings)
        value = json.loads(to_line(Ended(origin=origin, result=parsed, batch_id="b-1", time_s=1700000000)))
        assert (value["id"], value["custom_id"], value["error"]) == ("batch_req_b-1-6", "a", None)
        response = Response.model_validate_json(json.dumps(value["response"]["body"]), strict=True)
        assert (response.id, response.output_text, response.user) == ("resp_b-1-6", 'Ünter "quotes"', user)


def test_openai_tool_calls_and_logprobs() -> None:
    """Arguments stay text, as OpenAI has them; a call without an id gets one."""
    value = line(
        """state: ITEM_STATE_COMPLETED completion { finish_reason: FINISH_REASON_TOOL_CALLS
        tool_calls { name: "f" arguments_json: '{"z":1}' } logprobs { token: "x" logprob: -0.5 } }""",
        Form.CHAT,
    )
    assert isinstance(value, dict)
    (choice,) = value["response"]["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == [
        {"id": "call_b-1-6_0", "type": "function", "function": {"name": "f", "arguments": '{"z":1}'}}
    ]
    assert choice["logprobs"] == {"content": [{"token": "x", "logprob": -0.5, "bytes": [], "top_logprobs": []}]}


def test_openai_completions() -> None:
    """A text_completion, with its own shape of log probabilities."""
    value = line(
        """state: ITEM_STATE_COMPLETED completion { model: "tiny" content: "so" finish_reason: FINISH_REASON_LENGTH
        logprobs { token: "so" logprob: -0.5 top { token: "to" logprob: -1 } } } usage { completion_tokens: 1 }""",
        Form.COMPLETIONS,
    )
    assert isinstance(value, dict)
    assert value["response"]["body"] == {
        "id": "cmpl-b-1-6",
        "object": "text_completion",
        "created": 1700000000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "so",
                "logprobs": {"tokens": ["so"], "token_logprobs": [-0.5], "top_logprobs": [{"to": -1.0}]},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 1},
    }


def test_openai_embeddings() -> None:
    """A list of embeddings."""
    value = line(
        'state: ITEM_STATE_COMPLETED completion { model: "e" embeddings { values: 1 } embeddings { values: 2 } }'
        " usage { prompt_tokens: 3 }",
        Form.EMBEDDINGS,
    )
    assert isinstance(value, dict)
    assert value["response"]["body"] == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0]},
            {"object": "embedding", "index": 1, "embedding": [2.0]},
        ],
        "model": "e",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


def test_openai_failure() -> None:
    """No response, and the error under OpenAI's names."""
    error = status("MODEL_NOT_FOUND", "no such model")
    assert line("state: ITEM_STATE_FAILED", Form.CHAT, error) == {
        "id": "batch_req_b-1-6",
        "custom_id": "a",
        "response": None,
        "error": {"code": "MODEL_NOT_FOUND", "message": "no such model"},
    }
