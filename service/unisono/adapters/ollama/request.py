"""An item → the path and the JSON body that ask Ollama for it.

What callers give as JSON text (schemas, parameters, arguments, extra options) goes into the body byte for byte, so
that the order of keys and the types of numbers stay. Source of the fields: Ollama 0.32, api/types.go.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final, assert_never

import msgspec

from unisono.core.errors import InvalidRequestError, Violation
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Format,
    GenerateRequest,
    Item,
    Message,
    Options,
    RunnerOptions,
    RunnerSpec,
    Think,
    Tool,
)

_THINK: Final[dict[Think, bool | str]] = {Think.OFF: False, Think.ON: True}
# A function without parameters; Ollama's templates expect the object.
_NO_PARAMETERS: Final = msgspec.Raw(b'{"type":"object","properties":{}}')
_RUNNER: Final = tuple(f.name for f in fields(RunnerOptions))
_SAMPLING: Final = tuple(f.name for f in fields(Options) if f.name not in {"runner", "extra_json"})

_encode: Final = msgspec.json.Encoder().encode
_raw_decode: Final = msgspec.json.Decoder(msgspec.Raw).decode
_raw_object_decode: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def build_request(item: Item, runner: RunnerSpec) -> tuple[str, bytes]:
    """The path and the body of an item's request on this runner; the body ends in `}`.

    `keep_alive` is never in it: it would replace the runner's, also for others. Raises InvalidRequestError where
    a field that must be JSON is none.
    """
    request = item.request
    match request:
        case ChatRequest():
            path, body = "/api/chat", _chat(request)
        case GenerateRequest():
            path, body = "/api/generate", _generate(request)
        case EmbedRequest():
            path, body = "/api/embed", _embed(request)
        case _:
            assert_never(request)
    body = {"model": runner.model, **body}
    if not isinstance(request, EmbedRequest):
        shift = runner.shift if runner.shift is not None else request.shift
        body |= {"stream": True} if shift is None else {"shift": shift, "stream": True}
    # Else Ollama cuts a prompt that is too long, without a word.
    body["truncate"] = bool(request.truncate)
    options = _options(item.options, runner.options)
    if options:
        body["options"] = options
    return path, _encode(body)


def build_load(runner: RunnerSpec, *, keep_alive_s: float, as_embedding: bool) -> tuple[str, bytes]:
    """The path and the body of a request that loads the runner and generates nothing.

    0 s unloads the model; below zero leaves Ollama its own setting.
    """
    body: dict[str, Any] = {"model": runner.model}
    if keep_alive_s >= 0:
        body["keep_alive"] = int(keep_alive_s) if keep_alive_s == int(keep_alive_s) else keep_alive_s
    if not as_embedding:
        body |= {"messages": [], "stream": False}
        if runner.shift is not None:
            body["shift"] = runner.shift
    options = _set_fields(runner.options)
    if options:
        body["options"] = options
    return ("/api/embed" if as_embedding else "/api/chat"), _encode(body)


def _chat(request: ChatRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_message(i, m) for i, m in enumerate(request.messages)]}
    if request.tools:
        body["tools"] = [_tool(i, t) for i, t in enumerate(request.tools)]
    return body | _shape(request, "chat")


def _generate(request: GenerateRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": request.prompt}
    for name in ("suffix", "system", "template"):
        if text := getattr(request, name):
            body[name] = text
    if request.raw:
        body["raw"] = True
    if request.images:
        body["images"] = request.images  # msgspec writes bytes as base64
    return body | _shape(request, "generate")


def _embed(request: EmbedRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"input": request.input}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return body


def _shape(request: ChatRequest | GenerateRequest, kind: str) -> dict[str, Any]:
    """What chat and generate have in common: the answer's format, thinking, log probabilities."""
    body: dict[str, Any] = {}
    if request.format is not None:
        body["format"] = _format(request.format, f"{kind}.format.json_schema")
    if request.think is not None:
        body["think"] = _THINK.get(request.think, request.think.value)
    if request.top_logprobs is not None:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs
    return body


def _format(wanted: Format, field: str) -> str | msgspec.Raw:
    return "json" if wanted.json_schema is None else _json_text(wanted.json_schema, field)


def _message(index: int, message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.thinking:
        body["thinking"] = message.thinking
    if message.images:
        body["images"] = message.images
    if message.tool_calls:
        where = f"chat.messages[{index}].tool_calls"
        body["tool_calls"] = [
            ({"id": call.id} if call.id else {})
            | {
                "function": {
                    "index": i,
                    "name": call.name,
                    "arguments": _json_text(call.arguments_json or "{}", f"{where}[{i}].arguments_json"),
                }
            }
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_name:
        body["tool_name"] = message.tool_name
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    return body


def _tool(index: int, tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = (
        _json_text(tool.parameters_json, f"chat.tools[{index}].parameters_json")
        if tool.parameters_json
        else _NO_PARAMETERS
    )
    return {"type": "function", "function": function}


def _options(options: Options, runner: RunnerOptions) -> dict[str, Any]:
    """All options of a request; on a name given twice the typed one wins, the runner's above all.

    Every request carries the runner's options, because one without them would reload the model.
    """
    body: dict[str, Any] = {}
    if options.extra_json:
        body.update(_json_object(options.extra_json, "options.extra_options_json"))
    body.update({name: value for name in _SAMPLING if (value := getattr(options, name)) not in (None, ())})
    body.update(_set_fields(runner))
    return body


def _set_fields(options: RunnerOptions) -> dict[str, Any]:
    return {name: value for name in _RUNNER if (value := getattr(options, name)) is not None}


def _json_text(text: str, field: str) -> msgspec.Raw:
    try:
        return _raw_decode(text)
    except msgspec.DecodeError as error:
        raise _not_json(field, error) from None


def _json_object(text: str, field: str) -> dict[str, msgspec.Raw]:
    try:
        return _raw_object_decode(text)
    except msgspec.DecodeError as error:
        raise _not_json(field, error) from None


def _not_json(field: str, error: msgspec.DecodeError) -> InvalidRequestError:
    what = f"is not the JSON that belongs here: {error}"
    return InvalidRequestError(f"{field} {what}", violations=[Violation(field=field, description=what)])
