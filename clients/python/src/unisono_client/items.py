"""What is asked: conversations, prompts and texts to embed, with the contract's own field names.

    Chat("Why is the sky blue?", system="Answer in one sentence.", options={"num_predict": 40})
    Chat([{"role": "user", "content": "Hello"}, Message("assistant", "Hi!"), Message("user", "Who are you?")])
    Generate("Once upon a time", raw=True)
    Embed(["first text", "second text"])

A plain string stands for a `Chat` of it. An item without `item_id` is named by its place in its batch: "0", "1", …
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from google.protobuf import message

from unisono_client._generated.unisono.v1 import item_pb2
from unisono_client.config import Options, build, check_names, invalid, mapping_of, options_of, plain
from unisono_client.errors import RefusedError

_M = TypeVar("_M", bound=message.Message)
# How an answer must be shaped: "json" for any JSON, or a JSON schema as a mapping or as text.
Format = Mapping[str, Any] | str
# Whether, and how much, a model thinks first.
Think = bool | Literal["low", "medium", "high", "max"]

_ROLES: Final = {
    "system": item_pb2.ROLE_SYSTEM,
    "user": item_pb2.ROLE_USER,
    "assistant": item_pb2.ROLE_ASSISTANT,
    "tool": item_pb2.ROLE_TOOL,
}
_THINK: Final = {
    True: item_pb2.THINK_ON,
    False: item_pb2.THINK_OFF,
    "low": item_pb2.THINK_LOW,
    "medium": item_pb2.THINK_MEDIUM,
    "high": item_pb2.THINK_HIGH,
    "max": item_pb2.THINK_MAX,
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model makes, or made."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    # The call's id, where the model gave one.
    id: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    # The JSON schema of its arguments; None: it has none.
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    # "system", "user", "assistant" or "tool".
    role: str
    content: str = ""
    # Pictures: the bytes of PNG, JPEG or WebP files.
    images: Sequence[bytes] = ()
    thinking: str = ""
    tool_calls: Sequence[ToolCall] = ()
    # For the role "tool": the function that answers, and the call that it answers.
    tool_name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    """What every kind of item has."""

    # The caller's name for the item, unique within its batch; None: its place in the batch.
    item_id: str | None = None
    # None: the batch's.
    model: str | None = None
    # Laid over the batch's, field by field.
    options: Options | None = None


@dataclass(frozen=True, slots=True)
class Chat(_Common):
    """A conversation, answered with the assistant's next message."""

    # A text stands for one message of the user's.
    messages: str | Sequence[Message | Mapping[str, Any]]
    # What comes first, as a message of the system's.
    system: str | None = field(default=None, kw_only=True)
    tools: Sequence[Tool | Mapping[str, Any]] = field(default=(), kw_only=True)
    format: Format | None = field(default=None, kw_only=True)
    think: Think | None = field(default=None, kw_only=True)
    # How many of the likeliest alternatives are told at each token, 0 to 20; None: no log probabilities.
    logprobs: int | None = field(default=None, kw_only=True)
    truncate: bool | None = field(default=None, kw_only=True)
    shift: bool | None = field(default=None, kw_only=True)
    # How many answers: each has a result of its own, "ID#1" to "ID#n".
    n: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Generate(_Common):
    """A prompt, completed."""

    prompt: str
    suffix: str = field(default="", kw_only=True)
    system: str = field(default="", kw_only=True)
    template: str = field(default="", kw_only=True)
    raw: bool = field(default=False, kw_only=True)
    images: Sequence[bytes] = field(default=(), kw_only=True)
    format: Format | None = field(default=None, kw_only=True)
    think: Think | None = field(default=None, kw_only=True)
    logprobs: int | None = field(default=None, kw_only=True)
    truncate: bool | None = field(default=None, kw_only=True)
    shift: bool | None = field(default=None, kw_only=True)
    n: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Embed(_Common):
    """Texts to embed; a result has one vector for each, in this order."""

    input: str | Sequence[str]
    dimensions: int | None = field(default=None, kw_only=True)
    truncate: bool | None = field(default=None, kw_only=True)


