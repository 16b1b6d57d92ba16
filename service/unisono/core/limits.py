"""What a request may hold: sizes, counts and ranges → violations, each with the path of its field.

Nothing here knows how a request came; paths are those of the contract, from the item on
("chat.messages[0].content"). The caller puts "items[3]." before them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unisono.core.batch import BadItem
from unisono.core.errors import Violation
from unisono.core.model import ChatRequest, EmbedRequest, GenerateRequest, Options, Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from unisono.core.model import Format, Item, Message, Tool

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The sizes that a service enforces."""

    # Items of one batch, however they come.
    max_items: int = 50_000
    # Bytes of UTF-8 of all text of one item.
    max_item_text_bytes: int = 4 * MIB
    # Bytes of one picture.
    max_image_bytes: int = 16 * MIB
    # Messages of one conversation, tools of one request, texts of one embedding, stop texts.
    max_messages: int = 1024
    max_tools: int = 128
    max_inputs: int = 2048
    max_stops: int = 16
    max_id_bytes: int = 256
    # Batches that run at one time.
    max_batches: int = 256
    # Bytes of one batch's journal.
    max_journal_bytes: int = 256 * MIB
    # Items of one stream that have not ended: what its credit allows.
    max_open_items: int = 10_000


# Options of an answer: name → (least, most), both allowed. Those of a runner below them.
# Source: Ollama's api/types.go and the ranges that llama.cpp's sampler accepts.
_RANGES: dict[str, tuple[float, float]] = {
    "num_keep": (-1, 2**24),
    "num_predict": (-2, 2**24),
    "top_k": (0, 2**24),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_last_n": (-1, 2**24),
    "temperature": (0, 100),
    "repeat_penalty": (0, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_RUNNER_RANGES: dict[str, tuple[float, float]] = {
    "num_ctx": (16, 2**24),
    "num_batch": (1, 2**20),
    "num_gpu": (-1, 2**16),
    "main_gpu": (0, 2**16),
    "num_thread": (0, 2**16),
    "draft_num_predict": (0, 2**16),
}
# Names that the contract types; `extra_options_json` is for all others.
TYPED_OPTIONS = frozenset({*_RANGES, *_RUNNER_RANGES, "seed", "stop", "use_mmap"})

# The first bytes of the picture files that backends read.
_PICTURE_HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
MAX_EMBEDDING_DIMENSIONS = 65_536
MAX_TOP_LOGPROBS = 20
# Answers of one item.
MAX_VARIANTS = 64


def check_item(item: Item, limits: Limits, *, shared_count: int = 0, shared_bytes: int = 0) -> list[Violation]:
    """Everything that is wrong with an item; empty if it may be run.

    Its batch puts so many messages, with so many bytes of text, in front of each conversation.
    """
    found = [
        *_check_id(item.item_id, limits),
        *_check_n(item, limits),
        *check_model(item.model, limits),
        *check_options(item.options, limits),
    ]
    size = text_bytes(item) + shared_bytes
    if shared_count and not isinstance(item.request, ChatRequest):
        kind = "generate" if isinstance(item.request, GenerateRequest) else "embed"
        found.append(_wrong(kind, "is no conversation, and the batch's shared_context goes with chat items only"))
    match item.request:
        case ChatRequest() as chat:
            found += _check_chat(chat, limits, shared_count)
        case GenerateRequest() as generate:
            found += _check_generate(generate, limits)
        case embed:
            found += _check_embed(embed, limits)
    if size > limits.max_item_text_bytes:
        found.append(
            _wrong(
                _largest_text(item),
                f"the item has {size:,} bytes of text{_of_which(shared_bytes)}; at most "
                f"{limits.max_item_text_bytes:,} are taken. Split it, or raise UNISONO_MAX_ITEM_TEXT_BYTES",
            )
        )
    return found


def check_shared(messages: Sequence[Message], limits: Limits) -> Iterator[Violation]:
    """What is wrong with the messages in front of all conversations of a batch."""
    path = "shared_context.messages"
    # Each conversation has at least one message of its own behind them.
    if len(messages) >= limits.max_messages:
        yield _wrong(path, f"has {len(messages):,} messages; at most {limits.max_messages - 1:,} are taken")
    for i, message in enumerate(messages[: limits.max_messages]):
        yield from _check_message(message, f"{path}[{i}]", limits)
    if (size := messages_bytes(messages)) > limits.max_item_text_bytes:
        yield _wrong(path, f"has {size:,} bytes of text; at most {limits.max_item_text_bytes:,} are taken")


def check_model(name: str, limits: Limits) -> Iterator[Violation]:
    """What is wrong with the name of a model, whoever has it."""
    if _size(name) > limits.max_id_bytes:
        yield _wrong("model", f"has {_size(name):,} bytes; at most {limits.max_id_bytes} are taken")


def text_bytes(item: Item) -> int:
    """Bytes of UTF-8 of all text that an item sends to the model."""
    return sum(size for _, size in _texts(item))


def request_bytes(item: Item | BadItem) -> int:
    """Bytes of all text and pictures of an item; 0 for one that cannot be run."""
    if isinstance(item, BadItem):
        return 0
    match item.request:
        case ChatRequest() as chat:
            pictures = [image for message in chat.messages for image in message.images]
        case GenerateRequest() as asked:
            pictures = list(asked.images)
        case _:
            pictures = []
    return text_bytes(item) + sum(map(len, pictures))


def messages_bytes(messages: Iterable[Message]) -> int:
    """Bytes of UTF-8 of all text of some messages."""
    return sum(size for _, size in _texts_of(messages))


def _wrong(field: str, description: str) -> Violation:
    return Violation(field=field, description=description)


def _of_which(shared: int) -> str:
    return f" ({shared:,} of them in shared_context)" if shared else ""


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _texts(item: Item) -> Iterator[tuple[str, int]]:
    """Each text of an item: its path and its size."""
    match item.request:
        case ChatRequest() as chat:
            yield from _texts_of(chat.messages)
            for i, tool in enumerate(chat.tools):
                yield f"chat.tools[{i}].description", _size(tool.description)
                yield f"chat.tools[{i}].parameters_json", _size(tool.parameters_json)
            yield "chat.format.json_schema", _size((chat.format and chat.format.json_schema) or "")
        case GenerateRequest() as asked:
            for name in ("prompt", "suffix", "system", "template"):
                yield f"generate.{name}", _size(getattr(asked, name))
            yield "generate.format.json_schema", _size((asked.format and asked.format.json_schema) or "")
        case embed:
            for i, text in enumerate(embed.input):
                yield f"embed.input[{i}]", _size(text)


def _texts_of(messages: Iterable[Message]) -> Iterator[tuple[str, int]]:
    for i, message in enumerate(messages):
        yield f"chat.messages[{i}].content", _size(message.content)
        yield f"chat.messages[{i}].thinking", _size(message.thinking)
        for j, call in enumerate(message.tool_calls):
            yield f"chat.messages[{i}].tool_calls[{j}].arguments_json", _size(call.arguments_json)


def _largest_text(item: Item) -> str:
    return max(_texts(item), key=lambda text: text[1])[0]


def _check_id(item_id: str, limits: Limits) -> Iterator[Violation]:
    if not item_id:
        yield _wrong("item_id", "is required: a name of yours for this item, unique within the batch")
    elif _size(item_id) > limits.max_id_bytes:
        yield _wrong("item_id", f"has {_size(item_id)} bytes; at most {limits.max_id_bytes} are taken")
    elif any(ord(char) < 32 or 127 <= ord(char) < 160 for char in item_id):
        yield _wrong("item_id", "holds a control character")


def _check_n(item: Item, limits: Limits) -> Iterator[Violation]:
    """What is wrong with the number of answers. Only an item of which nothing is becomes several."""
    longest = len(f"#{item.n}")
    if not 1 <= item.n <= MAX_VARIANTS:
        yield _wrong("n", f"is {item.n:,}; it may be 1 to {MAX_VARIANTS}")
    elif item.n > 1 and isinstance(item.request, EmbedRequest):
        yield _wrong("n", f"is {item.n}; texts have one embedding only")
    elif item.n > 1 and limits.max_id_bytes - longest < _size(item.item_id) <= limits.max_id_bytes:
        yield _wrong("n", f"is {item.n}, and item_id leaves no room for #{item.n} within {limits.max_id_bytes} bytes")


def _check_chat(chat: ChatRequest, limits: Limits, shared_count: int) -> Iterator[Violation]:
    if not chat.messages:
        yield _wrong("chat.messages", "is empty; a conversation needs at least one message")
    if (count := len(chat.messages) + shared_count) > limits.max_messages:
        what = f"has {count} messages{_of_which(shared_count)}; at most {limits.max_messages} are taken"
        yield _wrong("chat.messages", what)
    for i, message in enumerate(chat.messages[: limits.max_messages]):
        yield from _check_message(message, f"chat.messages[{i}]", limits)
    if len(chat.tools) > limits.max_tools:
        yield _wrong("chat.tools", f"has {len(chat.tools)} tools; at most {limits.max_tools} are taken")
    for i, tool in enumerate(chat.tools[: limits.max_tools]):
        yield from _check_tool(tool, f"chat.tools[{i}]")
    yield from _check_format(chat.format, "chat.format")
    yield from _check_logprobs(chat.top_logprobs, "chat.logprobs")


def _check_message(message: Message, path: str, limits: Limits) -> Iterator[Violation]:
    is_empty = not (message.content or message.images or message.tool_calls or message.thinking)
    if is_empty and message.role in (Role.SYSTEM, Role.USER):
        yield _wrong(f"{path}.content", "is empty, and there is neither a picture nor a tool call instead")
    for i, image in enumerate(message.images):
        yield from _check_image(image, f"{path}.images[{i}]", limits)
    for i, call in enumerate(message.tool_calls):
        if not call.name:
            yield _wrong(f"{path}.tool_calls[{i}].name", "is required")
        yield from _check_json_object(call.arguments_json, f"{path}.tool_calls[{i}].arguments_json")


def _check_tool(tool: Tool, path: str) -> Iterator[Violation]:
    if not tool.name:
        yield _wrong(f"{path}.name", "is required")
    if tool.parameters_json:
        yield from _check_json_object(tool.parameters_json, f"{path}.parameters_json")


def _check_generate(asked: GenerateRequest, limits: Limits) -> Iterator[Violation]:
    if not asked.prompt and not asked.images:
        yield _wrong("generate.prompt", "is empty; there is nothing to complete")
    if asked.raw and (asked.system or asked.template):
        field = "generate.system" if asked.system else "generate.template"
        yield _wrong(field, "has no effect with raw: true; leave one of the two out")
    for i, image in enumerate(asked.images):
        yield from _check_image(image, f"generate.images[{i}]", limits)
    yield from _check_format(asked.format, "generate.format")
    yield from _check_logprobs(asked.top_logprobs, "generate.logprobs")


def _check_embed(embed: EmbedRequest, limits: Limits) -> Iterator[Violation]:
    if not embed.input:
        yield _wrong("embed.input", "is empty; there is nothing to embed")
    if len(embed.input) > limits.max_inputs:
        yield _wrong("embed.input", f"has {len(embed.input)} texts; at most {limits.max_inputs} are taken")
    if embed.dimensions is not None and not 1 <= embed.dimensions <= MAX_EMBEDDING_DIMENSIONS:
        yield _wrong("embed.dimensions", f"is {embed.dimensions}; it may be 1 to {MAX_EMBEDDING_DIMENSIONS:,}")


def _check_image(image: bytes, path: str, limits: Limits) -> Iterator[Violation]:
    if len(image) > limits.max_image_bytes:
        yield _wrong(path, f"has {len(image):,} bytes; at most {limits.max_image_bytes:,} are taken")
    elif not image.startswith(_PICTURE_HEADS):
        yield _wrong(
            path,
            "is not a PNG, JPEG, WebP, GIF or BMP file. This field holds the file's own bytes: if you have them in "
            "base64, decode them first",
        )


def _check_format(shape: Format | None, path: str) -> Iterator[Violation]:
    if shape is not None and shape.json_schema is not None:
        yield from _check_json_object(shape.json_schema, f"{path}.json_schema")


def _check_logprobs(top: int | None, path: str) -> Iterator[Violation]:
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        yield _wrong(f"{path}.top", f"is {top}; it may be 0 to {MAX_TOP_LOGPROBS}")


def _check_json_object(text: str, path: str) -> Iterator[Violation]:
    _, violation = _read_json_object(text, path)
    if violation is not None:
        yield violation


def _read_json_object(text: str, path: str) -> tuple[dict[str, Any], Violation | None]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        return {}, _wrong(path, "is nested too deeply")
    except ValueError as error:
        return {}, _wrong(path, f"is not JSON: {error}")
    if not isinstance(value, dict):
        return {}, _wrong(path, f"must be a JSON object, not {type(value).__name__}")
    return value, None


def _refuse_constant(word: str) -> None:
    """Python would read NaN and Infinity; no backend does."""
    raise ValueError(f"it has no {word}")


def check_options(options: Options, limits: Limits) -> Iterator[Violation]:
    """Everything that is wrong with options, an item's or a batch's."""
    for values, ranges, path in ((options, _RANGES, "options"), (options.runner, _RUNNER_RANGES, "options.runner")):
        for name, (least, most) in ranges.items():
            value = getattr(values, name)
            # Written so that NaN, which is in no range, is refused too.
            if value is not None and not least <= value <= most:
                yield _wrong(f"{path}.{name}", f"is {value:,}; it may be {least:,} to {most:,}")
    if len(options.stop) > limits.max_stops:
        yield _wrong("options.stop", f"has {len(options.stop)} texts; at most {limits.max_stops} are taken")
    if any(not text for text in options.stop):
        yield _wrong("options.stop", "holds an empty text, which would end every answer at once")
    if options.extra_json:
        extra, violation = _read_json_object(options.extra_json, "options.extra_options_json")
        if violation is not None:
            yield violation
        for name in sorted(TYPED_OPTIONS & extra.keys()):
            place = "options.runner" if name in {*_RUNNER_RANGES, "use_mmap"} else "options"
            yield _wrong(f"options.extra_options_json.{name}", f"has a field of its own: {place}.{name}")
