"""Prompts and answers as the GenAI conventions' JSON. Nothing here is called unless content capture is turned on.

The shapes are those of the conventions' schemas `gen-ai-input-messages.json`, `gen-ai-output-messages.json` and
`gen-ai-system-instructions.json`. A text is cut where one span would hold more than `MAX_CONTENT_CHARS` of input or
of output, and pictures and vectors are described instead of copied: a collector refuses messages above 4 MiB, and
with them every span that travels in the same one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, assert_never

from unisono.core.model import ChatRequest, EmbedRequest, FinishReason, GenerateRequest, Role

if TYPE_CHECKING:
    from unisono.core.model import Completion, Item, Message, ToolCall

# Of the texts of one attribute together.
MAX_CONTENT_CHARS = 32_768
_CUT = "…"

_Json = dict[str, Any]


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot hold (half a surrogate pair, from a JSON escape) replaced by "?".

    One such text would make the whole message unsendable, and lose every span in it.
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class _Room:
    """What is left of `MAX_CONTENT_CHARS`."""

    def __init__(self) -> None:
        self._left = MAX_CONTENT_CHARS

    def take(self, text: str) -> str:
        """The text, cut to what is left."""
        taken = encodable(text if len(text) <= self._left else text[: self._left] + _CUT)
        self._left = max(0, self._left - len(text))
        return taken


def system_instructions(item: Item) -> str | None:
    """Instructions that stand apart from the conversation, as a prompt's `system` does; None for none."""
    request = item.request
    if not isinstance(request, GenerateRequest) or not request.system:
        return None
    return _dumps([_text(_Room().take(request.system))])


def input_messages(item: Item) -> str:
    """What the item asks, as a list of messages."""
    room = _Room()
    request = item.request
    match request:
        case ChatRequest():
            messages = [_message(message, room) for message in request.messages]
        case GenerateRequest():
            parts = [_text(room.take(request.prompt)), *map(_image, request.images)]
            messages = [{"role": Role.USER.value, "parts": parts}]
        case EmbedRequest():
            messages = [{"role": Role.USER.value, "parts": [_text(room.take(text))]} for text in request.input]
        case _:
            assert_never(request)
    return _dumps(messages)


def output_messages(completion: Completion) -> str:
    """What the item was answered, as a list of one message; its vectors are only counted."""
    room = _Room()
    parts: list[_Json] = []
    if completion.thinking:
        parts.append({"type": "reasoning", "content": room.take(completion.thinking)})
    if completion.content:
        parts.append(_text(room.take(completion.content)))
    parts.extend(_call(call, room) for call in completion.tool_calls)
    if completion.embeddings:
        parts.append({"type": "embeddings", "count": len(completion.embeddings)})
    reason = _FINISH_REASONS.get(completion.finish_reason, completion.finish_reason_raw or "stop")
    return _dumps([{"role": Role.ASSISTANT.value, "parts": parts, "finish_reason": encodable(reason)}])


# The schema's own words.
_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_call",
    FinishReason.EMBEDDED: "stop",
}


def _message(message: Message, room: _Room) -> _Json:
    parts: list[_Json] = []
    if message.thinking:
        parts.append({"type": "reasoning", "content": room.take(message.thinking)})
    if message.role is Role.TOOL:
        response = {"type": "tool_call_response", "response": room.take(message.content)}
        parts.append({**response, "id": encodable(message.tool_call_id)} if message.tool_call_id else response)
    elif message.content:
        parts.append(_text(room.take(message.content)))
    parts.extend(map(_image, message.images))
    parts.extend(_call(call, room) for call in message.tool_calls)
    return {"role": message.role.value, "parts": parts}


def _text(content: str) -> _Json:
    return {"type": "text", "content": content}


def _image(image: bytes) -> _Json:
    # The schema lets a part have a type of its own.
    return {"type": "image", "bytes": len(image)}


def _call(call: ToolCall, room: _Room) -> _Json:
    part = {"type": "tool_call", "name": encodable(call.name), "arguments": room.take(call.arguments_json)}
    return {**part, "id": encodable(call.id)} if call.id else part


def _dumps(value: list[_Json]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
