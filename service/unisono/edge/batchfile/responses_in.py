"""The body of OpenAI's `/v1/responses` to an item of the contract: a conversation, written as a list of things.

Messages, calls of functions, their outputs and reasoning stand beside each other there; a conversation has them
inside of its messages. What needs something that is kept between requests, or is OpenAI's own (its tools, files,
conversations), is refused by name.
"""

from __future__ import annotations

from typing import Final

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.body import BOOKKEEPING, check_one_answer, read_options, refuse_keep_alive
from unisono.edge.batchfile.fields import FieldError, Fields, check_text, name_of, quote, to_json
from unisono.edge.batchfile.messages import (
    CANNOT_BE_MADE,
    EFFORTS,
    ROLES,
    check_parallel_calls,
    data_url,
    read_arguments,
)

_ITEM_TYPES: Final = ("message", "function_call", "function_call_output", "reasoning")
_NOTHING_KEPT: Final = "must be left out: nothing is kept from one request to the next; write the whole conversation"
_KEPT: Final = ("previous_response_id", "conversation", "prompt")
_LOGPROBS: Final = "message.output_text.logprobs"
_SUMMARIES: Final = ("auto", "concise", "detailed")
_OPTIONS: Final = {"max_output_tokens": "num_predict", "temperature": "temperature", "top_p": "top_p"}
# What items of a conversation have that says nothing to a model.
_OF_ITEMS: Final = ("id", "status", "phase")
_BREAKPOINT: Final = "prompt_cache_breakpoint"


def read_response(fields: Fields) -> item_pb2.Item:
    """The item, still without an id. Raises FieldError."""
    for name in _KEPT:
        if fields.has(name):
            raise fields.wrong(name, _NOTHING_KEPT)
    item = item_pb2.Item(model=fields.text("model") or "")
    chat = item.chat
    instructions = fields.text("instructions")
    if instructions:
        chat.messages.add(role=item_pb2.ROLE_SYSTEM, content=instructions)
    chat.messages.extend(_Conversation().read(fields))
    chat.tools.extend(_take_tools(fields))
    if (shape := _take_format(fields)) is not None:
        chat.format.CopyFrom(shape)
    if (think := _take_think(fields)) is not None:
        chat.think = think
    if (logprobs := _take_logprobs(fields)) is not None:
        chat.logprobs.CopyFrom(logprobs)
    if (truncation := _word(fields, "truncation", "auto", "disabled")) is not None:
        chat.truncate = truncation == "auto"
    options = read_options(fields, beside=_OPTIONS)
    _check_range(fields, options)
    if options.ByteSize():
        item.options.CopyFrom(options)
    _take_metadata(fields)
    check_one_answer(fields)
    if fields.flag("background"):
        raise fields.wrong("background", "must be false: the batch itself runs in the background")
    refuse_keep_alive(fields)
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        _ = fields.text(name)
    _ = fields.flag("store")
    # Calls of OpenAI's own tools, of which there are none; and how long its caches last.
    _ = fields.whole("max_tool_calls", 0, 2**31 - 1)
    fields.skip("prompt_cache_options", "prompt_cache_retention", *BOOKKEEPING)
    fields.end()
    return item


# -- The conversation ------------------------------------------------------------------------------------------


