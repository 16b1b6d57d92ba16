"""Prompts → families that begin alike."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Item,
    Message,
    Role,
    Think,
    Tool,
    ToolCall,
)
from unisono.core.prefixes import MIN_SHARED_BYTES, Prefix, chain_of, common_bytes, families, lone_prefix

PICTURE = b"\x89PNG\r\n\x1a\n one"
OTHER_PICTURE = b"\x89PNG\r\n\x1a\n two"


def message(content: str, role: Role = Role.USER, **more: Any) -> Message:
    """A message of the user, unless said otherwise."""
    return Message(role=role, content=content, **more)


def system(content: str) -> Message:
    """What all begin with."""
    return message(content, Role.SYSTEM)


def chat(*messages: Message | str, **more: Any) -> Item:
    """A conversation."""
    said = tuple(message(each) if isinstance(each, str) else each for each in messages)
    return Item(item_id="x", index=0, request=ChatRequest(messages=said, **more))


def generate(prompt: str, **more: Any) -> Item:
    """A prompt to complete."""
    return Item(item_id="x", index=0, request=GenerateRequest(prompt=prompt, **more))


def embed(*texts: str) -> Item:
    """Texts to embed."""
    return Item(item_id="x", index=0, request=EmbedRequest(input=texts))


def words(name: str, size: int) -> str:
    """Text of exactly so many bytes, unlike that of any other name."""
    return (f"{name} " * size)[:size]


def sizes(found: list[Prefix | None]) -> list[int]:
    """The size of each item's shared part; 0 for none."""
    return [one.size if one else 0 for one in found]


# -- Families ----------------------------------------------------------------------------------------------------


def test_nothing_and_a_single_item_have_no_family() -> None:
    """There must be somebody to share with."""
    assert families([]) == []
    assert families([chat(words("a", 5000))]) == [None]


def test_embeddings_have_no_family() -> None:
    """Nothing of an embedding is kept in a slot."""
    assert families([embed("same text"), embed("same text")]) == [None, None]
    assert chain_of(embed("text")).digests == ()
    assert chain_of(embed("text")).size == 0


def test_a_shared_system_message_counts_exactly() -> None:
    """700 bytes are two full blocks and a rest; all of it is shared."""
    items = [chat(system(words("s", 700)), f"question {n}") for n in range(5)]
    found = families(items)
    assert sizes(found) == [700] * 5
    assert all(one is found[0] for one in found)


def test_an_item_that_begins_otherwise_has_no_family() -> None:
    """Only those who share are a family."""
    items = [
        chat(system(words("s", 700)), "a"),
        chat(system(words("t", 700)), "b"),
        chat(system(words("s", 700)), "c"),
    ]
    assert sizes(families(items)) == [700, 0, 700]


def test_a_short_common_part_is_not_worth_it() -> None:
    """Below the least size the items have no family; from it on they have one."""
    assert sizes(families([chat(system(words("s", MIN_SHARED_BYTES - 1)), str(n)) for n in range(2)])) == [0, 0]
    assert sizes(families([chat(system(words("s", MIN_SHARED_BYTES)), str(n)) for n in range(2)])) == [256, 256]


def test_common_text_inside_one_message_counts_in_blocks() -> None:
    """A prompt template that the caller filled in: its full blocks are shared."""
    items = [chat(words("template", 1000) + f" question {n}") for n in range(3)]
    assert sizes(families(items)) == [768] * 3
    assert sizes(families([generate(words("template", 1000) + f" question {n}") for n in range(3)])) == [768] * 3


@pytest.mark.parametrize("count", [4, 16, 64])
def test_as_many_families_as_system_messages(count: int) -> None:
    """Items of interleaved families find each other."""
    items = [chat(system(words(f"s{n % count}", 1500)), f"question {n}") for n in range(count * 3)]
    found = families(items)
    assert sizes(found) == [1500] * len(items)
    assert len({id(one) for one in found}) == count
    assert all(one is found[n % count] for n, one in enumerate(found))


