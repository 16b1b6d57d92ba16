"""What a request may hold: each limit exactly at its boundary, and one past it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from unisono.core.batch import BadItem
from unisono.core.limits import (
    MAX_EMBEDDING_DIMENSIONS,
    MAX_TOP_LOGPROBS,
    TYPED_OPTIONS,
    Limits,
    check_item,
    check_model,
    check_options,
    check_shared,
    messages_bytes,
    request_bytes,
    text_bytes,
)
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
    Tool,
    ToolCall,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
SMALL = Limits(
    max_item_text_bytes=100,
    max_image_bytes=20,
    max_messages=3,
    max_tools=2,
    max_inputs=3,
    max_stops=2,
    max_id_bytes=8,
)


def chat(*messages: Message, **more: Any) -> ChatRequest:
    """A conversation; of one short message where none is given."""
    return ChatRequest(messages=messages or (Message(role=Role.USER, content="hi"),), **more)


def item(request: ChatRequest | GenerateRequest | EmbedRequest | None = None, **more: Any) -> Item:
    """An item that is right but for what is given."""
    return Item(**{"item_id": "a", "index": 0, "request": request or chat(), **more})


def wrong(checked: Item, limits: Limits = SMALL) -> list[str]:
    """The paths of all that is wrong."""
    return [violation.field for violation in check_item(checked, limits)]


def why(checked: Item, limits: Limits = SMALL) -> str:
    """What is said of the one thing that is wrong."""
    (violation,) = check_item(checked, limits)
    return violation.description


def user(content: str = "hi", **more: Any) -> Message:
    """A user's message."""
    return Message(role=Role.USER, content=content, **more)


# -- Right -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        chat(),
        chat(user(), Message(role=Role.ASSISTANT), Message(role=Role.TOOL, tool_name="f")),
        chat(Message(role=Role.USER, images=(PNG,))),
        chat(Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="f", arguments_json='{"a": 1}'),))),
        chat(tools=(Tool(name="f"), Tool(name="g", parameters_json='{"type": "object"}'))),
        chat(format=Format(), top_logprobs=0),
        chat(format=Format(json_schema="{}"), top_logprobs=MAX_TOP_LOGPROBS),
        GenerateRequest(prompt="p", system="s", template="t"),
        GenerateRequest(prompt="p", raw=True),
        GenerateRequest(prompt="", images=(PNG,)),
        EmbedRequest(input=("a", "", "b"), dimensions=1),
        EmbedRequest(input=("a",), dimensions=MAX_EMBEDDING_DIMENSIONS),
    ],
)
def test_what_is_right_is_taken(request_: ChatRequest | GenerateRequest | EmbedRequest) -> None:
    """Everything that a backend can answer passes."""
    assert check_item(item(request_), SMALL) == []


# -- Counts and sizes, at the boundary and one past it -----------------------------------------------------------


@pytest.mark.parametrize("past", [False, True], ids=["at the limit", "one past it"])
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda k: item(item_id="x" * (8 + k)), "item_id"),
        (lambda k: item(item_id="é" * 4 + "x" * k), "item_id"),
        (lambda k: item(model="m" * (8 + k)), "model"),
        (lambda k: item(chat(*[user()] * (3 + k))), "chat.messages"),
        (lambda k: item(chat(tools=(Tool(name="f"),) * (2 + k))), "chat.tools"),
        (lambda k: item(EmbedRequest(input=("a",) * (3 + k))), "embed.input"),
        (lambda k: item(options=Options(stop=("a",) * (2 + k))), "options.stop"),
        (lambda k: item(chat(user(images=(PNG, PNG + bytes(4 + k))))), "chat.messages[0].images[1]"),
        (lambda k: item(GenerateRequest(prompt="p", images=(PNG + bytes(4 + k),))), "generate.images[0]"),
        (lambda k: item(chat(top_logprobs=MAX_TOP_LOGPROBS + k)), "chat.logprobs.top"),
        (lambda k: item(chat(top_logprobs=-k)), "chat.logprobs.top"),
        (lambda k: item(GenerateRequest(prompt="p", top_logprobs=MAX_TOP_LOGPROBS + k)), "generate.logprobs.top"),
        (lambda k: item(EmbedRequest(input=("a",), dimensions=MAX_EMBEDDING_DIMENSIONS + k)), "embed.dimensions"),
        (lambda k: item(EmbedRequest(input=("a",), dimensions=1 - k)), "embed.dimensions"),
    ],
    ids=[
        "id",
        "id in bytes",
        "model",
        "messages",
        "tools",
        "inputs",
        "stops",
        "image of a message",
        "image of a prompt",
        "logprobs",
        "no logprobs",
        "logprobs of a prompt",
        "dimensions",
        "no dimensions",
    ],
)
def test_each_limit_is_met_exactly(make: Any, path: str, *, past: bool) -> None:
    """A request at the limit is taken; one past it is refused, at its path."""
    assert wrong(make(int(past))) == ([path] if past else [])


