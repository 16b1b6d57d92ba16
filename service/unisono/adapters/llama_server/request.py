"""An item → the path and the JSON body that ask llama.cpp's server for it.

The server has one model, loaded in one way when it was started: what would load it otherwise is refused, with the
field's path. Source of the fields: llama.cpp's tools/server/README.md, and answers of the server itself.
"""

from __future__ import annotations

import base64
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final, assert_never

import msgspec

from unisono.core.errors import InvalidRequestError, RefusedByBackendError, Violation
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Format,
    GenerateRequest,
    Item,
    Message,
    Options,
    Role,
    RunnerOptions,
    Think,
    Tool,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# Options under the server's own names; those that are not here have the same name.
_OTHER_NAMES: Final = {"num_predict": "max_tokens", "num_keep": "n_keep"}
_SAMPLING: Final = tuple(f.name for f in fields(Options) if f.name not in {"runner", "extra_json"})
_KINDS: Final = {ChatRequest: "chat", GenerateRequest: "generate", EmbedRequest: "embed"}
# Extra options that would turn one answer into several.
_ONE_ANSWER: Final = ("n", "n_cmpl")
_NO_PARAMETERS: Final = msgspec.Raw(b'{"type":"object","properties":{}}')
_PICTURES: Final = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"RIFF", "webp"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
)

_encode: Final = msgspec.json.Encoder().encode
_raw_decode: Final = msgspec.json.Decoder(msgspec.Raw).decode
_raw_object_decode: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def build_request(item: Item, *, model: str, slot_context: int) -> tuple[str, bytes]:
    """The path and the body of an item's request; the body ends in `}`.

    `slot_context`: the tokens of context that each slot has; 0 where that is not known. Raises RefusedByBackendError
    for what a server that is already running cannot do, and InvalidRequestError where JSON text is none.
    """
    request = item.request
    kind = _KINDS[type(request)]
    refuse_other_runner(item.options.runner, slot_context)
    _refuse(bool(request.truncate), f"{kind}.truncate", "it has no silent cutting of prompts")
    if not isinstance(request, EmbedRequest):
        refuse_shift(request.shift, f"{kind}.shift")
    match request:
        case ChatRequest():
            path, body = "/v1/chat/completions", _chat(request)
        case GenerateRequest(raw=True):
            path, body = (
                "/v1/completions",
                {"prompt": request.prompt, **_logprobs(request.top_logprobs, is_chat=False)},
            )
            body |= _format_of_completion(request.format)
        case GenerateRequest():
            path, body = "/v1/chat/completions", _chat(_as_chat(request))
        case EmbedRequest():
            path, body = "/v1/embeddings", _embed(request)
        case _:
            assert_never(request)
    if isinstance(request, GenerateRequest):
        _refuse_parts(request)
    body = {"model": model, **body}
    if not isinstance(request, EmbedRequest):
        body |= {
            "stream": True,
            "stream_options": {"include_usage": True},
            # Each chunk tells the engine's own time: arrivals here are put right with it.
            "timings_per_token": True,
            "cache_prompt": True,
        }
        body = _options(item.options, taken=body.keys(), slot_context=slot_context) | body
    return path, _encode(body)


def refuse_shift(shift: bool | None, field: str) -> None:  # noqa: FBT001 - the one value it looks at
    """Raises RefusedByBackendError for a shifting context; off is how such a server starts."""
    _refuse(bool(shift), field, "whether it shifts a full context was decided when it was started")


def refuse_other_runner(asked: RunnerOptions, slot_context: int) -> None:
    """Raises RefusedByBackendError where options would need the model to be loaded otherwise."""
    for name in (field.name for field in fields(RunnerOptions)):
        value = getattr(asked, name)
        if value is None or (name == "num_ctx" and slot_context and value <= slot_context):
            continue
        has = f"; each of its slots has {slot_context:,} tokens" if name == "num_ctx" and slot_context else ""
        raise RefusedByBackendError(
            f"options.runner.{name}: a llama.cpp server keeps the options that it was started with{has}. "
            "Leave it out, or start the server with it",
            metadata={"field": f"options.runner.{name}"},
        )


def _refuse(is_asked: bool, field: str, why: str) -> None:  # noqa: FBT001 - reads as a sentence
    if is_asked:
        raise RefusedByBackendError(f"{field} is not for a llama.cpp server: {why}", metadata={"field": field})


