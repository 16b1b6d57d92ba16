"""Messages of the contract → values of the core.

Theory of operation. What a value can hold is taken over as it is: whether it is *allowed* is for `core/limits.py`,
which judges items from every door alike. Refused here is only what no value can say: a role that is none, an answer's
shape that is missing, a request that is absent, a number of an enum or of a field that this service does not know;
and lists so long that converting them would itself be the harm. All that is wrong is listed, with paths, up to a
hundred places an item.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.unknown_fields import UnknownFieldSet

from unisono._generated.unisono.v1 import item_pb2
from unisono.core import batch, limits, model
from unisono.edge.contract.found import MAX_VIOLATIONS, Found

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ROLES: Final[Mapping[int, model.Role]] = {
    item_pb2.ROLE_SYSTEM: model.Role.SYSTEM,
    item_pb2.ROLE_USER: model.Role.USER,
    item_pb2.ROLE_ASSISTANT: model.Role.ASSISTANT,
    item_pb2.ROLE_TOOL: model.Role.TOOL,
}
_THINKS: Final[Mapping[int, model.Think | None]] = {
    item_pb2.THINK_UNSPECIFIED: None,
    item_pb2.THINK_OFF: model.Think.OFF,
    item_pb2.THINK_ON: model.Think.ON,
    item_pb2.THINK_LOW: model.Think.LOW,
    item_pb2.THINK_MEDIUM: model.Think.MEDIUM,
    item_pb2.THINK_HIGH: model.Think.HIGH,
    item_pb2.THINK_MAX: model.Think.MAX,
}

# Values that most items share; they are frozen.
_NO_OPTIONS: Final = model.Options()
_ANY_JSON: Final = model.Format()
LIMITS: Final = limits.Limits()


# -- Items -----------------------------------------------------------------------------------------------------


def items(
    messages: Sequence[item_pb2.Item], *, path: str = "items", bounds: limits.Limits = LIMITS
) -> list[model.Item | batch.BadItem]:
    """All items of a message. Raises InvalidRequestError where there are more than a batch may have at all."""
    found = Found()
    if len(messages) > bounds.max_items:
        found.add(path, f"has {len(messages):,} items; at most {bounds.max_items:,} are taken")
    found.raise_if_any("")
    return [item(one, bounds=bounds) for one in messages]


def item(message: item_pb2.Item, *, bounds: limits.Limits = LIMITS) -> model.Item | batch.BadItem:
    """The item with index 0, its model and options as they stand on it alone; or why it is none.

    Paths are from the item on: "chat.messages[0].role".
    """
    found = Found()
    options = options_of(message.options, "options", found) if message.HasField("options") else _NO_OPTIONS
    request: model.ChatRequest | model.GenerateRequest | model.EmbedRequest | None
    match message.WhichOneof("request"):
        case "chat":
            request = _chat(message.chat, found, bounds)
        case "generate":
            request = _generate(message.generate, found)
        case "embed":
            request = _embed(message.embed, found, bounds)
        case _:
            request = None
            is_newer = len(UnknownFieldSet(message)) > 0
            found.add("request", "is of a kind that this service does not know" if is_newer else _NO_REQUEST)
    if found.violations or request is None:
        n = message.n if 1 <= message.n <= limits.MAX_VARIANTS else 1
        return batch.BadItem(item_id=message.item_id, violations=tuple(found.violations[:MAX_VIOLATIONS]), n=n)
    return model.Item(
        item_id=message.item_id,
        index=0,
        request=request,
        model=message.model,
        options=options,
        n=message.n if message.HasField("n") else 1,
    )


_NO_REQUEST: Final = "is required: one of chat, generate, embed"


def _chat(message: item_pb2.ChatRequest, found: Found, bounds: limits.Limits) -> model.ChatRequest:
    messages: tuple[model.Message, ...] = ()
    if len(message.messages) > bounds.max_messages:
        found.add(
            "chat.messages", f"has {len(message.messages):,} messages; at most {bounds.max_messages:,} are taken"
        )
    else:
        messages = messages_of(message.messages, "chat.messages", found)
    tools: tuple[model.Tool, ...] = ()
    if len(message.tools) > bounds.max_tools:
        found.add("chat.tools", f"has {len(message.tools):,} tools; at most {bounds.max_tools:,} are taken")
    elif message.tools:
        tools = tuple(
            model.Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json)
            for tool in message.tools
        )
    return model.ChatRequest(
        messages=messages,
        tools=tools,
        format=_format(message.format, "chat.format", found) if message.HasField("format") else None,
        think=_think(message.think, "chat.think", found),
        top_logprobs=message.logprobs.top if message.HasField("logprobs") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
        shift=message.shift if message.HasField("shift") else None,
    )


def messages_of(messages: Sequence[item_pb2.Message], path: str, found: Found) -> tuple[model.Message, ...]:
    """Messages of a conversation, one after the other."""
    return tuple([_message(one, f"{path}[{i}]", found) for i, one in enumerate(messages) if not found.is_full])


def _message(message: item_pb2.Message, path: str, found: Found) -> model.Message:
    role = _ROLES.get(message.role)
    if role is None:
        found.add(f"{path}.role", _not_a_role(message.role))
        role = model.Role.USER  # stands in; the item is refused
    return model.Message(
        role=role,
        content=message.content,
        thinking=message.thinking,
        images=tuple(message.images),
        tool_calls=tuple([_tool_call(call) for call in message.tool_calls]) if message.tool_calls else (),
        tool_name=message.tool_name,
        tool_call_id=message.tool_call_id,
    )


def _not_a_role(number: int) -> str:
    what = f"is {number}, which is no role" if number else "is required"
    return f"{what}: one of ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL"


def _tool_call(message: item_pb2.ToolCall) -> model.ToolCall:
    """A call; one without arguments has an empty object, since that is how backends write it."""
    return model.ToolCall(id=message.id, name=message.name, arguments_json=message.arguments_json or "{}")


def _generate(message: item_pb2.GenerateRequest, found: Found) -> model.GenerateRequest:
    return model.GenerateRequest(
        prompt=message.prompt,
        suffix=message.suffix,
        system=message.system,
        template=message.template,
        raw=message.raw,
        images=tuple(message.images),
        format=_format(message.format, "generate.format", found) if message.HasField("format") else None,
        think=_think(message.think, "generate.think", found),
        top_logprobs=message.logprobs.top if message.HasField("logprobs") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
        shift=message.shift if message.HasField("shift") else None,
    )


def _embed(message: item_pb2.EmbedRequest, found: Found, bounds: limits.Limits) -> model.EmbedRequest:
    texts: tuple[str, ...] = ()
    if len(message.input) > bounds.max_inputs:
        found.add("embed.input", f"has {len(message.input):,} texts; at most {bounds.max_inputs:,} are taken")
    else:
        texts = tuple(message.input)
    return model.EmbedRequest(
        input=texts,
        dimensions=message.dimensions if message.HasField("dimensions") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
    )


def _format(message: item_pb2.ResponseFormat, path: str, found: Found) -> model.Format | None:
    match message.WhichOneof("kind"):
        case "json_schema":
            return model.Format(json_schema=message.json_schema)
        case "json" if message.json:
            return _ANY_JSON
        case "json":
            found.add(path, "has json: false; set it to true, or leave the format out for free text")
        case _:
            found.add(path, "is empty; set json or json_schema, or leave the format out for free text")
    return None


def _think(number: int, path: str, found: Found) -> model.Think | None:
    if number not in _THINKS:
        names = ", ".join(name for name in item_pb2.Think.keys() if name != "THINK_UNSPECIFIED")  # noqa: SIM118  # no dict
        found.add(path, f"is {number}, which is no way to think: one of {names}")
        return None
    return _THINKS[number]


# -- Options ---------------------------------------------------------------------------------------------------


def options_of(message: item_pb2.Options, path: str, found: Found) -> model.Options:
    """The options that are set. They have the same names in the contract and in the core, but for one."""
    found.refuse_unknown(message, path, "an option")
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        match value:
            case float():
                values[field.name] = shortest(value)
            case item_pb2.RunnerOptions():
                found.refuse_unknown(value, f"{path}.runner", "an option")
                runner = {one.name: number for one, number in value.ListFields()}
                values["runner"] = model.RunnerOptions(**runner)
            case _ if field.name == "stop":
                values["stop"] = tuple(value)
            case _ if field.name == "extra_options_json":
                values["extra_json"] = value
            case _:
                values[field.name] = value
    return model.Options(**values)


@lru_cache(maxsize=1024)
def shortest(value: float) -> float:
    """The shortest decimal that is the same number in 32 bits: 0.7 for what travelled as 0.699999988079071."""
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value
