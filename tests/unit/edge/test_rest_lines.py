"""Lines of OpenAI's batch files: what is wrong with them, what items they become, and results as lines."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from unisono.app.file_lines import joined
from unisono.core.batch import BadItem
from unisono.core.errors import (
    BackendUnavailableError,
    BatchDeadlineError,
    CancelledItemError,
    InvalidRequestError,
    ItemTimeoutError,
    UnisonoError,
    Violation,
)
from unisono.core.events import Result, ResultPart
from unisono.core.files import FileBatch
from unisono.core.limits import Limits
from unisono.core.model import ChatRequest, Completion, EmbedRequest, FinishReason, Item, ItemState, Usage
from unisono.edge.rest.lines import MAX_ERRORS, MAX_LINES, FileCheck, OpenAILines

CHAT = "/v1/chat/completions"
BATCH = FileBatch(batch_id="batch_7", input_file_id="f", endpoint=CHAT, window="24h", expires_ns=9, created_ns=1)


def line(**changes: Any) -> bytes:
    """A good line but for some changes; a change to None leaves the field out."""
    value = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": []}} | changes
    return json.dumps({name: field for name, field in value.items() if field is not None}).encode()


def found(*lines: bytes | None, **settings: Any) -> list[tuple[int | None, str, str | None]]:
    """Line, code and param of everything that is wrong."""
    check = FileCheck(CHAT, **settings)
    for number, text in enumerate(lines, 1):
        check.read(number, text)
    check.end()
    assert all(one.message for one in check.errors)
    return [(one.line, one.code, one.param) for one in check.errors]


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b"7", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b'{"custom_id": NaN}', "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (None, "invalid_json_line", None),
        (line(custom_id=None), "missing_required_parameter", "custom_id"),
        (line(method=None), "missing_required_parameter", "method"),
        (line(url=None), "missing_required_parameter", "url"),
        (line(body=None), "missing_required_parameter", "body"),
        (line(custom_id=["a"]), "invalid_value", "custom_id"),
        (line(custom_id=""), "invalid_value", "custom_id"),
        (line(custom_id="a" * 257), "invalid_value", "custom_id"),
        (line(custom_id="a\nb"), "invalid_value", "custom_id"),
        (line(method=7), "invalid_value", "method"),
        (line(method="post"), "invalid_method", "method"),
        (line(url=7), "invalid_value", "url"),
        (line(url="/v1/embeddings"), "url_mismatch", "url"),
        (line(url="https://api.openai.com" + CHAT), "url_mismatch", "url"),
        (line(body="text"), "invalid_value", "body"),
        (line(body={"stream": True}), "unsupported_value", "body.stream"),
        (line(body={"stream": "yes"}), "unsupported_value", "body.stream"),
    ],
)
def test_a_line_that_cannot_stand_in_a_batch(text: bytes | None, code: str, param: str | None) -> None:
    """By its number, with a name for programs and the field."""
    assert found(line(custom_id="first"), text) == [(2, code, param)]


def test_lines_that_can() -> None:
    """What is inside of a body is judged when it becomes an item; a number may be an id."""
    good = [line(), line(custom_id="b", body={}), line(custom_id=7), line(custom_id="c", body={"stream": False})]
    assert found(*good) == []


def test_an_id_that_is_used_twice() -> None:
    """The number 7 is the text "7"; the message has the line that was first."""
    check = FileCheck(CHAT)
    for number, custom_id in enumerate(["7", "8", 7], 4):
        check.read(number, line(custom_id=custom_id))
    (error,) = check.errors
    assert (error.line, error.code) == (6, "duplicate_custom_id")
    assert "line 4" in error.message


def test_a_file_without_lines() -> None:
    """Is none."""
    assert found() == [(None, "empty_file", None)]


def test_the_last_line_that_is_taken_and_the_next() -> None:
    """50,000; after the first that is too many, nothing is looked at."""
    assert MAX_LINES == 50_000
    lines = [line(custom_id=str(number)) for number in range(MAX_LINES + 2)]
    assert found(*lines[:MAX_LINES]) == []
    assert found(*lines) == [(MAX_LINES + 1, "too_many_tasks", None)]
    check = FileCheck(CHAT, max_lines=2)
    for number, text in enumerate(lines[:3], 1):
        assert not check.is_enough
        check.read(number, text)
    assert check.is_enough


def test_a_file_that_is_wrong_throughout() -> None:
    """The first hundred are told."""
    assert found(*[b"{"] * 1_000) == [(number, "invalid_json_line", None) for number in range(1, MAX_ERRORS + 1)]


# -- Items -----------------------------------------------------------------------------------------------------


def item(body: dict[str, Any], endpoint: str = CHAT) -> Item | BadItem:
    """What becomes of a line."""
    return OpenAILines(Limits()).item(line(body=body, url=endpoint), endpoint)


def test_a_good_body_is_an_item() -> None:
    """With its id, model and options."""
    made = item({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})
    assert isinstance(made, Item)
    assert isinstance(made.request, ChatRequest)
    assert (made.item_id, made.model, made.options.num_predict) == ("a", "m", 5)
    vectors = item({"model": "m", "input": "text"}, "/v1/embeddings")
    assert isinstance(vectors, Item)
    assert isinstance(vectors.request, EmbedRequest)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"prompt": "?"}, "messages"),
        ({"messages": "?"}, "messages"),
        ({"messages": [{"role": "nobody", "content": "?"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "?"}], "temprature": 1}, "temprature"),
        ({"messages": [{"role": "user", "content": "?"}], "n": 2}, "n"),
    ],
)
def test_a_bad_body_fails_alone(body: dict[str, Any], field: str) -> None:
    """With the field, from the body on."""
    made = item(body)
    assert isinstance(made, BadItem)
    assert made.item_id == "a"
    assert [violation.field for violation in made.violations] == [field]


# -- Results ---------------------------------------------------------------------------------------------------


def written(**fields: Any) -> tuple[dict[str, Any], bool]:
    """A result as a line, and whether it is an answer."""
    usual: dict[str, Any] = {"item_id": "a", "index": 3, "state": ItemState.FAILED}
    text, is_answer = OpenAILines(Limits()).result(BATCH, Result(**usual | fields), 5_000_000_000)
    assert text.endswith(b"\n")
    value: dict[str, Any] = json.loads(text)
    assert set(value) == {"id", "custom_id", "response", "error"}
    assert (value["id"], value["custom_id"]) == ("batch_req_7-3", "a")
    return value, is_answer


def test_an_answer() -> None:
    """In OpenAI's words."""
    done = Completion(model="m", content="Hi", finish_reason=FinishReason.STOP, finish_reason_raw="stop")
    value, is_answer = written(
        state=ItemState.COMPLETED, completion=done, usage=Usage(prompt_tokens=2, completion_tokens=1)
    )
    assert is_answer
    assert value["error"] is None
    assert (value["response"]["status_code"], value["response"]["request_id"]) == (200, "req_7-3")
    body = value["response"]["body"]
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 5, "m")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi"}
    assert body["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (
            InvalidRequestError("wrong", violations=[Violation(field="chat.messages[0].role", description="?")]),
            400,
            "invalid_request_error",
            "invalid_request",
            "messages[0].role",
        ),
        (BackendUnavailableError("away"), 503, "server_error", "backend_unavailable", None),
        (ItemTimeoutError("late"), 504, "server_error", "item_timeout", None),
        (None, 500, "server_error", "internal", None),
    ],
)
def test_a_failure(error: UnisonoError | None, status: int, kind: str, code: str, param: str | None) -> None:
    """As it would have been answered by itself; at the top, there is no error."""
    value, is_answer = written(error=error)
    assert not is_answer
    assert value["error"] is None
    assert value["response"]["status_code"] == status
    body = value["response"]["body"]["error"]
    assert (body["type"], body["code"], body["param"]) == (kind, code, param)
    assert body["message"]