def test_nested_families() -> None:
    """The system message is shared by all, the examples by some: each has the deepest that is worth it."""
    rules = system(words("rules", 600))
    items = [
        *(chat(rules, words("example one", 400), message("yes", Role.ASSISTANT), f"q{n}") for n in range(3)),
        *(chat(rules, words("example two", 400), message("yes", Role.ASSISTANT), f"q{n}") for n in range(3)),
        *(chat(rules, f"q{n}") for n in range(3)),
    ]
    found = families(items)
    assert sizes(found) == [1003] * 6 + [600] * 3
    assert found[0] is not found[3]
    assert common_bytes(found[0], found[3]) == 600
    assert common_bytes(found[0], found[8]) == 600
    # The inner family begins with the outer one.
    assert found[8] is not None
    assert found[0] is not None
    assert found[0].digests[: len(found[8].digests)] == found[8].digests


def test_a_small_refinement_does_not_split_a_family() -> None:
    """Two questions that are alike for a moment stay with the others."""
    rules = system(words("rules", 600))
    items = [chat(rules, "good day", "one"), chat(rules, "good day", "two"), chat(rules, "hello")]
    assert sizes(families(items)) == [600] * 3


def test_small_refinements_add_up() -> None:
    """What is too little for a step of its own counts with what follows."""
    rules = system(words("rules", 600))
    items = [
        *(chat(rules, words("a", 200), words("b", 200), f"q{n}") for n in range(2)),
        *(chat(rules, words("a", 200), f"q{n}") for n in range(2)),
        chat(rules, "q"),
    ]
    assert sizes(families(items)) == [1000, 1000, 600, 600, 600]


def test_a_family_found_before_its_own_deepest_members() -> None:
    """Those who end in the family's last step, and those who share a little more, have one object."""
    rules = system(words("rules", 600))
    items = [chat(rules, "a", "1"), chat(rules, "a", "2"), chat(rules, "b"), chat(rules, "c")]
    for order in (items, items[::-1]):
        assert len({id(one) for one in families(order)}) == 1


def test_identical_prompts_share_all() -> None:
    """Several answers of one prompt."""
    found = families([chat(system(words("s", 300)), words("q", 300))] * 3)
    assert sizes(found) == [600] * 3
    assert found[0] is found[1]


def test_bytes_are_those_of_utf8() -> None:
    """Two bytes a letter; a lone surrogate, which JSON can bring, is no error."""
    assert sizes(families([chat(system("ä" * 400), f"q{n}") for n in range(2)])) == [800, 800]
    assert sizes(families([generate("\ud800" * 400), generate("\ud800" * 400)])) == [1200, 1200]


# -- What begins a prompt ----------------------------------------------------------------------------------------


def test_tools_come_first() -> None:
    """The same message after other tools is another beginning."""
    tools = tuple(
        Tool(name=f"tool{n}", description=words("what it does", 300), parameters_json="{}") for n in range(3)
    )
    found = families([chat(words(f"q{n}", 600), tools=tools) for n in range(2)])
    assert all(900 <= size < 1000 for size in sizes(found))
    part = families([chat(words(f"q{n}", 600), tools=tools[: n + 1]) for n in range(3)])
    assert sizes(part)[1] > sizes(part)[0] > 300
    assert sizes(families([chat(words("q", 600), tools=tools), chat(words("q", 600))])) == [0, 0]


def test_pictures_count_by_what_is_in_them() -> None:
    """A picture counts as a kilobyte of text, and stands before its message's text."""
    same = [chat(message(f"what is in question {n}?", images=(bytes(PICTURE),))) for n in range(2)]
    assert sizes(families(same)) == [1024, 1024]
    apart = [chat(message(words("same", 600), images=(one,))) for one in (PICTURE, OTHER_PICTURE)]
    assert sizes(families(apart)) == [0, 0]
    assert sizes(families([generate(f"question {n}", images=(PICTURE,)) for n in range(2)])) == [1024, 1024]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (message(words("x", 400), Role.USER), message(words("x", 400), Role.ASSISTANT)),
        (message("", Role.ASSISTANT, thinking=words("x", 400)), message(words("x", 400), Role.ASSISTANT)),
        (
            message(words("x", 400), Role.ASSISTANT, thinking="one"),
            message(words("x", 400), Role.ASSISTANT, thinking="other"),
        ),
    ],
)
def test_who_says_it_and_how_is_part_of_it(one: Message, other: Message) -> None:
    """The same text in another role, or after other thoughts, is computed anew."""
    assert sizes(families([chat(one), chat(other)])) == [0, 0]


