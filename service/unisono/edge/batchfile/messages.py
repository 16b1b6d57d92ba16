"""Messages, tools, pictures and formats, as OpenAI and Ollama write them, to the contract's."""

from __future__ import annotations

import base64
import binascii
import re

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.fields import FieldError, Fields, check_text, name_of, parse_json, quote, to_json

ROLES = {
    "system": item_pb2.ROLE_SYSTEM,
    "developer": item_pb2.ROLE_SYSTEM,  # OpenAI's newer name for it
    "user": item_pb2.ROLE_USER,
    "assistant": item_pb2.ROLE_ASSISTANT,
    "tool": item_pb2.ROLE_TOOL,
}
_THINK: dict[bool | str, item_pb2.Think.ValueType] = {
    False: item_pb2.THINK_OFF,
    True: item_pb2.THINK_ON,
    "low": item_pb2.THINK_LOW,
    "medium": item_pb2.THINK_MEDIUM,
    "high": item_pb2.THINK_HIGH,
    "max": item_pb2.THINK_MAX,
}
# Ollama's models know fewer levels than OpenAI; these stand for those that are nearest.
EFFORTS = {
    "none": item_pb2.THINK_OFF,
    "minimal": item_pb2.THINK_LOW,
    "low": item_pb2.THINK_LOW,
    "medium": item_pb2.THINK_MEDIUM,
    "high": item_pb2.THINK_HIGH,
    "xhigh": item_pb2.THINK_MAX,
    "max": item_pb2.THINK_MAX,
}
# Why a call cannot be required.
CANNOT_BE_MADE = "a model cannot be made to call"
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


def take_messages(fields: Fields) -> list[item_pb2.Message]:
    """The field `messages`, which must be there and hold one at least."""
    messages = fields.children("messages")
    if not messages:
        raise fields.wrong("messages", "must hold at least one message")
    return [_message(message) for message in messages]


def _message(fields: Fields) -> item_pb2.Message:
    role_name = fields.text("role")
    if role_name is None:
        raise fields.wrong("role", f"is missing; it must be one of {', '.join(ROLES)}")
    role = ROLES.get(role_name)
    if role is None:
        raise fields.wrong("role", f"must be one of {', '.join(ROLES)}, not {quote(role_name)}")
    message = item_pb2.Message(role=role)

    content = fields.value("content")
    if isinstance(content, list):
        _take_parts(content, fields.at("content"), message)
    elif isinstance(content, str):
        message.content = check_text(content, fields.at("content"))
    elif content is not None:
        raise fields.wrong("content", f"must be text or a list of parts, not {name_of(content)}")

    message.thinking = fields.text("thinking") or fields.text("reasoning") or ""
    message.images.extend(take_images(fields))
    for call in fields.children("tool_calls") or ():
        message.tool_calls.append(_tool_call(call))
    if role == item_pb2.ROLE_TOOL:
        # Ollama's tool_name was once `name`, which is also what OpenAI calls it.
        message.tool_name = fields.text("tool_name") or fields.text("name") or ""
        message.tool_call_id = fields.text("tool_call_id") or ""
    if content is None and not (message.images or message.tool_calls):
        raise fields.wrong("content", "is missing")
    fields.end()
    return message


def _take_parts(parts: list[object], path: str, message: item_pb2.Message) -> None:
    """OpenAI's parts: texts are joined with line breaks, pictures follow in their order."""
    texts: list[str] = []
    for number, value in enumerate(parts):
        part = Fields(value, f"{path}[{number}]")
        kind = part.text("type")
        if kind == "text":
            text = part.text("text")
            if text is None:
                raise part.wrong("text", "is missing")
            texts.append(text)
        elif kind == "image_url":
            message.images.append(_image_url(part))
        elif kind is None:
            raise part.wrong("type", "is missing; it must be text or image_url")
        else:
            raise part.wrong("type", f"must be text or image_url, not {quote(kind)}")
        part.end()
    message.content = "\n".join(texts)


def _image_url(part: Fields) -> bytes:
    image = part.child("image_url")
    url = image.text("url") if image else None
    if image is None or url is None:
        raise part.wrong("image_url.url", "is missing")
    image.text("detail")  # how closely to look: an Ollama model has one way
    image.end()
    return data_url(url, image.at("url"))


def data_url(url: str, path: str) -> bytes:
    """The picture in a data: URL."""
    start = _DATA_URL.match(url)
    if not start:
        raise FieldError(
            path, "must be a data: URL (data:image/png;base64,…); pictures are not fetched from elsewhere"
        )
    return _decode(url[start.end() :], path)


def take_images(fields: Fields) -> list[bytes]:
    """The field `images`: base64, as Ollama takes it."""
    return [
        _decode(text, f"{fields.at('images')}[{number}]") for number, text in enumerate(fields.texts("images") or ())
    ]