class _Conversation:
    """Messages, as they are made of `input`."""

    def __init__(self) -> None:
        self._messages: list[item_pb2.Message] = []
        # What was thought before the assistant's next words, and where that stands.
        self._thinking = ""
        self._thought_at: Fields | None = None
        # Of each call, the function.
        self._called: dict[str, str] = {}

    def read(self, fields: Fields) -> list[item_pb2.Message]:
        """The field `input`, which must be there."""
        given = fields.value("input")
        if given is None or given in ("", []):
            raise fields.wrong("input", "is missing" if given is None else "is empty")
        if isinstance(given, str):
            return [item_pb2.Message(role=item_pb2.ROLE_USER, content=check_text(given, fields.at("input")))]
        if not isinstance(given, list):
            raise fields.wrong("input", f"must be text or a list of items, not {name_of(given)}")
        for number, value in enumerate(given):
            self._take(Fields(value, f"{fields.at('input')}[{number}]"))
        self._refuse_lone_thought()
        return self._messages

    def _take(self, entry: Fields) -> None:
        kind = entry.text("type")
        if kind is None and entry.has("role"):
            kind = "message"
        if kind == "message":
            self._take_message(entry)
        elif kind == "function_call":
            self._take_call(entry)
        elif kind == "function_call_output":
            self._take_output(entry)
        elif kind == "reasoning":
            self._take_reasoning(entry)
        elif kind == "item_reference":
            raise entry.wrong("type", "must not be item_reference: nothing is kept that it could refer to")
        else:
            what = "is missing; it must" if kind is None else "must"
            hint = "" if kind is None else f", not {quote(kind)}"
            raise entry.wrong("type", f"{what} be one of {', '.join(_ITEM_TYPES)}{hint}")
        entry.skip(*_OF_ITEMS)
        entry.end()

    def _take_message(self, entry: Fields) -> None:
        name = entry.text("role")
        role = None if name in (None, "tool") else ROLES.get(name or "")
        if role is None:
            hint = f"not {quote(name)}" if name else "and is missing"
            raise entry.wrong("role", f"must be one of user, assistant, system, developer, {hint}")
        message = item_pb2.Message(role=role)
        _take_content(entry, "content", message)
        if role != item_pb2.ROLE_ASSISTANT:
            self._refuse_lone_thought()
            self._messages.append(message)
            return
        last = self._messages[-1] if self._messages else None
        if last is not None and last.role == role and last.tool_calls:
            # Words that stand between a call and its output are of the message that calls.
            last.content = "\n".join(filter(None, (last.content, message.content)))
            last.images.extend(message.images)
            self._think(last)
            return
        self._think(message)
        self._messages.append(message)

    def _take_call(self, entry: Fields) -> None:
        call_id, name = entry.text("call_id"), entry.text("name")
        if not call_id or not name:
            raise entry.wrong("name" if call_id else "call_id", "is missing")
        call = item_pb2.ToolCall(id=call_id, name=name, arguments_json=read_arguments(entry, "arguments"))
        self._called[call_id] = name
        if not self._messages or self._messages[-1].role != item_pb2.ROLE_ASSISTANT:
            self._messages.append(item_pb2.Message(role=item_pb2.ROLE_ASSISTANT))
        last = self._messages[-1]
        last.tool_calls.append(call)
        self._think(last)

    def _take_output(self, entry: Fields) -> None:
        self._refuse_lone_thought()
        call_id = entry.text("call_id")
        if not call_id:
            raise entry.wrong("call_id", "is missing")
        if call_id not in self._called:
            raise entry.wrong("call_id", f"is {quote(call_id)}, and no function_call before it has that")
        # It may name its function as well.
        _ = entry.text("name")
        message = item_pb2.Message(role=item_pb2.ROLE_TOOL, tool_call_id=call_id, tool_name=self._called[call_id])
        _take_content(entry, "output", message)
        self._messages.append(message)

    def _take_reasoning(self, entry: Fields) -> None:
        texts = [_text_of(part, "reasoning_text") for part in entry.children("content") or ()]
        texts = texts or [_text_of(part, "summary_text") for part in entry.children("summary") or ()]
        # Where the thoughts themselves stand there too, what is encrypted says them again.
        entry.skip("summary")
        if entry.has("encrypted_content") and not texts:
            raise entry.wrong("encrypted_content", "cannot be read here; leave the item out, or give its summary")
        entry.skip("encrypted_content")
        self._thinking = "\n".join(filter(None, (self._thinking, *texts)))
        self._thought_at = entry

    def _think(self, message: item_pb2.Message) -> None:
        """What was thought before is of this message."""
        if self._thinking:
            message.thinking = "\n".join(filter(None, (message.thinking, self._thinking)))
        self._thinking, self._thought_at = "", None

    def _refuse_lone_thought(self) -> None:
        if self._thought_at is not None:
            raise FieldError(self._thought_at.path, "is reasoning without the assistant's message or call behind it")


