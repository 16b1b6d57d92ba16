"""What is understood of a request that is forwarded: enough to plan it. The request itself goes as it came.

Read are Ollama's chat, generate and embed, and OpenAI's chat, completions, embeddings and responses. What cannot be
read, or asks for no answer (an empty chat loads a model), gives None: then the backend is asked plainly, and it alone
says what is wrong. So nothing here refuses anything, and no field that is passed over is lost.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Format,
    Forwarded,
    GenerateRequest,
    Item,
    Message,
    Options,
    Role,
    RunnerOptions,
    Think,
    Tool,
    ToolCall,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Request = ChatRequest | GenerateRequest | EmbedRequest

_ITEM_ID: Final = "0"
_LONGEST_NAME: Final = 256
# Contexts that this service plans with; others are the backend's to judge.
_CONTEXTS: Final = range(16, 2**24 + 1)
_ROLES: Final = {role.value: role for role in Role} | {"developer": Role.SYSTEM}
_THINK: Final[Mapping[object, Think]] = {False: Think.OFF, True: Think.ON, "none": Think.OFF} | {
    think.value: think for think in Think if think not in (Think.OFF, Think.ON)
}
_NO_TIME: Final = re.compile(r'"?[+-]?0+(\.0*)?[a-zµ]*"?')
_ABSENT: Final = msgspec.Raw(b"null")


class _Function(msgspec.Struct, gc=False):
    name: str = ""
    description: str | None = None
    parameters: msgspec.Raw = _ABSENT
    arguments: msgspec.Raw = _ABSENT


class _Called(msgspec.Struct, gc=False):
    function: _Function = msgspec.field(default_factory=_Function)


class _Url(msgspec.Struct, gc=False):
    url: str = ""


class _Part(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    image_url: _Url | str | None = None


class _Message(msgspec.Struct, gc=False):
    role: str
    content: str | list[_Part] | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[_Called] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Options(msgspec.Struct, gc=False):
    num_predict: int | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None
    draft_num_predict: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    stop: list[str] | None = None


class _Ollama(msgspec.Struct, gc=False):
    """/api/chat, /api/generate, /api/embed, /api/embeddings."""

    model: str
    messages: list[_Message] | None = None
    prompt: str | None = None
    input: str | list[str] | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    images: list[str] | None = None
    tools: list[_Called] | None = None
    format: msgspec.Raw = _ABSENT
    think: bool | str | None = None
    shift: bool | None = None
    dimensions: int | None = None
    keep_alive: msgspec.Raw = _ABSENT
    options: _Options | None = None


class _OpenAI(msgspec.Struct, gc=False):
    """/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses."""

    model: str
    messages: list[_Message] | None = None
    prompt: str | None = None
    input: str | list[str | dict[str, Any]] | None = None
    instructions: str | None = None
    suffix: str | None = None
    tools: list[_Called] | None = None
    response_format: msgspec.Raw = _ABSENT
    reasoning_effort: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None


_decode_ollama: Final = msgspec.json.Decoder(_Ollama).decode
_decode_openai: Final = msgspec.json.Decoder(_OpenAI).decode


class _UnclearError(ValueError):
    """It is the backend's to judge."""


def understand(path: str, request: Forwarded) -> Item | None:
    """The request as an item, to be sent as it came; None: it is not understood, or wants no answer."""
    try:
        if path.startswith("/v1/"):
            asked = _decode_openai(request.body)
            name, made, options = asked.model, _OPENAI[path](asked), _openai_options(asked)
        else:
            told = _decode_ollama(request.body)
            if _NO_TIME.fullmatch(bytes(told.keep_alive).decode()):
                return None
            name, made, options = told.model, _OLLAMA[path](told), _ollama_options(told.options or _Options())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, _UnclearError):
        return None
    if not name.strip() or len(name) > _LONGEST_NAME:
        return None
    return Item(item_id=_ITEM_ID, index=0, request=made, model=name, options=options, forwarded=request)


# -- Ollama's own ----------------------------------------------------------------------------------------------


def _chat(asked: _Ollama) -> Request:
    return ChatRequest(
        messages=_messages(asked.messages),
        tools=_tools(asked.tools),
        format=_format(asked.format),
        think=_think(given=asked.think),
        shift=asked.shift,
    )


def _generate(asked: _Ollama) -> Request:
    if not asked.prompt:
        raise _UnclearError
    return GenerateRequest(
        prompt=asked.prompt,
        suffix=asked.suffix or "",
        system=asked.system or "",
        template=asked.template or "",
        raw=asked.raw or False,
        images=_images(asked.images),
        format=_format(asked.format),
        think=_think(given=asked.think),
        shift=asked.shift,
    )


def _embed(asked: _Ollama) -> Request:
    texts = (asked.input,) if isinstance(asked.input, str) else tuple(asked.input or ())
    return _embedding(texts, asked.dimensions)


def _embed_one(asked: _Ollama) -> Request:
    return _embedding((asked.prompt,) if asked.prompt else (), None)


