"""What is written to the journal's file is what is read from it: every class, every value, exactly."""

from __future__ import annotations

import dataclasses
import math
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.adapters.journal import codec
from unisono.core import batch, errors, memory, model, passes, report
from unisono.core.batch import BadItem, BatchConfig
from unisono.core.errors import InternalError, UnisonoError, Violation
from unisono.core.events import Accepted, Loading, LoadState, Released, Result, ResultPart, Summary
from unisono.core.model import (
    ChatRequest,
    Completion,
    EmbedRequest,
    GenerateRequest,
    Item,
    ItemState,
    Message,
    Options,
    Role,
    TokenLogprob,
)
from unisono.core.report import GroupPlanned, Progress

EVENTS = (Accepted, GroupPlanned, Loading, Released, ResultPart, Result, Progress, Summary)
LARGEST = 2**63 - 1


def classes(parent: type[UnisonoError] = UnisonoError) -> Iterator[type[UnisonoError]]:
    """All classes of errors below one."""
    for child in parent.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from classes(child)


CLASSES = tuple(classes())
NAMED = tuple(one for one in CLASSES if "reason" in vars(one))

# Halves of surrogate pairs too: JSON may hold them.
texts = st.text(st.characters(), max_size=20)
whole = st.integers(-LARGEST - 1, LARGEST)
vectors = st.lists(st.floats(width=32), max_size=6).map(lambda numbers: array("f", numbers))
faults = st.builds(
    lambda kind, message, metadata, violations, after: kind(
        message, metadata=metadata, violations=violations, retry_after_s=after
    ),
    st.sampled_from((*NAMED, InternalError)),
    texts,
    st.dictionaries(texts, texts, max_size=3),
    st.lists(st.builds(Violation, field=texts, description=texts), max_size=3),
    st.none() | st.floats(),
)


def leaf(top: st.SearchStrategy[tuple[TokenLogprob, ...]]) -> st.SearchStrategy[TokenLogprob]:
    """A token, with others that it might have been."""
    return st.builds(TokenLogprob, token=texts, logprob=st.floats(), bytes=st.binary(max_size=4), top=top)