@pytest.mark.parametrize("past", [False, True], ids=["at the limit", "one past it"])
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda text: chat(user("a"), user(text[1:])), "chat.messages[1].content"),
        (lambda text: chat(user("a"), Message(role=Role.ASSISTANT, thinking=text[1:])), "chat.messages[1].thinking"),
        (
            lambda text: chat(
                Message(
                    role=Role.ASSISTANT,
                    tool_calls=(ToolCall(name="f"), ToolCall(name="g", arguments_json=json.dumps({"a": text[11:]}))),
                )
            ),
            "chat.messages[0].tool_calls[1].arguments_json",
        ),
        (lambda text: chat(tools=(Tool(name="f", description=text[2:]),)), "chat.tools[0].description"),
        (
            lambda text: chat(tools=(Tool(name="f", parameters_json=json.dumps({"a": text[11:]})),)),
            "chat.tools[0].parameters_json",
        ),
        (lambda text: chat(format=Format(json_schema=json.dumps({"a": text[11:]}))), "chat.format.json_schema"),
        (lambda text: GenerateRequest(prompt=text), "generate.prompt"),
        (lambda text: GenerateRequest(prompt="p", suffix=text[1:]), "generate.suffix"),
        (lambda text: GenerateRequest(prompt="p", system=text[1:]), "generate.system"),
        (lambda text: GenerateRequest(prompt="p", template=text[1:]), "generate.template"),
        (
            lambda text: GenerateRequest(prompt="p", format=Format(json_schema=json.dumps({"a": text[10:]}))),
            "generate.format.json_schema",
        ),
        (lambda text: EmbedRequest(input=("a", text[1:])), "embed.input[1]"),
    ],
)
def test_all_text_counts_and_the_largest_is_named(make: Any, path: str, *, past: bool) -> None:
    """All text of an item together has a limit; what passes it names the place where most of it is."""
    checked = item(make("x" * (100 + past)))
    assert text_bytes(checked) == 100 + past
    assert wrong(checked) == ([path] if past else [])


def test_text_is_counted_in_bytes_of_utf8() -> None:
    """Characters count the bytes that they take on the wire; half a surrogate pair, which has none, counts three."""
    for text, size in (("abc", 3), ("é", 2), ("€", 3), ("🎼", 4), ("\ud83c", 3), ("", 0)):
        assert text_bytes(item(EmbedRequest(input=(text,)))) == size
    assert wrong(item(GenerateRequest(prompt="é" * 50))) == []
    assert wrong(item(GenerateRequest(prompt="é" * 50 + "a"))) == ["generate.prompt"]
    assert wrong(item(chat(user("\udfff" * 34)))) == ["chat.messages[0].content"]


def test_too_much_is_told_with_the_remedy() -> None:
    """A refusal says how much there is, how much may be, and what to do."""
    said = why(item(GenerateRequest(prompt="x" * 10_000_000)), Limits())
    assert said == (
        "the item has 10,000,000 bytes of text; at most 4,194,304 are taken. "
        "Split it, or raise UNISONO_MAX_ITEM_TEXT_BYTES"
    )


def test_ten_thousand_wrong_messages_are_not_ten_thousand_violations() -> None:
    """Past the limit of messages, inputs or tools, the rest is not looked at one by one."""
    many = chat(*[Message(role=Role.USER)] * 10_000, tools=(Tool(name=""),) * 10_000)
    assert len(wrong(item(many))) == 2 + SMALL.max_messages + SMALL.max_tools