@pytest.mark.parametrize(
    ("error", "code"), [(BatchDeadlineError("late"), "batch_expired"), (CancelledItemError("c"), "batch_cancelled")]
)
def test_what_never_ran(error: UnisonoError, code: str) -> None:
    """Has no response."""
    value, is_answer = written(error=error)
    assert not is_answer
    assert value["response"] is None
    assert value["error"]["code"] == code


def test_a_result_in_parts_is_put_together() -> None:
    """Each part before what the result itself holds; one without an answer has none."""
    done = Completion(model="m", content="c", finish_reason=FinishReason.STOP, finish_reason_raw="stop")
    result = Result(item_id="a", index=0, state=ItemState.COMPLETED, completion=done, parts=2)
    parts = [ResultPart(item_id="a", index=0, part=part, content=text) for part, text in enumerate("ab")]
    whole = joined(parts, result)
    assert whole.completion is not None
    assert (whole.completion.content, whole.parts) == ("abc", 0)
    assert joined([], result) is result


@pytest.mark.parametrize(("asked", "temperature"), [("a", 0.5), ("b", None), (None, None)])
def test_a_response_has_the_settings_of_its_own_line_only(asked: str | None, temperature: float | None) -> None:
    """Not of one that stands where it stood in another batch of the file; and none where there is no line."""
    batch = replace(BATCH, endpoint="/v1/responses")
    done = Completion(model="m", content="Hi", finish_reason=FinishReason.STOP, finish_reason_raw="stop")
    result = Result(item_id="a", index=3, state=ItemState.COMPLETED, completion=done, usage=Usage())
    text = None if asked is None else line(custom_id=asked, body={"input": "Hi", "temperature": 0.5})
    value = json.loads(OpenAILines(Limits()).result(batch, result, 5_000_000_000, text)[0])
    assert value["response"]["body"]["temperature"] == temperature
