"""Nothing that the contract can say is lost on the way in, and what makes no sense is refused with its path."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import example, given
from hypothesis import strategies as st

from unisono._generated.unisono.v1 import item_pb2 as it
from unisono.core import model
from unisono.core.batch import BadItem
from unisono.core.errors import InvalidRequestError
from unisono.core.limits import Limits, check_item
from unisono.edge.contract import convert_in
from unisono.edge.contract.found import MAX_VIOLATIONS

USER = it.Message(role=it.ROLE_USER, content="hello")
# Numbers that no enum of the contract has.
UNKNOWN: Any = 99
NEGATIVE: Any = -1


def chat(**more: Any) -> it.Item:
    """A small conversation."""
    return it.Item(item_id="a", chat=it.ChatRequest(messages=[USER], **more))


def taken(message: it.Item) -> model.Item:
    """The item, which must be one."""
    converted = convert_in.item(message)
    assert isinstance(converted, model.Item), converted
    return converted


def refused(message: it.Item) -> list[str]:
    """The paths of what is wrong with an item, which must be something."""
    converted = convert_in.item(message)
    assert isinstance(converted, BadItem), converted
    assert all(one.description for one in converted.violations)
    return [one.field for one in converted.violations]


# -- Every field of the contract -------------------------------------------------------------------------------

# Each message of a request: an item that holds one, and where in it.
HOLDERS: dict[type[Message], tuple[Callable[[], it.Item], Callable[[it.Item], Any]]] = {
    it.Item: (lambda: it.Item(item_id="a", embed=it.EmbedRequest(input=["x"])), lambda item: item),
    it.ChatRequest: (chat, lambda item: item.chat),
    it.GenerateRequest: (
        lambda: it.Item(item_id="a", generate=it.GenerateRequest(prompt="x")),
        lambda item: item.generate,
    ),
    it.EmbedRequest: (lambda: it.Item(item_id="a", embed=it.EmbedRequest(input=["x"])), lambda item: item.embed),
    it.Message: (chat, lambda item: item.chat.messages[0]),
    it.Tool: (lambda: chat(tools=[it.Tool(name="f")]), lambda item: item.chat.tools[0]),
    it.ToolCall: (
        lambda: it.Item(
            item_id="a",
            chat=it.ChatRequest(messages=[it.Message(role=it.ROLE_ASSISTANT, tool_calls=[it.ToolCall(name="f")])]),
        ),
        lambda item: item.chat.messages[0].tool_calls[0],
    ),
    it.ResponseFormat: (lambda: chat(format=it.ResponseFormat()), lambda item: item.chat.format),
    it.Logprobs: (lambda: chat(logprobs=it.Logprobs()), lambda item: item.chat.logprobs),
    it.Options: (chat, lambda item: item.options),
    it.RunnerOptions: (chat, lambda item: item.options.runner),
}
# What a field that holds a message is given.
SAMPLES: dict[str, Message] = {
    "ChatRequest": it.ChatRequest(messages=[USER]),
    "GenerateRequest": it.GenerateRequest(prompt="x"),
    "EmbedRequest": it.EmbedRequest(input=["y"]),
    "Message": it.Message(role=it.ROLE_ASSISTANT, content="y"),
    "Tool": it.Tool(name="g"),
    "ToolCall": it.ToolCall(name="g"),
    "ResponseFormat": it.ResponseFormat(json=True),
    "Logprobs": it.Logprobs(top=3),
    "Options": it.Options(seed=4),
    "RunnerOptions": it.RunnerOptions(num_ctx=4096),
}
VALUES = {
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_ENUM: 3,
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    FieldDescriptor.CPPTYPE_INT32: 7,
    FieldDescriptor.CPPTYPE_INT64: 7,
    FieldDescriptor.CPPTYPE_UINT32: 7,
}


def assign(message: Any, field: FieldDescriptor) -> None:
    """Gives a field a value that it did not have."""
    if field.message_type is not None:
        sample = SAMPLES[field.message_type.name]
        if field.is_repeated:
            getattr(message, field.name).append(sample)
        else:
            getattr(message, field.name).CopyFrom(sample)
        return
    value: Any = VALUES.get(field.cpp_type)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        value = b"other" if field.type == FieldDescriptor.TYPE_BYTES else "other"
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


FIELDS = [(kind, field) for kind in HOLDERS for field in kind.DESCRIPTOR.fields]


def test_no_message_of_a_request_is_left_out() -> None:
    """Every message that an item can hold is among those whose fields are tried."""

    def within(kind: Any) -> set[str]:
        found = {kind.full_name}
        for field in kind.fields:
            if field.message_type is not None:
                found |= within(field.message_type)
        return found

    assert within(it.Item.DESCRIPTOR) == {kind.DESCRIPTOR.full_name for kind in HOLDERS}


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[field.full_name for _, field in FIELDS])
def test_every_field_of_an_item_reaches_the_core(kind: type[Message], field: FieldDescriptor) -> None:
    """Setting it changes the item, so that a field that somebody adds to the contract cannot be forgotten."""
    build, find = HOLDERS[kind]
    before, after = build(), build()
    if field.containing_oneof is not None and field.has_presence:
        find(before).ClearField(field.name)
        find(after).ClearField(field.name)
    assign(find(after), field)
    assert before.SerializeToString() != after.SerializeToString()
    assert isinstance(convert_in.item(after), model.Item)
    assert convert_in.item(before) != convert_in.item(after)


@pytest.mark.parametrize("kind", [kind for kind in HOLDERS if kind is not it.Item])
def test_optional_scalars_keep_zero_apart_from_absent(kind: type[Message]) -> None:
    """Zero, false and nothing at all are three different wishes."""
    build, find = HOLDERS[kind]
    for field in kind.DESCRIPTOR.fields:
        is_optional = field.containing_oneof is not None and field.containing_oneof.name.startswith("_")
        if is_optional and field.message_type is None:
            zero = build()
            setattr(find(zero), field.name, field.default_value)
            assert convert_in.item(zero) != convert_in.item(build()), field.full_name


# -- Items -----------------------------------------------------------------------------------------------------


def test_a_conversation_arrives_as_it_was_sent() -> None:
    """Each value in its place, in its order."""
    converted = taken(
        it.Item(
            item_id="one",
            model="m",
            options=it.Options(
                temperature=0.7, stop=["a", "b"], runner=it.RunnerOptions(num_ctx=4096, use_mmap=False)
            ),
            chat=it.ChatRequest(
                messages=[
                    it.Message(role=it.ROLE_SYSTEM, content="be brief"),
                    it.Message(role=it.ROLE_USER, content="what is it?", images=[b"\x89PNG", b"\xff\xd8\xff"]),
                    it.Message(
                        role=it.ROLE_ASSISTANT,
                        thinking="hm",
                        tool_calls=[it.ToolCall(id="c1", name="look", arguments_json='{"b": 1, "a": 2.0}')],
                    ),
                    it.Message(role=it.ROLE_TOOL, content="a cat", tool_name="look", tool_call_id="c1"),
                ],
                tools=[it.Tool(name="look", description="looks", parameters_json='{"type": "object"}')],
                format=it.ResponseFormat(json_schema='{"z": 1, "a": 2}'),
                think=it.THINK_LOW,
                logprobs=it.Logprobs(top=0),
                truncate=False,
                shift=True,
            ),
        )
    )
    assert converted == model.Item(
        item_id="one",
        index=0,
        model="m",
        options=model.Options(
            temperature=0.7, stop=("a", "b"), runner=model.RunnerOptions(num_ctx=4096, use_mmap=False)
        ),
        request=model.ChatRequest(
            messages=(
                model.Message(role=model.Role.SYSTEM, content="be brief"),
                model.Message(role=model.Role.USER, content="what is it?", images=(b"\x89PNG", b"\xff\xd8\xff")),
                model.Message(
                    role=model.Role.ASSISTANT,
                    thinking="hm",
                    tool_calls=(model.ToolCall(id="c1", name="look", arguments_json='{"b": 1, "a": 2.0}'),),
                ),
                model.Message(role=model.Role.TOOL, content="a cat", tool_name="look", tool_call_id="c1"),
            ),
            tools=(model.Tool(name="look", description="looks", parameters_json='{"type": "object"}'),),
            format=model.Format(json_schema='{"z": 1, "a": 2}'),
            think=model.Think.LOW,
            top_logprobs=0,
            truncate=False,
            shift=True,
        ),
    )


def test_options_have_the_names_of_the_contract() -> None:
    """All of the contract's, and no other."""
    renamed = {"extra_options_json": "extra_json"}
    for message, value in ((it.Options, model.Options), (it.RunnerOptions, model.RunnerOptions)):
        names = {renamed.get(field.name, field.name) for field in message.DESCRIPTOR.fields}
        assert names == {field.name for field in fields(value)}