# What can be asked: Chat, Generate or Embed. A string is a Chat; a message of the contract is sent as it is.
Item = str | _Common | item_pb2.Item


def check_items(items: object) -> None:
    """Raises RefusedError where these are no items, but one: a text would be as many as it has letters."""
    if isinstance(items, str | bytes | _Common | item_pb2.Item | Mapping):
        raise invalid("items", f"is a single {type(items).__name__}; give a list of items, or use `infer`")
    if not isinstance(items, Iterable | AsyncIterable):
        raise invalid("items", f"is {type(items).__name__}; give str, Chat, Generate or Embed, in a list or the like")


def to_message(asked: Item, place: int) -> item_pb2.Item:
    """An item as the contract has it; `place` names one that has no name. Raises RefusedError where it cannot be."""
    try:
        match asked:
            case item_pb2.Item():
                made = asked
            case str():
                made = _item(Chat(asked))
                made.chat.CopyFrom(_chat(Chat(asked)))
            case Chat():
                made = _item(asked)
                made.chat.CopyFrom(_chat(asked))
            case Generate():
                made = _item(asked)
                made.generate.CopyFrom(_generate(asked))
            case Embed():
                made = _item(asked)
                texts = [asked.input] if isinstance(asked.input, str) else asked.input
                made.embed.CopyFrom(_build(item_pb2.EmbedRequest, asked, ("dimensions", "truncate"), input=texts))
            case _:
                raise invalid("", f"is {type(asked).__name__}; give str, Chat, Generate or Embed")
    except RefusedError as wrong:
        at = wrong.fields[0]
        raise invalid(f"items[{place}].{at.field}".rstrip("."), at.description) from None
    except (TypeError, ValueError, KeyError) as error:
        raise invalid(f"items[{place}]", str(error)) from error
    if not made.item_id:
        if made is asked:
            made = item_pb2.Item()
            made.CopyFrom(asked)
        made.item_id = str(place)
    return made


def messages_of(messages: object, path: str = "messages") -> list[item_pb2.Message]:
    """Messages as the contract has them. Raises RefusedError for what is none."""
    if isinstance(messages, str):
        return [item_pb2.Message(role=item_pb2.ROLE_USER, content=messages)]
    return [_message(each, f"{path}[{place}]") for place, each in enumerate(_list(messages, path, "messages"))]


def _list(given: object, path: str, what: str) -> list[Any]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable) or hasattr(given, "model_dump"):
        raise invalid(path, f"is {type(given).__name__}; give a list of {what}")
    return list(given)


def _build(kind: type[_M], asked: object, names: Sequence[str], **more: object) -> _M:
    """A message with the fields of these names, where they are given, and more."""
    fields = {name: value for name in names if (value := getattr(asked, name)) is not None}
    return build(kind, {**fields, **{name: value for name, value in more.items() if value is not None}}, "")


def _item(asked: Chat | Generate | Embed) -> item_pb2.Item:
    names = ("item_id", "model") if isinstance(asked, Embed) else ("item_id", "model", "n")
    return _build(item_pb2.Item, asked, names, options=options_of(asked.options))


def _chat(asked: Chat) -> item_pb2.ChatRequest:
    messages = messages_of(asked.messages)
    if asked.system is not None:
        if not isinstance(asked.system, str):
            raise invalid("system", f"is {type(asked.system).__name__}; give a str")
        messages.insert(0, item_pb2.Message(role=item_pb2.ROLE_SYSTEM, content=asked.system))
    return _build(
        item_pb2.ChatRequest,
        asked,
        ("truncate", "shift"),
        messages=messages,
        tools=[_tool(each, f"tools[{place}]") for place, each in enumerate(_list(asked.tools, "tools", "tools"))],
        format=_format(asked.format),
        think=_think(asked.think),
        logprobs=_logprobs(asked.logprobs),
    )


def _generate(asked: Generate) -> item_pb2.GenerateRequest:
    return _build(
        item_pb2.GenerateRequest,
        asked,
        ("prompt", "suffix", "system", "template", "raw", "truncate", "shift"),
        images=_images(asked.images, "images"),
        format=_format(asked.format),
        think=_think(asked.think),
        logprobs=_logprobs(asked.logprobs),
    )


