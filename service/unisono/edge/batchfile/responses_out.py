"""An answer of the service as a whole Response object of OpenAI's API.

What the request asked for stands in it again. Whoever writes the answer may not have the request any more; then that
is null, or what it is where nothing was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from unisono._generated.unisono.v1 import event_pb2, item_pb2

# Whatever a request asked for that its answer has as it was written; and what that is where it did not.
_SAID_AGAIN: Final[Mapping[str, object]] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": None,
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}
_WHOLE: Final = ("max_output_tokens", "max_tool_calls", "top_logprobs")
_AS_TEXT: Final[Mapping[str, object]] = {"type": "text"}


def settings_of(body: Mapping[str, object]) -> dict[str, object]:
    """What a request's body, which was read without an error, asks for beside its input."""
    names = (*_SAID_AGAIN, "text", "reasoning", "tool_choice", "tools")
    settings = {name: body[name] for name in names if body.get(name) is not None}
    for name, value in settings.items():
        # 8.0 is a whole number to the reader, and must be one to whoever reads the answer.
        if name in _WHOLE and isinstance(value, float):
            settings[name] = int(value)
    return settings


def response_body(
    name: str, time_s: int, result: event_pb2.Result, settings: Mapping[str, object] | None
) -> dict[str, object]:
    """`settings`: see `settings_of`; None where they are not known."""
    asked = settings or {}
    completion = result.completion
    is_cut = completion.finish_reason == item_pb2.FINISH_REASON_LENGTH
    status = "incomplete" if is_cut else "completed"
    took_s = result.timings.total.ToNanoseconds() // 1_000_000_000
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": time_s - took_s,
        "completed_at": None if is_cut else time_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": completion.model,
        "output": _output(name, completion, status),
        "usage": _usage(result.usage),
        **{field: asked.get(field, default) for field, default in _SAID_AGAIN.items()},
        "tool_choice": _tool_choice(asked.get("tool_choice")),
        "text": _text(asked.get("text")),
        "reasoning": _reasoning(asked.get("reasoning")),
        "tools": _tools(asked.get("tools")),
        # What nothing here can have.
        "conversation": None,
        "previous_response_id": None,
        "prompt": None,
        "service_tier": None,
        "store": False,
    }


def _output(name: str, completion: item_pb2.Completion, status: str) -> list[dict[str, object]]:
    """What was thought, what was said, and what is called, in this order."""
    output: list[dict[str, object]] = []
    calls, is_cut = completion.tool_calls, status == "incomplete"
    if completion.thinking:
        output.append(
            {
                "id": f"rs_{name}",
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": completion.thinking}],
                "status": "incomplete" if is_cut and not completion.content else "completed",
            }
        )
    # What ended while it was thinking, or only calls, says nothing.
    if completion.content or not (calls or (is_cut and output)):
        output.append(
            {
                "id": f"msg_{name}",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [
                    {
                        "type": "output_text",
                        "text": completion.content,
                        "annotations": [],
                        "logprobs": [_logprob(each) for each in completion.logprobs],
                    }
                ],
            }
        )
    output += [
        {
            "id": f"fc_{name}_{number}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id or f"call_{name}_{number}",
            "name": call.name,
            "arguments": call.arguments_json,
        }
        for number, call in enumerate(calls)
    ]
    return output


def _logprob(each: item_pb2.TokenLogprob) -> dict[str, object]:
    top = [{"token": one.token, "logprob": one.logprob, "bytes": list(one.bytes)} for one in each.top]
    return {"token": each.token, "logprob": each.logprob, "bytes": list(each.bytes), "top_logprobs": top}


def _usage(usage: item_pb2.Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        # The backends do not count them apart.
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _text(asked: object) -> dict[str, object]:
    return {"format": _AS_TEXT, **_said(asked)}


def _reasoning(asked: object) -> dict[str, object]:
    return {"effort": None, "summary": None, **_said(asked)}


def _tool_choice(asked: object) -> object:
    return {"mode": "auto", **_said(asked)} if isinstance(asked, dict) else asked or "auto"


def _tools(asked: object) -> list[dict[str, object]]:
    """With all that a tool has here: none is held to its schema."""
    return [{"description": None, "parameters": None, "strict": False, **_said(tool)} for tool in _listed(asked)]


def _said(asked: object) -> dict[str, object]:
    return {name: value for name, value in asked.items() if value is not None} if isinstance(asked, dict) else {}


def _listed(asked: object) -> list[object]:
    return asked if isinstance(asked, list) else []