def _refuse_parts(request: GenerateRequest) -> None:
    _refuse(bool(request.suffix), "generate.suffix", "it fills gaps on /infill only, which not every model has")
    _refuse(bool(request.template), "generate.template", "its template was chosen when it was started")
    if request.raw:
        _refuse(bool(request.images), "generate.images", "a raw prompt has no place for them")
        _refuse(bool(request.system), "generate.system", "a raw prompt is the whole prompt")
        _refuse(request.think not in (None, Think.OFF), "generate.think", "a raw prompt is the whole prompt")


def _as_chat(request: GenerateRequest) -> ChatRequest:
    """A prompt that is not raw is a conversation of one message, after the system's."""
    system = (Message(role=Role.SYSTEM, content=request.system),) if request.system else ()
    prompt = Message(role=Role.USER, content=request.prompt, images=request.images)
    return ChatRequest(
        messages=(*system, prompt),
        format=request.format,
        think=request.think,
        top_logprobs=request.top_logprobs,
    )


def _chat(request: ChatRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_message(i, message) for i, message in enumerate(request.messages)]}
    if request.tools:
        body["tools"] = [_tool(i, tool) for i, tool in enumerate(request.tools)]
    if request.format is not None:
        body["response_format"] = _response_format(request.format, "chat.format.json_schema")
    if request.think is not None:
        body["chat_template_kwargs"] = {"enable_thinking": request.think is not Think.OFF}
        if request.think not in (Think.ON, Think.OFF):
            body["reasoning_effort"] = request.think.value
    return body | _logprobs(request.top_logprobs, is_chat=True)


def _logprobs(top: int | None, *, is_chat: bool) -> dict[str, Any]:
    """Asked with 0 alternatives the server gives no probabilities at all: ask for one, and the reader drops it."""
    if top is None:
        return {}
    return {"logprobs": True, "top_logprobs": max(1, top)} if is_chat else {"logprobs": max(1, top)}


def _response_format(wanted: Format, field: str) -> dict[str, Any]:
    if wanted.json_schema is None:
        return {"type": "json_object", "schema": {"type": "object"}}
    schema = _json_text(wanted.json_schema, field)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _format_of_completion(wanted: Format | None) -> dict[str, Any]:
    if wanted is None:
        return {}
    if wanted.json_schema is None:
        return {"json_schema": {"type": "object"}}
    return {"json_schema": _json_text(wanted.json_schema, "generate.format.json_schema")}


def _embed(request: EmbedRequest) -> dict[str, Any]:
    _refuse(request.dimensions is not None, "embed.dimensions", "it gives vectors of the model's own length")
    return {"input": request.input}


def _message(index: int, message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.images:
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in message.images]
        body["content"] = [{"type": "text", "text": message.content}, *pictures]
    if message.thinking:
        body["reasoning_content"] = message.thinking
    if message.tool_calls:
        where = f"chat.messages[{index}].tool_calls"
        body["tool_calls"] = [
            {
                "id": call.id or f"call_{i}",
                "type": "function",
                "function": {
                    "name": call.name,
                    # OpenAI's form: the object as text.
                    "arguments": bytes(_json_text(call.arguments_json, f"{where}[{i}].arguments_json")).decode(),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_name:
        body["name"] = message.tool_name
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    return body


def _data_url(image: bytes) -> str:
    kind = next((kind for head, kind in _PICTURES if image.startswith(head)), "octet-stream")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _tool(index: int, tool: Tool) -> dict[str, Any]:
    parameters = _NO_PARAMETERS
    if tool.parameters_json:
        parameters = _json_text(tool.parameters_json, f"chat.tools[{index}].parameters_json")
    function: dict[str, Any] = {"name": tool.name, "parameters": parameters}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _options(options: Options, *, taken: Iterable[str], slot_context: int) -> dict[str, Any]:
    """Options at the body's top, as this server takes them; on a name given twice the typed one wins.

    `taken`: what the rest of the body says, which no extra option may contradict.
    """
    body: dict[str, Any] = {}
    if options.extra_json:
        body.update(_json_object(options.extra_json, "options.extra_options_json"))
        for name in sorted({*taken, *_ONE_ANSWER} & body.keys()):
            _refuse(bool(name), f"options.extra_options_json.{name}", "the service itself decides that")
    for name in _SAMPLING:
        value = getattr(options, name)
        if value not in (None, ()):
            body[_OTHER_NAMES.get(name, name)] = value
    # Ollama knows -1 (no limit) and -2 (fill the context), and takes 0 for no limit too; this server knows -1.
    if options.num_predict is not None and options.num_predict <= 0:
        body["max_tokens"] = -1
    # Ollama's -1 is the whole context, which this server does not take.
    if slot_context and options.repeat_last_n is not None and options.repeat_last_n < 0:
        body["repeat_last_n"] = slot_context
    return body


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