def test_calls_and_answers_of_tools_are_part_of_it() -> None:
    """What was called, and whose answer it is."""

    def talk(arguments: str, call_id: str, n: int) -> Item:
        call = ToolCall(id="c", name="f", arguments_json=arguments)
        return chat(
            message("", Role.ASSISTANT, tool_calls=(call,)),
            message("ok", Role.TOOL, tool_name="f", tool_call_id=call_id),
            words(f"q{n}", 300),
        )

    long = '{"text": "' + "y" * 300 + '"}'
    whole, other_answer = (
        sizes(families([talk(long, "c", 1), talk(long, "c", 2)])),
        families([talk(long, "c", 1), talk(long, "d", 1)]),
    )
    assert whole[0] > 312
    assert sizes(other_answer)[0] == whole[0] - len("f\0c")
    assert sizes(families([talk(long, "c", 1), talk("{}", "c", 1)])) == [0, 0]


@pytest.mark.parametrize(
    "more",
    [{"raw": True}, {"template": "{{ .Prompt }}"}, {"system": "Be short."}, {"suffix": "end"}, {"think": Think.ON}],
)
def test_a_prompt_that_is_rendered_otherwise_begins_otherwise(more: dict[str, Any]) -> None:
    """The same prompt in another template has nothing in common."""
    text = words("p", 1000)
    assert sizes(families([generate(text), generate(text, **more)])) == [0, 0]
    assert sizes(families([generate(text, **more), generate(text, **more)]))[0] >= 1000


def test_system_and_template_of_a_prompt_are_shared() -> None:
    """They stand before the prompt."""
    items = [generate(f"question {n}", system=words("s", 500), template=words("t", 300)) for n in range(3)]
    assert sizes(families(items)) == [800] * 3


def test_a_suffix_comes_after_the_prompt() -> None:
    """It is shared only where the prompt is."""
    items = [generate(words("p", 300), suffix=words("s", 300)) for n in range(2)]
    assert sizes(families(items)) == [600] * 2


def test_kinds_never_share() -> None:
    """A chat and a prompt with the same text are rendered differently."""
    text = words("t", 1000)
    assert sizes(families([chat(text), generate(text)])) == [0, 0]
    assert common_bytes(chain_of(chat(text)), chain_of(generate(text))) == 0


def test_a_conversation_without_messages_has_an_empty_chain() -> None:
    """It is refused elsewhere; here it is no error."""
    assert chain_of(chat()).size == 0
    assert families([chat(), chat()]) == [None, None]


# -- Chains, also across batches ---------------------------------------------------------------------------------


def test_keys_do_not_depend_on_the_batch_or_the_process() -> None:
    """The same leading part is named alike wherever it is met: the number is blake2b's, not Python's hash."""
    one = families([chat(system(words("s", 700)), "a"), chat(system(words("s", 700)), "b")])[0]
    other = families([chat(system(words("s", 700)), f"q{n}") for n in range(9)])[0]
    assert one is not None
    assert other is not None
    assert one.key == other.key == 7910190016294841972
    assert one != other


def test_what_a_slot_held_meets_a_new_family() -> None:
    """The whole chain of an item shares with its family all of the family, and with itself everything."""
    rules = system(words("s", 700))
    done = chain_of(chat(rules, words("first", 500)))
    family = families([chat(rules, "a"), chat(rules, "b")])[0]
    assert done.size == 1200
    assert common_bytes(done, family) == common_bytes(family, done) == 700
    assert common_bytes(done, done) == 1200
    assert common_bytes(None, family) == common_bytes(family, None) == 0


def test_only_the_first_steps_of_a_long_prompt_count() -> None:
    """1,024 of them, in the middle of a text, after it, and in a memory of what was written."""
    long = words("long", 400_000)
    assert chain_of(chat(long)).size == 1024 * 256
    assert len(chain_of(chat(*["x"] * 2000)).digests) == 1024
    assert sizes(families([chat(system(long), f"q{n}") for n in range(2)])) == [1024 * 256] * 2


# -- Properties --------------------------------------------------------------------------------------------------

