"""Results to lines of JSON, in the form of the line that asked: OpenAI's batch output, or a plain one."""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec
from google.protobuf.duration_pb2 import Duration

from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.edge.batchfile.answers import BODIES, finish_reason, logprobs_of, vector
from unisono.edge.batchfile.line import Form
from unisono.edge.cli.errors import problem_of_status
from unisono.edge.cli.lines_in import Origin

STATES = {
    event_pb2.ITEM_STATE_COMPLETED: "completed",
    event_pb2.ITEM_STATE_FAILED: "failed",
    event_pb2.ITEM_STATE_CANCELLED: "cancelled",
    event_pb2.ITEM_STATE_EXPIRED: "expired",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An item that ended, with what its line of output needs."""

    origin: Origin
    # Whole: parts already put together.
    result: event_pb2.Result
    # Empty for a line that was never sent.
    batch_id: str
    # When it ended, in seconds since 1970.
    time_s: int


def to_line(ended: Ended) -> bytes:
    """A line of JSON, with its line break."""
    value = _plain(ended) if ended.origin.form is Form.PLAIN else _openai(ended)
    return msgspec.json.encode(value) + b"\n"


# -- Plain -----------------------------------------------------------------------------------------------------


def _plain(ended: Ended) -> dict[str, object]:
    result, origin = ended.result, ended.origin
    value: dict[str, object] = {
        "id": origin.item_id,
        "index": origin.position,
        "state": STATES.get(result.state, "failed"),
    }
    if result.HasField("completion"):
        value |= _plain_completion(result.completion)
    if result.HasField("usage"):
        value["usage"] = _usage(result.usage)
    if result.HasField("timings"):
        value["timings_ms"] = {field.name: _milliseconds(duration) for field, duration in result.timings.ListFields()}
    value |= {
        "attempts": result.attempts,
        "passes": result.passes,
        "shared_with": result.shared_with,
    }
    if result.release_reason:
        value["release_reason"] = release_reason(result)
    if result.disturbed:
        value["disturbed"] = result.disturbed
    if result.HasField("error"):
        problem = problem_of_status(result.error)
        value["error"] = {"reason": problem.reason, "message": problem.text}
    return value


def _plain_completion(completion: item_pb2.Completion) -> dict[str, object]:
    value: dict[str, object] = {"model": completion.model}
    if completion.embeddings:
        value["embeddings"] = [vector(embedding) for embedding in completion.embeddings]
    else:
        value["content"] = completion.content
    if completion.thinking:
        value["thinking"] = completion.thinking
    if completion.tool_calls:
        value["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": _object(call.arguments_json)}
            for call in completion.tool_calls
        ]
    if completion.logprobs:
        value["logprobs"] = logprobs_of(completion.logprobs)
    value["finish_reason"] = finish_reason(completion)
    return value


def _object(text: str) -> object:
    """JSON text as it stands, where it is JSON; else as text, so that nothing is lost."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return msgspec.Raw(text.encode())


# -- OpenAI ----------------------------------------------------------------------------------------------------


def _openai(ended: Ended) -> dict[str, object]:
    result, origin = ended.result, ended.origin
    name = f"{ended.batch_id or 'unsent'}-{origin.position}"
    value: dict[str, object] = {
        "id": f"batch_req_{name}",
        "custom_id": origin.item_id,
        "response": None,
        "error": None,
    }
    if result.HasField("completion"):
        value["response"] = {
            "status_code": 200,
            "request_id": f"req_{name}",
            "body": BODIES[origin.form](name, ended.time_s, result, origin.settings),
        }
    else:
        problem = problem_of_status(result.error)
        value["error"] = {"code": problem.reason, "message": problem.text}
    return value


# -- Both ------------------------------------------------------------------------------------------------------


def release_reason(result: event_pb2.Result) -> str:
    """Why an item was the next to go, as a word: "prefix_held"."""
    names = {number: name for name, number in event_pb2.ReleaseReason.items()}
    return names.get(result.release_reason, "unknown").removeprefix("RELEASE_REASON_").lower()


def _usage(usage: item_pb2.Usage) -> dict[str, int]:
    value = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    if usage.HasField("cached_prompt_tokens"):
        value["cached_prompt_tokens"] = usage.cached_prompt_tokens
    return value


def _milliseconds(duration: Duration) -> float:
    return round(duration.ToNanoseconds() / 1e6, 3)