def test_an_item_without_options_has_none() -> None:
    """Nor a model: these are the batch's then."""
    converted = taken(chat())
    assert (converted.options, converted.model, converted.index) == (model.Options(), "", 0)


def test_a_call_without_arguments_has_an_empty_object() -> None:
    """So it is not refused as bad JSON later."""
    call = it.Message(role=it.ROLE_ASSISTANT, tool_calls=[it.ToolCall(name="f")])
    converted = taken(it.Item(item_id="a", chat=it.ChatRequest(messages=[USER, call])))
    assert check_item(converted, Limits()) == []


@pytest.mark.parametrize(
    ("number", "role"),
    [
        (it.ROLE_SYSTEM, model.Role.SYSTEM),
        (it.ROLE_USER, model.Role.USER),
        (it.ROLE_ASSISTANT, model.Role.ASSISTANT),
        (it.ROLE_TOOL, model.Role.TOOL),
    ],
)
def test_each_role_is_known(number: it.Role.ValueType, role: model.Role) -> None:
    """By the contract's number."""
    converted = taken(it.Item(item_id="a", chat=it.ChatRequest(messages=[it.Message(role=number, content="x")])))
    assert isinstance(converted.request, model.ChatRequest)
    assert converted.request.messages[0].role is role


@pytest.mark.parametrize("name", it.Think.keys())
def test_each_way_to_think_is_known(name: str) -> None:
    """By its name; unspecified leaves it to the model."""
    converted = taken(chat(think=it.Think.Value(name)))
    assert isinstance(converted.request, model.ChatRequest)
    word = name.removeprefix("THINK_")
    assert converted.request.think is (None if word == "UNSPECIFIED" else model.Think[word])