# -- Names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item_id", ["", "a\n", "\x00", "a\x7fb", "\x1f"])
def test_item_needs_a_name(item_id: str) -> None:
    """An empty id, or one with control characters, is refused."""
    assert wrong(item(item_id=item_id)) == ["item_id"]


@pytest.mark.parametrize("item_id", ["a", " ", "ä/ö:1", "🎼"])
def test_any_other_name_is_taken(item_id: str) -> None:
    """A caller's names are its own."""
    assert wrong(item(item_id=item_id)) == []


def test_model_name_is_bounded() -> None:
    """The name of a model, a batch's as an item's, has the limit of an id."""
    assert [violation.field for violation in check_model("m" * 9, SMALL)] == ["model"]
    assert list(check_model("", SMALL)) == []


# -- Messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_who_asks_must_say_something(role: Role) -> None:
    """A system's or user's message must hold something; an assistant's or tool's may be empty."""
    is_wrong = role in (Role.SYSTEM, Role.USER)
    checked = item(chat(user(), Message(role=role)))
    assert wrong(checked) == (["chat.messages[1].content"] if is_wrong else [])


def test_conversation_needs_a_message() -> None:
    """An empty conversation, an empty prompt and an empty list of texts are nothing to answer."""
    assert wrong(item(ChatRequest(messages=()))) == ["chat.messages"]
    assert wrong(item(GenerateRequest(prompt=""))) == ["generate.prompt"]
    assert wrong(item(EmbedRequest(input=()))) == ["embed.input"]


@pytest.mark.parametrize("head", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF1234WEBP", b"GIF89a", b"BM"])
def test_pictures_are_known_by_their_heads(head: bytes) -> None:
    """PNG, JPEG, WebP, GIF and BMP are taken."""
    assert wrong(item(chat(user(images=(head,))))) == []


@pytest.mark.parametrize("image", [b"", b"iVBORw0KGgo", b"\x89PN", b"%PDF-1.7"])
def test_anything_else_is_no_picture(image: bytes) -> None:
    """What is no picture is refused, and base64 is guessed at."""
    checked = item(chat(user(), user(images=(PNG, image))))
    assert wrong(checked) == ["chat.messages[1].images[1]"]
    assert "base64" in why(checked)


def test_functions_need_names() -> None:
    """A tool and a tool call without a name are refused, each at its path."""
    nameless = Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="f"), ToolCall(name="")))
    assert wrong(item(chat(user(), nameless))) == ["chat.messages[1].tool_calls[1].name"]
    assert wrong(item(chat(tools=(Tool(name="f"), Tool(name=""))))) == ["chat.tools[1].name"]


@pytest.mark.parametrize(
    ("system", "template", "path"), [("s", "", "system"), ("", "t", "template"), ("s", "t", "system")]
)
def test_raw_takes_no_template(system: str, template: str, path: str) -> None:
    """What a raw prompt would ignore is refused."""
    raw = GenerateRequest(prompt="p", raw=True, system=system, template=template)
    assert wrong(item(raw)) == [f"generate.{path}"]


# -- JSON --------------------------------------------------------------------------------------------------------


JSON_PLACES = [
    (lambda text: item(chat(format=Format(json_schema=text))), "chat.format.json_schema"),
    (lambda text: item(GenerateRequest(prompt="p", format=Format(json_schema=text))), "generate.format.json_schema"),
    (lambda text: item(chat(tools=(Tool(name="f", parameters_json=text),))), "chat.tools[0].parameters_json"),
    (
        lambda text: item(chat(Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="f", arguments_json=text),)))),
        "chat.messages[0].tool_calls[0].arguments_json",
    ),
    (lambda text: item(options=Options(extra_json=text)), "options.extra_options_json"),
]