def filled(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Values of a class with every field drawn, and none left at its default."""
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: st.from_type(hints[field.name]) for field in dataclasses.fields(kind)})


st.register_type_strategy(str, texts)
st.register_type_strategy(int, whole)
st.register_type_strategy(float, st.floats())
st.register_type_strategy(array, vectors)
st.register_type_strategy(UnisonoError, faults)
st.register_type_strategy(
    TokenLogprob,
    st.recursive(leaf(st.just(())), lambda inner: leaf(st.lists(inner, max_size=2).map(tuple)), max_leaves=4),
)
for _module in (batch, memory, model, passes, report):
    for _kind in vars(_module).values():
        if dataclasses.is_dataclass(_kind) and isinstance(_kind, type) and _kind is not TokenLogprob:
            st.register_type_strategy(_kind, filled)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal down to their types; NaN is equal to itself here, and errors by what they say."""
    if type(one) is not type(other):
        return False
    if isinstance(one, UnisonoError):
        return all(
            same(getattr(one, name), getattr(other, name))
            for name in ("reason", "message", "metadata", "violations", "retry_after_s", "args")
        )
    if isinstance(one, Enum):
        return one is other
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    if isinstance(one, array):
        return bool(one.typecode == other.typecode and one.tobytes() == other.tobytes())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_event_comes_back(kind: type[Any], data: st.DataObject) -> None:
    """With all that it holds: texts that UTF-8 does not know, numbers that JSON does not know, vectors, errors."""
    event = data.draw(filled(kind))
    name, packed = codec.pack_event(event)
    assert same(codec.unpack_event(name, packed), event)


@pytest.mark.parametrize("request_kind", [ChatRequest, GenerateRequest, EmbedRequest], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_item_comes_back(request_kind: type[Any], data: st.DataObject) -> None:
    """In its place, which is not written with it; and one answer of several is one."""
    item = data.draw(
        st.builds(
            Item,
            item_id=texts,
            index=st.integers(0, 50_000),
            request=filled(request_kind),
            model=texts,
            options=filled(Options),
            n=st.just(1),
            variant_of=texts,
        )
    )
    assert same(codec.unpack_item(item.index, codec.pack_item(item)), item)


@given(st.builds(BadItem, item_id=texts, violations=st.lists(filled(Violation), max_size=3).map(tuple), n=st.just(1)))
def test_every_bad_item_comes_back(item: BadItem) -> None:
    """What is wrong with it, in place of what it asks."""
    assert same(codec.unpack_item(7, codec.pack_item(item)), item)


@given(filled(BatchConfig))
def test_every_config_comes_back(config: BatchConfig) -> None:
    """With the options and the shared messages within it."""
    assert same(codec.unpack_config(codec.pack_config(config)), config)


@given(st.dictionaries(texts, texts, max_size=4))
def test_every_text_comes_back(named: dict[str, str]) -> None:
    """Metadata and trace contexts."""
    assert codec.unpack_texts(codec.pack_texts(named)) == named


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_of_errors_comes_back(kind: type[UnisonoError]) -> None:
    """As the class that it was; one that only stands above others has no name, and is never raised."""
    error = kind(
        "what", metadata={"model": "m"}, violations=[Violation(field="f", description="d")], retry_after_s=2.5
    )
    event = Loading(group=0, state=LoadState.FAILED, error=error)
    read = codec.unpack_event(*codec.pack_event(event))
    assert isinstance(read, Loading)
    expected = kind if kind in NAMED else InternalError
    assert type(read.error) is expected
    assert same(read.error, expected("what", metadata=error.metadata, violations=error.violations, retry_after_s=2.5))


def test_reasons_are_unique() -> None:
    """A reason in the file names one class: that of the tree's table."""
    assert [reason for reason, count in Counter(one.reason for one in NAMED).items() if count > 1] == []
    assert [one for one in NAMED if errors.error_class(one.reason) is not one] == []


def test_an_error_of_a_later_version_is_an_internal_one() -> None:
    """What it says stays."""
    packed = msgspec.msgpack.encode({"group": 0, "state": "failed", "error": {"reason": "NEW", "message": "words"}})
    read = codec.unpack_event("loading", packed)
    assert isinstance(read, Loading)
    assert same(read.error, InternalError("words"))


def test_unknown_fields_are_passed_over() -> None:
    """A file that a later version of the same format has written."""
    read = codec.unpack_event("accepted", msgspec.msgpack.encode({"batch_id": "b", "item_count": 3, "colour": "red"}))
    assert read == Accepted(batch_id="b", item_count=3)
    config = codec.unpack_config(msgspec.msgpack.encode({"model": "m", "colour": {"deep": [1, b"2"]}}))
    assert config == BatchConfig(model="m")


def test_missing_fields_have_their_defaults() -> None:
    """A file that an earlier version has written, in which a field is not yet."""
    least = {"item_id": "a", "index": 4, "state": "completed"}
    assert codec.unpack_event("result", msgspec.msgpack.encode(least)) == Result(
        item_id="a", index=4, state=ItemState.COMPLETED
    )
    assert codec.unpack_config(msgspec.msgpack.encode({})) == BatchConfig()
    request = msgspec.msgpack.encode({"messages": [{"role": "user"}]})
    packed = msgspec.msgpack.encode({"item_id": "a", "kind": "chat", "request": request})
    expected = Item(item_id="a", index=2, request=ChatRequest(messages=(Message(role=Role.USER),)))
    assert codec.unpack_item(2, packed) == expected


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("accepted", b""),
        ("accepted", b"\xc1"),
        ("accepted", b"\x91\x01"),
        ("accepted", b"\x80"),
        ("no_such", b"\x80"),
    ],
)
def test_what_is_no_event_is_refused(kind: str, packed: bytes) -> None:
    """By one kind of error, which the journal knows."""
    with pytest.raises(msgspec.MsgspecError):
        _ = codec.unpack_event(kind, packed)
    with pytest.raises(msgspec.MsgspecError):
        _ = codec.unpack_item(0, packed)


def test_an_item_of_no_known_kind_is_refused() -> None:
    """A later version's, in a file that says that it is of this one."""
    with pytest.raises(msgspec.ValidationError, match="poem"):
        _ = codec.unpack_item(0, msgspec.msgpack.encode({"item_id": "a", "kind": "poem", "request": b"\x80"}))


def test_what_nobody_knows_is_not_written() -> None:
    """Rather than as something else."""
    broken = Completion(model="m", content=object())  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="object"):
        _ = codec.pack_event(Result(item_id="a", index=0, state=ItemState.COMPLETED, completion=broken))
