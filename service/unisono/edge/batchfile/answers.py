"""Answers of the service as bodies of OpenAI's API, of every endpoint that a batch may ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.edge.batchfile.line import Form
from unisono.edge.batchfile.responses_out import response_body

Settings = Mapping[str, object] | None

_REASONS: Final = {
    item_pb2.FINISH_REASON_STOP: "stop",
    item_pb2.FINISH_REASON_LENGTH: "length",
    item_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
    item_pb2.FINISH_REASON_EMBEDDED: "embedded",
}


def _chat_body(name: str, time_s: int, result: event_pb2.Result, _settings: Settings) -> dict[str, object]:
    completion = result.completion
    message: dict[str, object] = {"role": "assistant", "content": completion.content}
    if completion.thinking:
        message["reasoning"] = completion.thinking
    if completion.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{name}_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
            for number, call in enumerate(completion.tool_calls)
        ]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": logprobs_of(completion.logprobs)} if completion.logprobs else None,
        "finish_reason": finish_reason(completion),
    }
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": time_s,
        "model": completion.model,
        "choices": [choice],
        "usage": _usage(result.usage),
    }


def _text_body(name: str, time_s: int, result: event_pb2.Result, _settings: Settings) -> dict[str, object]:
    completion = result.completion
    logprobs = None
    if completion.logprobs:
        logprobs = {
            "tokens": [each.token for each in completion.logprobs],
            "token_logprobs": [each.logprob for each in completion.logprobs],
            "top_logprobs": [{top.token: top.logprob for top in each.top} for each in completion.logprobs],
        }
    return {
        "id": f"cmpl-{name}",
        "object": "text_completion",
        "created": time_s,
        "model": completion.model,
        "choices": [
            {
                "index": 0,
                "text": completion.content,
                "logprobs": logprobs,
                "finish_reason": finish_reason(completion),
            }
        ],
        "usage": _usage(result.usage),
    }


def _embeddings_body(_name: str, _time_s: int, result: event_pb2.Result, _settings: Settings) -> dict[str, object]:
    completion, tokens = result.completion, result.usage.prompt_tokens
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": number, "embedding": vector(embedding)}
            for number, embedding in enumerate(completion.embeddings)
        ],
        "model": completion.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


# A body, of a name that is the answer's own, the seconds since 1970 when it ended, its result, and what its request
# asked for, where that is known and stands in the body again.
BODIES: Final[Mapping[Form, Callable[[str, int, event_pb2.Result, Settings], dict[str, object]]]] = {
    Form.CHAT: _chat_body,
    Form.COMPLETIONS: _text_body,
    Form.EMBEDDINGS: _embeddings_body,
    Form.RESPONSES: response_body,
}


def _usage(usage: item_pb2.Usage) -> dict[str, object]:
    value: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.HasField("cached_prompt_tokens"):
        value["prompt_tokens_details"] = {"cached_tokens": usage.cached_prompt_tokens}
    return value


# -- Their parts -----------------------------------------------------------------------------------------------


def finish_reason(completion: item_pb2.Completion) -> str:
    """Why it ended, as OpenAI says it; the backend's own word where OpenAI has none."""
    return _REASONS.get(completion.finish_reason) or completion.finish_reason_raw or "unknown"


def logprobs_of(logprobs: Sequence[item_pb2.TokenLogprob]) -> list[dict[str, object]]:
    """The tokens, as OpenAI writes those of a chat."""
    return [
        {
            "token": each.token,
            "logprob": each.logprob,
            "bytes": list(each.bytes),
            "top_logprobs": [
                {"token": top.token, "logprob": top.logprob, "bytes": list(top.bytes)} for top in each.top
            ],
        }
        for each in logprobs
    ]


def vector(embedding: item_pb2.Embedding) -> list[float]:
    """The numbers."""
    # Nine figures are enough to tell any two 32-bit floats apart; more would be noise of the conversion.
    return [float(f"{value:.9g}") for value in embedding.values]