def _take_content(entry: Fields, name: str, message: item_pb2.Message) -> None:
    """Text, or parts: texts are joined with line breaks, pictures follow in their order."""
    content = entry.value(name)
    if isinstance(content, str):
        message.content = check_text(content, entry.at(name))
        return
    if not isinstance(content, list):
        what = "is missing" if content is None else f"must be text or a list of parts, not {name_of(content)}"
        raise entry.wrong(name, what)
    texts: list[str] = []
    for number, value in enumerate(content):
        part = Fields(value, f"{entry.at(name)}[{number}]")
        kind = part.text("type")
        if kind in ("input_text", "output_text"):
            texts.append(_needed(part, "text"))
            part.skip("annotations", "logprobs", _BREAKPOINT)
        elif kind == "refusal":
            texts.append(_needed(part, "refusal"))
        elif kind == "input_image":
            if part.has("file_id"):
                raise part.wrong("file_id", "must be left out: write the picture itself, a data: URL in image_url")
            message.images.append(data_url(_needed(part, "image_url"), part.at("image_url")))
            # How closely to look: an Ollama model has one way.
            part.skip("detail", _BREAKPOINT)
        else:
            hint = "and is missing" if kind is None else f"not {quote(kind)}"
            raise part.wrong("type", f"must be input_text, input_image or output_text, {hint}")
        part.end()
    message.content = "\n".join(texts)


def _text_of(part: Fields, kind: str) -> str:
    if part.text("type") != kind:
        raise part.wrong("type", f"must be {kind}")
    text = _needed(part, "text")
    part.end()
    return text