@pytest.mark.parametrize(
    ("message", "paths"),
    [
        pytest.param(it.Item(item_id="a"), ["request"], id="nothing asked"),
        pytest.param(chat(think=UNKNOWN), ["chat.think"], id="think"),
        pytest.param(chat(format=it.ResponseFormat()), ["chat.format"], id="format: no kind"),
        pytest.param(chat(format=it.ResponseFormat(json=False)), ["chat.format"], id="format: json false"),
        pytest.param(
            it.Item(item_id="a", generate=it.GenerateRequest(prompt="x", think=UNKNOWN, format=it.ResponseFormat())),
            ["generate.format", "generate.think"],
            id="generate",
        ),
        pytest.param(
            it.Item(
                item_id="a",
                chat=it.ChatRequest(
                    messages=[it.Message(content="x"), USER, it.Message(role=UNKNOWN), it.Message(role=NEGATIVE)],
                    format=it.ResponseFormat(),
                    think=NEGATIVE,
                ),
            ),
            [*(f"chat.messages[{i}].role" for i in (0, 2, 3)), "chat.format", "chat.think"],
            id="everything at once",
        ),
    ],
)
def test_what_no_value_can_say_is_refused_with_its_path(message: it.Item, paths: list[str]) -> None:
    """All of it, in one go."""
    assert refused(message) == paths
    assert refused(it.Item.FromString(message.SerializeToString())) == paths


def test_a_refused_item_keeps_its_name() -> None:
    """So that its failure can be told apart."""
    converted = convert_in.item(it.Item(item_id="mine"))
    assert isinstance(converted, BadItem)
    assert converted.item_id == "mine"