def _ollama_options(asked: _Options) -> Options:
    if asked.num_ctx is not None and asked.num_ctx not in _CONTEXTS:
        raise _UnclearError
    return Options(
        num_predict=asked.num_predict,
        seed=asked.seed,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        stop=tuple(asked.stop or ()),
        runner=RunnerOptions(
            num_ctx=asked.num_ctx,
            num_batch=asked.num_batch,
            num_gpu=asked.num_gpu,
            main_gpu=asked.main_gpu,
            use_mmap=asked.use_mmap,
            num_thread=asked.num_thread,
            draft_num_predict=asked.draft_num_predict,
        ),
    )


# -- OpenAI's --------------------------------------------------------------------------------------------------


def _openai_chat(asked: _OpenAI) -> Request:
    shape = _format(asked.response_format)
    return ChatRequest(
        messages=_messages(asked.messages),
        tools=_tools(asked.tools),
        format=shape,
        think=_think(given=asked.reasoning_effort),
    )


def _openai_completion(asked: _OpenAI) -> Request:
    if not asked.prompt:
        raise _UnclearError
    return GenerateRequest(prompt=asked.prompt, suffix=asked.suffix or "")


def _openai_embeddings(asked: _OpenAI) -> Request:
    given = [asked.input] if isinstance(asked.input, str) else asked.input or []
    texts = tuple(text for text in given if isinstance(text, str))
    if len(texts) < len(given):
        raise _UnclearError
    return _embedding(texts, None)


def _openai_response(asked: _OpenAI) -> Request:
    """Its input is a text, or messages among calls of tools and what these gave; each as the text that it is."""
    given = [asked.input] if isinstance(asked.input, str) else asked.input or []
    messages = [Message(role=Role.SYSTEM, content=asked.instructions)] if asked.instructions else []
    for one in given:
        if isinstance(one, str):
            messages.append(Message(role=Role.USER, content=one))
            continue
        role = one.get("role", "assistant")
        content = one.get("content")
        text = content if isinstance(content, str) else msgspec.json.encode(content or one).decode()
        messages.append(Message(role=_role(role), content=text))
    if not given:
        raise _UnclearError
    return ChatRequest(messages=tuple(messages), think=None)


def _openai_options(asked: _OpenAI) -> Options:
    most = [
        one for one in (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens) if one is not None
    ]
    return Options(
        num_predict=most[0] if most else None,
        seed=asked.seed,
        temperature=asked.temperature,
        top_p=asked.top_p,
    )


_OLLAMA: Final[Mapping[str, Callable[[_Ollama], Request]]] = {
    "/api/chat": _chat,
    "/api/generate": _generate,
    "/api/embed": _embed,
    "/api/embeddings": _embed_one,
}
_OPENAI: Final[Mapping[str, Callable[[_OpenAI], Request]]] = {
    "/v1/chat/completions": _openai_chat,
    "/v1/completions": _openai_completion,
    "/v1/embeddings": _openai_embeddings,
    "/v1/responses": _openai_response,
}
# The paths on which an answer is asked for.
PATHS: Final = (*_OLLAMA, *_OPENAI)


# -- What they have in common ----------------------------------------------------------------------------------


def _embedding(texts: tuple[str, ...], dimensions: int | None) -> Request:
    if not texts:
        raise _UnclearError
    return EmbedRequest(input=texts, dimensions=dimensions)


def _messages(given: list[_Message] | None) -> tuple[Message, ...]:
    if not given:
        raise _UnclearError
    return tuple(_message(one) for one in given)


def _message(given: _Message) -> Message:
    images = list(_images(given.images))
    content = given.content or ""
    if not isinstance(content, str):
        images += [_url(part.image_url).encode() for part in content if part.image_url is not None]
        content = "\n".join(part.text for part in content if part.text is not None)
    return Message(
        role=_role(given.role),
        content=content,
        thinking=given.thinking or "",
        images=tuple(images),
        tool_calls=tuple(
            ToolCall(name=call.function.name, arguments_json=bytes(call.function.arguments).decode())
            for call in given.tool_calls or ()
        ),
        tool_name=given.tool_name or "",
        tool_call_id=given.tool_call_id or "",
    )


def _role(name: object) -> Role:
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise _UnclearError
    return role


def _tools(given: list[_Called] | None) -> tuple[Tool, ...]:
    return tuple(
        Tool(
            name=one.function.name,
            description=one.function.description or "",
            parameters_json=bytes(one.function.parameters).decode(),
        )
        for one in given or ()
    )


def _images(given: list[str] | None) -> tuple[bytes, ...]:
    """Pictures as the text that they came in: that they are there, and which, is all that is asked."""
    return tuple(text.encode(errors="surrogatepass") for text in given or ())


def _url(given: _Url | str | None) -> str:
    return given if isinstance(given, str) else given.url if given is not None else ""


def _format(given: msgspec.Raw) -> Format | None:
    text = bytes(given).decode()
    if text in {"null", '""'}:
        return None
    return Format() if text == '"json"' else Format(json_schema=text)


def _think(*, given: bool | str | None) -> Think | None:
    if given is None:
        return None
    think = _THINK.get(given)
    if think is None:
        raise _UnclearError
    return think