def _message(given: Any, path: str) -> item_pb2.Message:
    if isinstance(given, Message):
        made = given
    else:
        if not isinstance(given, Mapping) and not hasattr(given, "model_dump"):
            raise invalid(path, f"is {type(given).__name__}; give a Message, or {{'role': 'user', 'content': '…'}}")
        fields = mapping_of(given, path)
        if not isinstance(given, Mapping) and "images" in fields:
            # Ollama's own messages: as they are, and not as text.
            fields["images"] = given.images
        check_names(fields, Message.__dataclass_fields__, path)
        if "role" not in fields:
            raise invalid(f"{path}.role", f"is absent; there are: {', '.join(_ROLES)}")
        made = Message(**{name: value for name, value in fields.items() if value is not None})
    if made.role not in _ROLES:
        raise invalid(f"{path}.role", f"is {made.role!r}; there are: {', '.join(_ROLES)}")
    fields = {
        "role": _ROLES[made.role],
        "content": made.content,
        "thinking": made.thinking,
        "images": _images(made.images, f"{path}.images"),
        "tool_calls": [_tool_call(each) for each in _list(made.tool_calls, f"{path}.tool_calls", "calls")],
        "tool_name": made.tool_name,
        "tool_call_id": made.tool_call_id,
    }
    return build(item_pb2.Message, fields, path)


def _images(given: object, path: str) -> list[bytes]:
    """Pictures; Ollama's own `Image` has the bytes as its `value`."""
    images: list[bytes] = []
    for place, each in enumerate(_list(given, path, "pictures, each the bytes of a file")):
        image = getattr(each, "value", each)
        if not isinstance(image, bytes):
            told = f"is {type(image).__name__}; give the bytes of the picture, as Path(…).read_bytes() has them"
            raise invalid(f"{path}[{place}]", told)
        images.append(image)
    return images


def _logprobs(top: object) -> item_pb2.Logprobs | None:
    if top is None:
        return None
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise invalid("logprobs", f"is {top!r}; give how many alternatives are told at each token, 0 to 20")
    return item_pb2.Logprobs(top=top)


def _tool_call(given: ToolCall | Mapping[str, Any]) -> item_pb2.ToolCall:
    """Also as OpenAI and Ollama write it: `{"function": {"name": …, "arguments": …}}`."""
    if isinstance(given, ToolCall):
        return item_pb2.ToolCall(id=given.id, name=given.name, arguments_json=json.dumps(given.arguments))
    function = given.get("function", given)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return item_pb2.ToolCall(id=given.get("id") or "", name=function["name"], arguments_json=text)


def _tool(given: object, path: str) -> item_pb2.Tool:
    """Also as OpenAI and Ollama write it: `{"type": "function", "function": {…}}`."""
    if not isinstance(given, Tool):
        whole = plain(given)
        function = whole.get("function", whole) if isinstance(whole, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            told = f"is {type(given).__name__}; give a Tool, with the JSON schema of its arguments"
            raise invalid(path, told)
        given = Tool(function["name"], function.get("description", ""), function.get("parameters"))
    parameters = "" if given.parameters is None else json.dumps(given.parameters)
    fields = {"name": given.name, "description": given.description, "parameters_json": parameters}
    return build(item_pb2.Tool, fields, path)


def _format(given: object) -> item_pb2.ResponseFormat | None:
    if given is None:
        return None
    if given == "json":
        return item_pb2.ResponseFormat(json=True)
    if not isinstance(given, str | Mapping):
        raise invalid(
            "format",
            f"is {type(given).__name__}; give 'json' or a JSON schema: of a pydantic model, its model_json_schema()",
        )
    return item_pb2.ResponseFormat(json_schema=given if isinstance(given, str) else json.dumps(given))


def _think(given: object) -> item_pb2.Think.ValueType:
    if given is None:
        return item_pb2.THINK_UNSPECIFIED
    if not isinstance(given, bool | str) or given not in _THINK:
        raise invalid("think", f"is {given!r}; there are: {', '.join(map(repr, _THINK))}")
    return _THINK[given]
