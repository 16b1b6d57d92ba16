"""Results as Ollama's own answers, not streamed; and errors in its shape: `{"error": "…"}`."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import PlainTextResponse

from unisono.core.model import FinishReason
from unisono.edge.status import utf8

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from unisono.core.events import Result
    from unisono.core.model import Completion, Timings, TokenLogprob, ToolCall


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """An error as Ollama writes it: its text alone."""
    return {"error": utf8(message)}


def no_route(request: Request, status: int) -> Response:
    """A path or a method that is none, as Ollama says it."""
    is_method = status == HTTPStatus.METHOD_NOT_ALLOWED
    text = "405 method not allowed" if is_method else f"{status} page not found"
    return PlainTextResponse(text, status_code=status)


def chat_answer(result: Result, done: Completion, at_ns: int) -> dict[str, object]:
    """What `/api/chat` would have answered."""
    message: dict[str, object] = {"role": "assistant", "content": utf8(done.content)}
    if done.thinking:
        message["thinking"] = utf8(done.thinking)
    if done.tool_calls:
        message["tool_calls"] = _tool_calls(done.tool_calls)
    return {"model": utf8(done.model), "created_at": moment(at_ns), "message": message, **_end(result, done)}


def generate_answer(result: Result, done: Completion, at_ns: int) -> dict[str, object]:
    """What `/api/generate` would have answered, but for `context`, which only one backend could go on with."""
    value: dict[str, object] = {
        "model": utf8(done.model),
        "created_at": moment(at_ns),
        "response": utf8(done.content),
    }
    if done.thinking:
        value["thinking"] = utf8(done.thinking)
    if done.tool_calls:
        value["tool_calls"] = _tool_calls(done.tool_calls)
    return value | _end(result, done)


def moment(at_ns: int) -> str:
    """A moment as Ollama writes it, to the nanosecond, in UTC."""
    seconds, rest = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


def _end(result: Result, done: Completion) -> dict[str, object]:
    """What stands at an answer's end. Durations are nanoseconds; what was not measured is absent."""
    value: dict[str, object] = {"done": True, "done_reason": _reason(done)}
    if done.logprobs:
        value["logprobs"] = _logprobs(done.logprobs)
    if result.timings is not None:
        value |= _durations(result.timings)
    if result.usage is not None:
        value["prompt_eval_count"] = result.usage.prompt_tokens
        value["eval_count"] = result.usage.completion_tokens
    return value


def _reason(done: Completion) -> str:
    """Ollama says `stop` after calls of tools too."""
    if done.finish_reason_raw:
        return utf8(done.finish_reason_raw)
    return FinishReason.STOP.value if done.finish_reason is FinishReason.TOOL_CALLS else done.finish_reason.value


def _durations(timings: Timings) -> Mapping[str, int]:
    found = {
        "total_duration": timings.total_s,
        "load_duration": timings.load_s,
        "prompt_eval_duration": timings.prompt_eval_s,
        "eval_duration": timings.eval_s,
    }
    return {name: nanoseconds(seconds) for name, seconds in found.items() if seconds is not None}


def nanoseconds(seconds: float) -> int:
    """A span as Ollama writes it."""
    return round(seconds * 1e9)


def _tool_calls(calls: Iterable[ToolCall]) -> list[dict[str, object]]:
    return [
        {
            **({"id": utf8(call.id)} if call.id else {}),
            "function": {
                "index": number,
                "name": utf8(call.name),
                # As the model wrote them: the order of keys, and how numbers are written.
                "arguments": msgspec.Raw(utf8(call.arguments_json or "{}").encode()),
            },
        }
        for number, call in enumerate(calls)
    ]


def _logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, object]]:
    return [{**_logprob(one), "top_logprobs": [_logprob(top) for top in one.top]} for one in tokens]


def _logprob(one: TokenLogprob) -> dict[str, object]:
    return {"token": utf8(one.token), "logprob": one.logprob, "bytes": list(one.bytes)}