@pytest.mark.parametrize(("asked", "kept"), [(None, 1), (0, 1), (1, 1), (64, 64), (65, 1)])
def test_a_refused_item_keeps_the_number_of_its_answers(asked: int | None, kept: int) -> None:
    """So that each can be told of its failure; a number that is none stands for one."""
    converted = convert_in.item(it.Item(item_id="mine", n=asked))
    assert isinstance(converted, BadItem)
    assert converted.n == kept


def test_no_number_of_answers_is_one() -> None:
    """Zero is kept apart from absent, and judged by the limits."""
    assert taken(chat()).n == 1
    none = chat()
    none.n = 0
    assert taken(none).n == 0


def test_what_is_allowed_is_not_judged_here() -> None:
    """Ranges, sizes and JSON are for the limits that all doors share, with the same paths."""
    converted = taken(
        it.Item(
            item_id="",
            n=65,
            options=it.Options(top_p=2.0, runner=it.RunnerOptions(num_ctx=1), extra_options_json="["),
            chat=it.ChatRequest(messages=[], logprobs=it.Logprobs(top=21), format=it.ResponseFormat(json_schema="")),
        )
    )
    assert {one.field for one in check_item(converted, Limits())} == {
        "item_id",
        "n",
        "options.top_p",
        "options.runner.num_ctx",
        "options.extra_options_json",
        "chat.messages",
        "chat.logprobs.top",
        "chat.format.json_schema",
    }


@pytest.mark.parametrize(
    ("inside", "paths"),
    [
        pytest.param(lambda raw: it.Item(item_id="a", options=it.Options.FromString(raw)), ["options", "request"]),
        pytest.param(
            lambda raw: it.Item(item_id="a", options=it.Options(runner=it.RunnerOptions.FromString(raw))),
            ["options.runner", "request"],
        ),
        pytest.param(lambda raw: it.Item.FromString(b"\x0a\x01a" + raw), ["request"]),
    ],
)
def test_an_option_of_a_newer_contract_is_refused(inside: Callable[[bytes], it.Item], paths: list[str]) -> None:
    """It would be passed over in silence otherwise."""
    unknown = b"\xb8\x3e\x01"  # field 999, a number
    assert refused(inside(unknown)) == paths


def test_lists_without_end_are_refused_unread() -> None:
    """Their length alone is told, and violations stop at a hundred."""
    many = [it.Message(role=it.ROLE_USER)] * 1025
    assert refused(it.Item(item_id="a", chat=it.ChatRequest(messages=many))) == ["chat.messages"]
    assert refused(chat(tools=[it.Tool(name="f")] * 129)) == ["chat.tools"]
    texts = it.EmbedRequest(input=[""] * 2049)
    assert refused(it.Item(item_id="a", embed=texts)) == ["embed.input"]
    bad = [it.Message()] * 1024
    assert len(refused(it.Item(item_id="a", chat=it.ChatRequest(messages=bad)))) == MAX_VIOLATIONS


def test_items_are_counted_before_they_are_read() -> None:
    """A message can hold millions of empty ones."""
    bounds = Limits(max_items=2)
    assert len(convert_in.items([chat(), it.Item()], bounds=bounds)) == 2
    with pytest.raises(InvalidRequestError) as caught:
        convert_in.items([chat()] * 3, bounds=bounds)
    assert [one.field for one in caught.value.violations] == ["items"]


@given(st.floats(width=32))
@example(3.4028234663852886e38)  # the largest
@example(1.401298464324817e-45)  # the smallest
def test_numbers_are_the_shortest_that_mean_the_same(value: float) -> None:
    """The backend gets 0.7, not 0.699999988079071; and in 32 bits it is the same number."""
    short = convert_in.shortest(value)
    if math.isnan(value):
        assert math.isnan(short)
    else:
        assert struct.unpack("f", struct.pack("f", short)) == (value,)
        assert len(repr(short)) <= len(repr(value))


@pytest.mark.parametrize("value", [0.7, 0.1, 1.1, 0.95, 100.0, 0.0, -2.0, 1e-9, 0.123456])
def test_written_decimals_come_back(value: float) -> None:
    """What a caller wrote is what the backend reads."""
    assert taken(it.Item(item_id="a", chat=chat().chat, options=it.Options(temperature=value))).options == (
        model.Options(temperature=value)
    )
