"""LangChain's messages as the contract has them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, ToolMessage

from unisono_client.items import Message, ToolCall

_ROLES: Final = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


def to_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Raises ValueError for a kind of message, or of content, that the contract does not know."""
    return [_message(each) for each in messages]


def _message(given: BaseMessage) -> Message:
    role = (
        given.role if isinstance(given, ChatMessage) else _ROLES.get(given.type.removesuffix("MessageChunk").lower())
    )
    if role is None:
        raise ValueError(f"a message of the type {given.type!r} cannot be sent")
    text, images = _content(given.content)
    calls = given.tool_calls if isinstance(given, AIMessage) else ()
    return Message(
        role,
        text,
        images=images,
        thinking=str(given.additional_kwargs.get("reasoning_content", "")),
        tool_calls=[ToolCall(each["name"], each["args"], each["id"] or "") for each in calls],
        tool_name=given.name or "" if isinstance(given, ToolMessage) else "",
        tool_call_id=given.tool_call_id if isinstance(given, ToolMessage) else "",
    )


def _content(content: str | Sequence[str | Mapping[str, Any]]) -> tuple[str, list[bytes]]:
    """Text, and pictures."""
    if isinstance(content, str):
        return content, []
    texts: list[str] = []
    images: list[bytes] = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif (kind := block.get("type")) == "text":
            texts.append(str(block["text"]))
        elif kind in {"image", "image_url"}:
            images.append(_image(block))
        elif kind not in {"tool_use", "tool_call", "reasoning", "thinking"}:
            raise ValueError(f"content of the type {kind!r} cannot be sent; there are: text, image, image_url")
    return "".join(texts), images


def _image(block: Mapping[str, Any]) -> bytes:
    """The bytes of a picture: from base64, or from a `data:` address. No other address is opened."""
    for name in ("base64", "data"):
        if isinstance(block.get(name), str):
            return base64.b64decode(block[name])
    url = block.get("image_url", block.get("url", ""))
    url = str(url.get("url", "")) if isinstance(url, Mapping) else str(url)
    if not url.startswith("data:"):
        raise ValueError("a picture is sent as base64, or as a data: address; addresses are not opened")
    return base64.b64decode(url.partition(",")[2])