def _decode(text: str, path: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise FieldError(path, "is not base64") from None
    if not data:
        raise FieldError(path, "is empty; it must be the base64 text of a picture file")
    return data


def _tool_call(fields: Fields) -> item_pb2.ToolCall:
    _check_function_type(fields)
    function = fields.child("function")
    name = function.text("name") if function else None
    if function is None or not name:
        raise fields.wrong("function.name", "is missing")
    call = item_pb2.ToolCall(
        id=fields.text("id") or "", name=name, arguments_json=read_arguments(function, "arguments")
    )
    # Their place in the list says as much.
    function.value("index")
    fields.value("index")
    function.end()
    fields.end()
    return call


def read_arguments(fields: Fields, name: str) -> str:
    """The arguments of a call, as text. OpenAI writes them as JSON text, Ollama as the object itself."""
    arguments, path, text = fields.value(name), fields.at(name), ""
    if isinstance(arguments, str):
        text = check_text(arguments, path)
        try:
            arguments = parse_json(arguments)
        except FieldError as error:
            raise FieldError(path, error.problem) from None
    elif arguments is not None:
        text = to_json(arguments, path)
    if not isinstance(arguments, dict | None):
        raise FieldError(path, f"must be an object, not {name_of(arguments)}")
    return text


def take_tools(fields: Fields) -> list[item_pb2.Tool]:
    """The field `tools`: functions, as OpenAI and Ollama write them alike; none where `tool_choice` wants none."""
    tools = [_tool(tool) for tool in fields.children("tools") or ()]
    check_parallel_calls(fields, tools)
    choice = fields.value("tool_choice")
    if choice not in (None, "auto", "none"):
        raise fields.wrong("tool_choice", f"must be auto or none, not {quote(choice)}: {CANNOT_BE_MADE}")
    return [] if choice == "none" else tools


def check_parallel_calls(fields: Fields, tools: list[item_pb2.Tool]) -> None:
    """A model that may call at all may call several functions at one time."""
    if fields.flag("parallel_tool_calls") is False and tools:
        raise fields.wrong("parallel_tool_calls", "must be true: a model calls as many functions as it likes")


def _tool(fields: Fields) -> item_pb2.Tool:
    _check_function_type(fields)
    function = fields.child("function")
    name = function.text("name") if function else None
    if function is None or not name:
        raise fields.wrong("function.name", "is missing")
    tool = item_pb2.Tool(name=name, description=function.text("description") or "")
    parameters = function.value("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise function.wrong("parameters", f"must be a JSON schema, an object, not {name_of(parameters)}")
        tool.parameters_json = to_json(parameters, function.at("parameters"))
    if function.flag("strict"):
        raise function.wrong("strict", "must be false: arguments are not held to their schema")
    function.end()
    fields.end()
    return tool


def _check_function_type(fields: Fields) -> None:
    kind = fields.text("type")
    if kind not in (None, "function"):
        raise fields.wrong("type", f"must be function, not {quote(kind)}")


def take_format(fields: Fields) -> item_pb2.ResponseFormat | None:
    """Ollama's `format` ("json" or a schema), or OpenAI's `response_format`."""
    ollama, openai = fields.value("format"), fields.child("response_format")
    if ollama is not None and openai is not None:
        raise fields.wrong("response_format", "says again what format says; write one of them")
    if openai is not None:
        return _response_format(openai)
    if ollama is None or ollama == "":
        return None
    if ollama == "json":
        return item_pb2.ResponseFormat(json=True)
    if not isinstance(ollama, dict):
        raise fields.wrong("format", f'must be "json" or a JSON schema, not {quote(ollama)}')
    return item_pb2.ResponseFormat(json_schema=to_json(ollama, fields.at("format")))


def _response_format(fields: Fields) -> item_pb2.ResponseFormat | None:
    kind = fields.text("type")
    found: item_pb2.ResponseFormat | None = None
    if kind == "json_object":
        found = item_pb2.ResponseFormat(json=True)
    elif kind == "json_schema":
        named = fields.child("json_schema")
        schema = named.value("schema") if named else None
        if named is None or not isinstance(schema, dict):
            raise fields.wrong("json_schema.schema", "must be a JSON schema, an object")
        found = item_pb2.ResponseFormat(json_schema=to_json(schema, named.at("schema")))
        # Names and describes the schema, and asks to be held to it, which every answer is.
        named.text("name")
        named.text("description")
        named.flag("strict")
        named.end()
    elif kind != "text":
        raise fields.wrong("type", f"must be text, json_object or json_schema, not {quote(kind)}")
    fields.end()
    return found


def take_think(fields: Fields) -> item_pb2.Think.ValueType | None:
    """Ollama's `think` (true, false or a level), or OpenAI's `reasoning_effort`."""
    think, effort = fields.value("think"), fields.text("reasoning_effort")
    if think is not None and effort is not None:
        raise fields.wrong("reasoning_effort", "says again what think says; write one of them")
    if effort is not None:
        if effort not in EFFORTS:
            raise fields.wrong("reasoning_effort", f"must be one of {', '.join(EFFORTS)}, not {quote(effort)}")
        return EFFORTS[effort]
    if think is None:
        return None
    # 1 equals True, but is not what was asked for.
    if not isinstance(think, bool | str) or think not in _THINK:
        raise fields.wrong("think", f"must be true, false, low, medium, high or max, not {quote(think)}")
    return _THINK[think]


def take_logprobs(fields: Fields) -> item_pb2.Logprobs | None:
    """OpenAI's `logprobs` (true, or for completions a number) with `top_logprobs`; Ollama's are the same."""
    asked = fields.value("logprobs")
    top = fields.whole("top_logprobs", 0, 20)
    if asked is not None and not isinstance(asked, bool):
        if not isinstance(asked, int) or not 0 <= asked <= 20:
            raise fields.wrong("logprobs", f"must be true, false, or a number from 0 to 20, not {quote(asked)}")
        if top is not None:
            raise fields.wrong("top_logprobs", "says again what the number in logprobs says; write one of them")
        return item_pb2.Logprobs(top=asked)
    if top and not asked:
        raise fields.wrong("top_logprobs", "needs logprobs: true")
    return item_pb2.Logprobs(top=top or 0) if asked else None
