"""What the core speaks of → bytes for the file, and back.

Theory of operation. MessagePack, written and read by msgspec from the classes' own annotations, so a field that is
added with a default reads old files, and one that is taken away is passed over. JSON would be readable in the sqlite3
shell, but knows neither bytes nor infinity. Four things msgspec cannot know by itself:

1. *Which class*: an event, and an item's request, is one of several. Its name stands beside it, in a table that is
   part of the file's format: a name may be added, and never changed.
2. *Errors* are written as their reason, which is what travels, with message, metadata and violations.
3. *Vectors* are written as the bytes of 32-bit floats, the least significant byte first.
4. *Halves of surrogate pairs*, which JSON may hold and UTF-8 may not: where there is one, all texts are written as if
   their bytes were Latin-1, behind a byte that MessagePack never begins with.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from unisono.core.batch import BadItem, BatchConfig
from unisono.core.errors import UnisonoError, Violation, error_class
from unisono.core.events import Accepted, LastingEvent, Loading, Released, Result, ResultPart, Summary
from unisono.core.model import ChatRequest, EmbedRequest, GenerateRequest, Item, Options
from unisono.core.report import GroupPlanned, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# What the file calls the events; these are named in queries too.
RESULT: Final = "result"
RESULT_PART: Final = "result_part"
_EVENTS: Final[dict[str, type[Any]]] = {
    "accepted": Accepted,
    "group_planned": GroupPlanned,
    "loading": Loading,
    "released": Released,
    RESULT_PART: ResultPart,
    RESULT: Result,
    "progress": Progress,
    "summary": Summary,
}
_REQUESTS: Final[dict[str, type[Any]]] = {
    "chat": ChatRequest,
    "generate": GenerateRequest,
    "embed": EmbedRequest,
}
# An item that cannot be run as it came: in place of a request stands what is wrong with it.
_WRONG: Final = "wrong"


class _Error(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error of the house."""

    reason: str
    message: str
    metadata: dict[str, str] = {}
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None


class _Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """An item; its index stands beside it."""

    item_id: str
    kind: str
    # Packed by itself.
    request: bytes
    model: str = ""
    options: Options = Options()
    variant_of: str = ""


def _to_plain(value: object) -> object:
    """What msgspec does not know by itself."""
    if isinstance(value, array):
        return _turned(value).tobytes()
    if isinstance(value, UnisonoError):
        return _Error(value.reason, value.message, value.metadata, value.violations, value.retry_after_s)
    raise NotImplementedError(f"{type(value).__name__} cannot be written to the journal")


def _from_plain(kind: type[Any], plain: Any) -> Any:
    if kind is array:
        vector = array("f")
        vector.frombytes(plain)
        return _turned(vector)
    if kind is UnisonoError:
        error = msgspec.convert(plain, _Error)
        return error_class(error.reason)(
            error.message,
            metadata=error.metadata,
            violations=error.violations,
            retry_after_s=error.retry_after_s,
        )
    raise NotImplementedError(f"{kind.__name__} cannot be read from the journal")


def _turned(vector: array[float]) -> array[float]:
    """The same with the least significant bytes first, or back, on machines that have it otherwise."""
    if sys.byteorder == "little":
        return vector
    turned = array("f", vector)  # pragma: no cover - no such machine at hand
    turned.byteswap()  # pragma: no cover
    return turned  # pragma: no cover


# Where texts are escaped: no value of MessagePack begins with it.
_ESCAPED: Final = b"\xc1"
_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)


def _decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]:
    return msgspec.msgpack.Decoder(kind, dec_hook=_from_plain)


_names: Final = {kind: name for name, kind in (_EVENTS | _REQUESTS).items()}
_event_decoders: Final = {name: _decoder(kind) for name, kind in _EVENTS.items()}
_request_decoders: Final = {name: _decoder(kind) for name, kind in _REQUESTS.items()}
_item_decoder: Final = _decoder(_Item)
_config_decoder: Final = _decoder(BatchConfig)
_wrong_decoder: Final = _decoder(tuple[Violation, ...])
_texts_decoder: Final = _decoder(dict[str, str])


def _pack(value: object) -> bytes:
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=_to_plain)
        return _ESCAPED + _encoder.encode(_each_text(plain, _escaped))


def _unpack(decoder: msgspec.msgpack.Decoder[T], packed: bytes) -> T:
    if not packed.startswith(_ESCAPED):
        return decoder.decode(packed)
    plain = _each_text(msgspec.msgpack.decode(packed[len(_ESCAPED) :]), _unescaped)
    return msgspec.convert(plain, decoder.type, builtin_types=(bytes,), dec_hook=_from_plain)


def _each_text(plain: Any, change: Callable[[str], str]) -> Any:
    """The same with all texts changed, names of fields too."""
    if isinstance(plain, str):
        return change(plain)
    if isinstance(plain, dict):
        return {_each_text(name, change): _each_text(value, change) for name, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [_each_text(value, change) for value in plain]
    return plain


def _escaped(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def _unescaped(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "surrogatepass")


def pack_event(event: LastingEvent) -> tuple[str, bytes]:
    """The name of its class, and the event."""
    return _names[type(event)], _pack(event)


def unpack_event(kind: str, packed: bytes) -> LastingEvent:
    """The event that was packed; raises msgspec.DecodeError for bytes that are none, and for a kind that is not."""
    decoder = _event_decoders.get(kind)
    if decoder is None:
        raise msgspec.ValidationError(f"there is no event {kind!r}")
    event: LastingEvent = _unpack(decoder, packed)
    return event


def pack_item(item: Item | BadItem) -> bytes:
    """An item without its index; or one that cannot be run, with what is wrong."""
    if isinstance(item, BadItem):
        return _pack(
            _Item(item_id=item.item_id, kind=_WRONG, request=_pack(item.violations), variant_of=item.variant_of)
        )
    request = item.request
    return _pack(
        _Item(
            item_id=item.item_id,
            kind=_names[type(request)],
            request=_pack(request),
            model=item.model,
            options=item.options,
            variant_of=item.variant_of,
        )
    )


def unpack_item(index: int, packed: bytes) -> Item | BadItem:
    """The item that was packed, in its place; raises as `unpack_event`."""
    found = _unpack(_item_decoder, packed)
    if found.kind == _WRONG:
        wrong = _unpack(_wrong_decoder, found.request)
        return BadItem(item_id=found.item_id, violations=wrong, variant_of=found.variant_of)
    decoder = _request_decoders.get(found.kind)
    if decoder is None:
        raise msgspec.ValidationError(f"there is no request {found.kind!r}")
    return Item(
        item_id=found.item_id,
        index=index,
        request=_unpack(decoder, found.request),
        model=found.model,
        options=found.options,
        variant_of=found.variant_of,
    )


def pack_config(config: BatchConfig) -> bytes:
    """A batch's terms."""
    return _pack(config)


def unpack_config(packed: bytes) -> BatchConfig:
    """The terms that were packed."""
    return _unpack(_config_decoder, packed)


def pack_texts(texts: dict[str, str]) -> bytes:
    """Metadata of a batch, or its trace context."""
    return _pack(texts)


def unpack_texts(packed: bytes) -> dict[str, str]:
    """The texts that were packed."""
    return _unpack(_texts_decoder, packed)