_TEXTS = st.builds(
    "".join, st.lists(st.sampled_from(["a" * 256, "b" * 256, "a" * 100, "ä" * 128, "é", "x" * 700, ""]), max_size=4)
)
_MESSAGES = st.builds(
    Message,
    role=st.sampled_from(Role),
    content=_TEXTS,
    images=st.sampled_from([(), (), (PICTURE,), (OTHER_PICTURE, PICTURE)]),
)
_CHATS = st.builds(lambda said: chat(*said), st.lists(_MESSAGES, min_size=1, max_size=4))
_PROMPTS = st.builds(lambda text, head: generate(text, system=head), _TEXTS, _TEXTS)
_ITEMS = st.lists(st.one_of(_CHATS, _PROMPTS), max_size=12)


def written(item: Item) -> list[tuple[str, bytes]]:
    """What an item's prompt holds, in order: each byte of text with whose it is, and pictures."""
    request = item.request
    if isinstance(request, ChatRequest):
        parts = [(each.role.value, each.images, each.content) for each in request.messages]
    else:
        assert isinstance(request, GenerateRequest)
        parts = [("gen system", (), request.system), ("gen prompt", (), request.prompt)]
    found: list[tuple[str, bytes]] = []
    for who, images, text in parts:
        for image in images:
            found += [("picture", image)] * 1024
        found += [(who, byte.to_bytes()) for byte in text.encode()]
    return found


@given(_ITEMS)
def test_members_of_a_family_really_share_its_bytes(items: list[Item]) -> None:
    """Whoever is in a family begins with its leading part, and at least two do."""
    found = families(items)
    for one, item in zip(found, items, strict=True):
        if one is None:
            continue
        assert one.size >= MIN_SHARED_BYTES
        start = written(item)[: one.size]
        assert len(start) == one.size
        assert sum(written(other)[: one.size] == start for other in items) >= 2
        for other, its in zip(found, items, strict=True):
            if other is one:
                assert written(its)[: one.size] == start
        assert chain_of(item).digests[: len(one.digests)] == one.digests


@given(_ITEMS, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(items: list[Item], chance: random.Random) -> None:
    """Each item's family is the same, wherever it stands."""
    order = list(range(len(items)))
    chance.shuffle(order)
    before = families(items)
    after = families([items[at] for at in order])
    for place, at in enumerate(order):
        one, other = before[at], after[place]
        assert (one and (one.key, one.digests, one.sizes)) == (other and (other.key, other.digests, other.sizes))


@given(_ITEMS)
def test_what_two_chains_have_in_common(items: list[Item]) -> None:
    """It is symmetric, no more than either has, all of it with itself, and really common."""
    chains = [(chain_of(item), written(item)) for item in items]
    for one, left in chains:
        assert list(one.sizes) == sorted(one.sizes)
        for other, right in chains:
            common = common_bytes(one, other)
            assert common == common_bytes(other, one) <= min(one.size, other.size)
            assert left[:common] == right[:common]
        assert common_bytes(one, one) == one.size


@given(_ITEMS)
def test_who_shares_enough_is_in_a_family(items: list[Item]) -> None:
    """Nobody is left out who has as much in common with another as makes a family."""
    found = families(items)
    chains = [chain_of(item) for item in items]
    for at, one in enumerate(found):
        best = max((common_bytes(chains[at], other) for n, other in enumerate(chains) if n != at), default=0)
        assert (one is None) == (best < MIN_SHARED_BYTES)
        if one is not None:
            assert best - one.size < MIN_SHARED_BYTES


def test_many_items_take_little_time() -> None:
    """50,000 items of 2,000 bytes behind one system message. Generous: a second machine may be busy."""
    head = words("You are a helpful assistant.", 1900)
    items = [chat(system(head), f"question {n} " + "x" * 80) for n in range(50_000)]
    started = time.process_time()
    found = families(items)
    assert time.process_time() - started < 4
    assert sizes(found[:3]) == [1900] * 3


def test_one_by_itself_is_compared_as_a_whole() -> None:
    """Where it is long enough to matter; two that begin alike have that in common."""
    assert lone_prefix(chat("short")) is None
    one, other = lone_prefix(chat("x" * 600 + "one")), lone_prefix(chat("x" * 600 + "other"))
    assert one is not None
    assert common_bytes(one, other) == 512