@pytest.mark.parametrize(("make", "path"), JSON_PLACES)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ("3", "must be a JSON object, not int"),
        ("null", "must be a JSON object, not NoneType"),
        ('{"a": NaN}', "is not JSON: it has no NaN"),
        ('{"a": -Infinity}', "is not JSON: it has no -Infinity"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is nested too deeply"),
    ],
    ids=["cut", "quotes", "list", "number", "null", "NaN", "Infinity", "long number", "deep list", "deep object"],
)
def test_json_must_be_an_object(make: Any, path: str, text: str, said: str) -> None:
    """Wherever JSON travels as text, it must be one object that every parser reads."""
    (violation,) = check_item(make(text), Limits())
    assert violation.field == path
    assert violation.description.startswith(said)


@pytest.mark.parametrize(("make", "path"), JSON_PLACES)
def test_any_object_is_taken(make: Any, path: str) -> None:
    """Key order, large numbers and depth are the caller's."""
    text = '{"b": 1e400, "a": 12345678901234567890, "c": ' + "[" * 100 + "]" * 100 + "}"
    assert check_item(make(text), Limits()) == [], path


# -- Options -----------------------------------------------------------------------------------------------------


RANGES: list[tuple[str, float, float]] = [
    ("num_keep", -1, 2**24),
    ("num_predict", -2, 2**24),
    ("top_k", 0, 2**24),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("repeat_last_n", -1, 2**24),
    ("temperature", 0, 100),
    ("repeat_penalty", 0, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("runner.num_ctx", 16, 2**24),
    ("runner.num_batch", 1, 2**20),
    ("runner.num_gpu", -1, 2**16),
    ("runner.main_gpu", 0, 2**16),
    ("runner.num_thread", 0, 2**16),
    ("runner.draft_num_predict", 0, 2**16),
]


def with_option(name: str, value: Any) -> Options:
    """Options with one set; "runner.…" is one of the runner's."""
    field = name.removeprefix("runner.")
    if field != name:
        return Options(runner=RunnerOptions(**{field: value}))
    return Options(**{field: value})


@pytest.mark.parametrize(("name", "least", "most"), RANGES)
def test_every_range_is_met_exactly(name: str, least: float, most: float) -> None:
    """Both ends of a range are taken, what lies past them is not, nor what is no number."""
    step = 1 if name not in ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty") else 1e-9
    for value in (least, most, (least + most) / 2):
        assert list(check_options(with_option(name, value), SMALL)) == []
    for value in (least - step, most + step, math.nan, math.inf, -math.inf, 10**400):
        (violation,) = check_options(with_option(name, value), SMALL)
        assert violation.field == f"options.{name}"
        assert violation.description.endswith(f"it may be {least:,} to {most:,}")


def test_refused_number_is_told_in_full() -> None:
    """A number past its range and the range itself are told so that their difference can be seen."""
    (violation,) = check_options(Options(num_predict=2**24 + 1), SMALL)
    assert violation.description == "is 16,777,217; it may be -2 to 16,777,216"


def test_every_typed_number_has_a_range() -> None:
    """No option that the contract types goes unchecked but the seed, which may be any, and what is no number."""
    assert {name.removeprefix("runner.") for name, _, _ in RANGES} == TYPED_OPTIONS - {"seed", "stop", "use_mmap"}
    for seed in (0, -1, 2**63):
        assert list(check_options(Options(seed=seed, runner=RunnerOptions(use_mmap=False)), SMALL)) == []


def test_empty_stop_is_refused() -> None:
    """A stop text that every answer holds would end it at once."""
    assert wrong(item(options=Options(stop=("a", "")))) == ["options.stop"]


@pytest.mark.parametrize("name", sorted(TYPED_OPTIONS))
def test_typed_options_do_not_hide_among_the_others(name: str) -> None:
    """What has a field of its own is refused in extra_options_json, and told where it belongs."""
    extra = json.dumps({name: 1, "mirostat": 2})
    checked = item(options=Options(extra_json=extra))
    assert wrong(checked) == [f"options.extra_options_json.{name}"]
    is_runners = any(name == field.removeprefix("runner.") for field, _, _ in RANGES if field.startswith("runner."))
    place = "options.runner" if is_runners or name == "use_mmap" else "options"
    assert why(checked) == f"has a field of its own: {place}.{name}"


def test_everything_that_is_wrong_is_told_at_once() -> None:
    """A caller learns all its mistakes in one go."""
    checked = item(
        chat(user(""), Message(role=Role.SYSTEM), tools=(Tool(name="", parameters_json="["),), top_logprobs=99),
        item_id="",
        model="m" * 9,
        options=Options(temperature=-1.0, stop=("",), runner=RunnerOptions(num_ctx=1)),
    )
    assert wrong(checked) == [
        "item_id",
        "model",
        "options.temperature",
        "options.runner.num_ctx",
        "options.stop",
        "chat.messages[0].content",
        "chat.messages[1].content",
        "chat.tools[0].name",
        "chat.tools[0].parameters_json",
        "chat.logprobs.top",
    ]


def test_default_limits_are_the_documented_ones() -> None:
    """Sizes that clients can rely on."""
    limits = Limits()
    assert (limits.max_items, limits.max_open_items, limits.max_messages) == (50_000, 10_000, 1024)
    assert limits.max_item_text_bytes == 4 * 1024 * 1024
    assert replace(limits, max_items=1).max_items == 1


# -- Several answers, and what a batch puts in front ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("checked", "paths"),
    [
        (item(n=64), []),
        (item(n=0), ["n"]),
        (item(n=65), ["n"]),
        (item(EmbedRequest(input=("a",))), []),
        (item(EmbedRequest(input=("a",)), n=2), ["n"]),
        # "#64" has three bytes, and ids eight.
        (item(item_id="x" * 5, n=64), []),
        (item(item_id="x" * 6, n=64), ["n"]),
        (item(item_id="x" * 6, n=9), []),
        (item(item_id="x" * 8, n=1), []),
        (item(item_id="x" * 9, n=9), ["item_id"]),
    ],
)
def test_the_number_of_answers(checked: Item, paths: list[str]) -> None:
    """1 to 64, of what can have more than one, with room for the ids."""
    assert wrong(checked) == paths