def _needed(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if text is None:
        raise fields.wrong(name, "is missing")
    return text


# -- Around it -------------------------------------------------------------------------------------------------


def _take_tools(fields: Fields) -> list[item_pb2.Tool]:
    """The functions that the model may call: those of `tools` that `tool_choice` leaves."""
    tools = [_tool(tool) for tool in fields.children("tools") or ()]
    check_parallel_calls(fields, tools)
    choice = fields.value("tool_choice")
    if choice is None or choice == "auto":
        return tools
    if choice == "none":
        return []
    if not isinstance(choice, dict):
        raise fields.wrong(
            "tool_choice", f"must be auto, none or allowed_tools, not {quote(choice)}: {CANNOT_BE_MADE}"
        )
    inner = Fields(choice, fields.at("tool_choice"))
    if (kind := inner.text("type")) != "allowed_tools":
        raise inner.wrong("type", f"must be allowed_tools, not {quote(kind)}: {CANNOT_BE_MADE}")
    if (mode := inner.text("mode")) not in (None, "auto"):
        raise inner.wrong("mode", f"must be auto, not {quote(mode)}: {CANNOT_BE_MADE}")
    if (listed := inner.children("tools")) is None:
        raise inner.wrong("tools", "is missing")
    allowed = {_allowed(one, tools) for one in listed}
    inner.end()
    return [tool for tool in tools if tool.name in allowed]


def _tool(fields: Fields) -> item_pb2.Tool:
    kind = fields.text("type")
    if kind != "function":
        hint = "and is missing" if kind is None else f"not {quote(kind)}"
        raise fields.wrong("type", f"must be function, {hint}: only the caller's own functions can be called")
    name = fields.text("name")
    if not name:
        raise fields.wrong("name", "is missing")
    tool = item_pb2.Tool(name=name, description=fields.text("description") or "")
    parameters = fields.value("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise fields.wrong("parameters", f"must be a JSON schema, an object, not {name_of(parameters)}")
        tool.parameters_json = to_json(parameters, fields.at("parameters"))
    if fields.flag("strict"):
        raise fields.wrong("strict", "must be false: arguments are not held to their schema")
    fields.end()
    return tool


def _allowed(fields: Fields, tools: list[item_pb2.Tool]) -> str:
    kind, name = fields.text("type"), fields.text("name")
    if kind != "function" or not any(tool.name == name for tool in tools):
        raise FieldError(fields.path, "is none of the functions in tools")
    fields.end()
    return name or ""


def _take_format(fields: Fields) -> item_pb2.ResponseFormat | None:
    """`text`: the shape of the answer."""
    text = fields.child("text")
    if text is None:
        return None
    shape = text.child("format")
    if text.text("verbosity") not in (None, "medium"):
        raise text.wrong("verbosity", "must be medium: a model is as verbose as it is")
    text.end()
    if shape is None:
        return None
    kind = shape.text("type")
    found: item_pb2.ResponseFormat | None = None
    if kind == "json_object":
        found = item_pb2.ResponseFormat(json=True)
    elif kind == "json_schema":
        schema = shape.value("schema")
        if not isinstance(schema, dict):
            raise shape.wrong("schema", "must be a JSON schema, an object")
        found = item_pb2.ResponseFormat(json_schema=to_json(schema, shape.at("schema")))
        # Names and describes the schema, and asks to be held to it, which every answer is.
        _ = _needed(shape, "name")
        _ = shape.text("description")
        _ = shape.flag("strict")
    elif kind != "text":
        raise shape.wrong("type", f"must be text, json_object or json_schema, not {quote(kind)}")
    shape.end()
    return found


def _take_think(fields: Fields) -> item_pb2.Think.ValueType | None:
    """`reasoning`: how much the model thinks. What it thought is given whole, whatever summary is wanted."""
    reasoning = fields.child("reasoning")
    if reasoning is None:
        return None
    effort = _word(reasoning, "effort", *EFFORTS)
    for name in ("summary", "generate_summary"):
        _ = _word(reasoning, name, *_SUMMARIES)
    reasoning.end()
    return None if effort is None else EFFORTS[effort]


def _take_logprobs(fields: Fields) -> item_pb2.Logprobs | None:
    """`include` and `top_logprobs`."""
    top = fields.whole("top_logprobs", 0, 20)
    wanted = fields.texts("include") or []
    for number, name in enumerate(wanted):
        if name != _LOGPROBS:
            path = f"{fields.at('include')}[{number}]"
            raise FieldError(path, f"must be {_LOGPROBS}, not {quote(name)}: there is nothing else to include")
    return item_pb2.Logprobs(top=top or 0) if wanted or top else None


def _take_metadata(fields: Fields) -> None:
    """Is given back with the answer, so that it must be what OpenAI takes: texts."""
    value, path = fields.value("metadata"), fields.at("metadata")
    if not isinstance(value, dict | None):
        raise FieldError(path, f"must be an object, not {name_of(value)}")
    for key, text in (value or {}).items():
        if not isinstance(text, str):
            raise FieldError(path, f"must hold texts only, not {name_of(text)} ({quote(key)})")
        _ = check_text(key + text, path)


def _check_range(fields: Fields, options: item_pb2.Options) -> None:
    """By the names that this API has for them."""
    if options.HasField("num_predict") and options.num_predict < 1:
        raise fields.wrong("max_output_tokens", f"is {options.num_predict}; it must be 1 or more")
    ranges = (
        ("temperature", options.HasField("temperature"), options.temperature, 2),
        ("top_p", options.HasField("top_p"), options.top_p, 1),
    )
    for name, is_given, value, most in ranges:
        if is_given and not 0 <= value <= most:
            raise fields.wrong(name, f"is {value:g}; it may be 0 to {most}")


def _word(fields: Fields, name: str, *words: str) -> str | None:
    """One of some words."""
    word = fields.text(name)
    if word is not None and word not in words:
        raise fields.wrong(name, f"must be one of {', '.join(words)}, not {quote(word)}")
    return word
