"""The body of a request, in OpenAI's words or Ollama's, to an item of the contract.

Both vocabularies are read everywhere: `max_tokens` beside `messages`, or `options.num_predict`; what is said
twice is refused. The kind of request decides which fields there are; all others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from google.protobuf.descriptor import FieldDescriptor

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.fields import Fields, name_of, to_json
from unisono.edge.batchfile.messages import (
    take_format,
    take_images,
    take_logprobs,
    take_messages,
    take_think,
    take_tools,
)


class Kind(Enum):
    """What a body asks for; the value is the field that makes it so."""

    CHAT = "messages"
    GENERATE = "prompt"
    EMBED = "input"


_WHOLE_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
}
# Options that OpenAI writes beside the messages, and what the contract calls them.
_OPENAI_OPTIONS = {
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


# Fields of OpenAI's API that keep its books: they may stand in a line, and change no answer.
BOOKKEEPING = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def read_body(fields: Fields, kind: Kind, *, system_beside_messages: bool) -> item_pb2.Item:
    """The item, still without an id. Raises FieldError.

    With `system_beside_messages`, a chat may have its system prompt in a field `system`.
    """
    item = item_pb2.Item(model=fields.text("model") or "")
    if kind is Kind.CHAT:
        _read_chat(fields, item.chat, system_beside_messages=system_beside_messages)
    elif kind is Kind.GENERATE:
        _read_generate(fields, item.generate)
    else:
        _read_embed(fields, item.embed)
    options = read_options(fields, beside={} if kind is Kind.EMBED else _OPENAI_OPTIONS)
    if options.ByteSize():
        item.options.CopyFrom(options)
    if kind is not Kind.EMBED:
        check_one_answer(fields)
    refuse_keep_alive(fields)
    fields.skip(*BOOKKEEPING)
    fields.end()
    return item


def _read_chat(fields: Fields, chat: item_pb2.ChatRequest, *, system_beside_messages: bool) -> None:
    system = fields.text("system") if system_beside_messages else None
    if system:
        chat.messages.add(role=item_pb2.ROLE_SYSTEM, content=system)
    chat.messages.extend(take_messages(fields))
    if fields.has("images"):
        raise fields.wrong("images", "belongs inside the message that shows the pictures")
    chat.tools.extend(take_tools(fields))
    _read_shape(fields, chat)


def _read_generate(fields: Fields, generate: item_pb2.GenerateRequest) -> None:
    prompts = fields.texts("prompt", or_one=True)
    if not prompts or not prompts[0]:
        raise fields.wrong("prompt", "is empty")
    if len(prompts) > 1:
        raise fields.wrong("prompt", f"holds {len(prompts)} prompts; write a line for each")
    generate.prompt = prompts[0]
    generate.suffix = fields.text("suffix") or ""
    generate.system = fields.text("system") or ""
    generate.template = fields.text("template") or ""
    generate.raw = fields.flag("raw") or False
    generate.images.extend(take_images(fields))
    _read_shape(fields, generate)


def _read_shape(fields: Fields, request: item_pb2.ChatRequest | item_pb2.GenerateRequest) -> None:
    """What chat and generate have in common."""
    if (shape := take_format(fields)) is not None:
        request.format.CopyFrom(shape)
    if (think := take_think(fields)) is not None:
        request.think = think
    if (logprobs := take_logprobs(fields)) is not None:
        request.logprobs.CopyFrom(logprobs)
    _read_truncate(fields, request)
    if (shift := fields.flag("shift")) is not None:
        request.shift = shift


def _read_embed(fields: Fields, embed: item_pb2.EmbedRequest) -> None:
    texts = fields.texts("input", or_one=True)
    if not texts:
        raise fields.wrong("input", "must hold at least one text")
    embed.input.extend(texts)
    if (dimensions := fields.whole("dimensions", 1, 65_536)) is not None:
        embed.dimensions = dimensions
    if fields.text("encoding_format") not in (None, "float"):
        raise fields.wrong("encoding_format", "must be float")
    _read_truncate(fields, embed)


def _read_truncate(
    fields: Fields, request: item_pb2.ChatRequest | item_pb2.GenerateRequest | item_pb2.EmbedRequest
) -> None:
    if (truncate := fields.flag("truncate")) is not None:
        request.truncate = truncate


def read_options(fields: Fields, *, beside: Mapping[str, str]) -> item_pb2.Options:
    """Ollama's `options`, then those beside it, by our names; then `extra_options` for what has no name here."""
    options = item_pb2.Options()
    inner = fields.child("options")
    if inner is not None:
        for message in (options, options.runner):
            for field in message.DESCRIPTOR.fields:
                if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE and field.name != "extra_options_json":
                    _take_option(inner, field.name, message, field)
        inner.end()
    if not options.runner.ByteSize():
        options.ClearField("runner")
    for theirs, ours in beside.items():
        if fields.has(theirs):
            if any(said.name == ours for said, _ in options.ListFields()):
                raise fields.wrong(theirs, f"says again what is said elsewhere ({ours}); write one of them")
            _take_option(fields, theirs, options, options.DESCRIPTOR.fields_by_name[ours])
    extra = fields.value("extra_options")
    if extra is not None:
        if not isinstance(extra, dict):
            raise fields.wrong("extra_options", f"must be an object, not {name_of(extra)}")
        options.extra_options_json = to_json(extra, fields.at("extra_options"))
    return options


def _take_option(
    fields: Fields, name: str, message: item_pb2.Options | item_pb2.RunnerOptions, field: FieldDescriptor
) -> None:
    """Takes one option by the type that the contract gives it."""
    value: float | bool | None
    if field.cpp_type in _WHOLE_RANGES:
        value = fields.whole(name, *_WHOLE_RANGES[field.cpp_type])
    elif field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        value = fields.number(name)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        value = fields.flag(name)
    else:  # the texts of `stop`
        getattr(message, field.name).extend(fields.texts(name, or_one=True) or ())
        return
    if value is not None:
        setattr(message, field.name, value)


def check_one_answer(fields: Fields) -> None:
    """`n` and `stream` may be there as long as they ask for what a line gives: one answer, whole."""
    if fields.whole("n", 0, 2**31 - 1) not in (None, 1):
        raise fields.wrong("n", "must be 1: a line gives one answer")
    if fields.flag("stream"):
        raise fields.wrong("stream", "must be false: a line gives its answer whole")


def refuse_keep_alive(fields: Fields) -> None:
    """How long a model stays loaded is not a line's to say."""
    if fields.has("keep_alive"):
        raise fields.wrong("keep_alive", "belongs to the whole batch, not to a line")