def test_shared_messages_count_as_the_item_s_own() -> None:
    """Their number and their text; the paths are those of the item as it was sent."""
    two = item(chat(user("x" * 60), user()))
    assert check_item(two, SMALL, shared_count=1, shared_bytes=38) == []
    (many,) = check_item(two, SMALL, shared_count=2, shared_bytes=38)
    assert (many.field, many.description) == (
        "chat.messages",
        "has 4 messages (2 of them in shared_context); at most 3 are taken",
    )
    (long,) = check_item(two, SMALL, shared_count=1, shared_bytes=39)
    assert long.field == "chat.messages[0].content"
    assert "101 bytes of text (39 of them in shared_context)" in long.description


@pytest.mark.parametrize(
    ("request_", "path"), [(GenerateRequest(prompt="p"), "generate"), (EmbedRequest(input=("a",)), "embed")]
)
def test_shared_messages_go_with_conversations(request_: GenerateRequest | EmbedRequest, path: str) -> None:
    """Nothing else can have them in front."""
    (violation,) = check_item(item(request_), SMALL, shared_count=1, shared_bytes=1)
    assert violation.field == path
    assert "shared_context goes with chat items only" in violation.description


def test_shared_messages_are_judged_once() -> None:
    """As an item's are, with paths of their own; and room for one more message is left."""
    call = ToolCall(name="f", arguments_json='{"a": "é"}')
    messages = (user("abc"), Message(role=Role.ASSISTANT, thinking="d", tool_calls=(call,)))
    assert messages_bytes(messages) == 3 + 1 + 11
    assert list(check_shared(messages, SMALL)) == []
    assert [one.field for one in check_shared((*messages, user("")), SMALL)] == [
        "shared_context.messages",
        "shared_context.messages[2].content",
    ]
    assert [one.field for one in check_shared([user("x" * 101)], SMALL)] == ["shared_context.messages"]


def test_what_an_item_takes() -> None:
    """Its texts and its pictures; one that cannot be run takes nothing."""
    pictured = Message(role=Role.USER, content="é", images=(b"1234", b"5"))
    assert request_bytes(item(ChatRequest(messages=(pictured, user("ab"))))) == 2 + 5 + 2
    assert request_bytes(item(GenerateRequest(prompt="abc", images=(b"1234",)))) == 7
    assert request_bytes(item(EmbedRequest(input=("ab", "c")))) == 3
    assert request_bytes(BadItem(item_id="a", violations=())) == 0
