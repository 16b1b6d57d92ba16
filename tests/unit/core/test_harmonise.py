"""One context for the items of a model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.harmonise import (
    LEAST_CONTEXT,
    USUAL_CONTEXT,
    Context,
    Standing,
    kin_of,
    longest_prompt_bytes,
    shared,
    with_context,
)
from unisono.core.model import (
    EmbedRequest,
    GenerateRequest,
    Item,
    LoadedRunner,
    ModelInfo,
    Options,
    RunnerOptions,
    RunnerSpec,
)


def item(num_ctx: int | None = None, *, size: int = 8, num_predict: int | None = None) -> Item:
    """A prompt of so many bytes, which asks for a context or for none."""
    options = Options(num_predict=num_predict, runner=RunnerOptions(num_ctx=num_ctx))
    return Item(item_id="x", index=0, request=GenerateRequest(prompt="x" * size), options=options)


def choose(*items: Item, trained: int = 0, loaded: int | None = None, **more: Any) -> Context:
    """The context of these items; `loaded` is that of the model in memory."""
    there = None if loaded is None else LoadedRunner(model="m", digest="m", context_length=loaded)
    return shared(items, ModelInfo(backend="b", name="m", digest="m", context_length=trained), there=there, **more)


def runner(num_ctx: int | None) -> RunnerSpec:
    """The model with a context."""
    return RunnerSpec(backend="b", model="m", digest="m", options=RunnerOptions(num_ctx=num_ctx))


def standing(num_ctx: int | None, tokens: int = 0, *, is_busy: bool = False) -> Standing:
    """A runner that had work."""
    return Standing(runner=runner(num_ctx), context_tokens=tokens, is_busy=is_busy)


# -- What is in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "loaded", "num_ctx", "why"),
    [
        # Nobody asks.
        ([None], None, None, "the backend's default"),
        ([None], 0, None, "the backend's default"),
        ([None], 2048, 2048, "is loaded with them, and no item needs more"),
        # All ask, or some.
        ([2048], None, 2048, "the most that an item asks for"),
        ([2048, None], None, 2048, "the most that an item asks for"),
        ([2048, 4096], None, 4096, "the most that an item asks for"),
        ([2048, 4096], 4096, 4096, "is loaded with them"),
        ([2048, 4096], 8192, 8192, "is loaded with them"),
        ([2048, 4096], 2048, 4096, "the most that an item asks for"),
        ([2048], 0, 2048, "the most that an item asks for"),
    ],
)
def test_loaded_where_it_is_large_enough(
    asked: list[int | None], loaded: int | None, num_ctx: int | None, why: str
) -> None:
    """What is in memory is taken; otherwise the largest that is asked for."""
    found = choose(*map(item, asked), loaded=loaded)
    assert found.num_ctx == num_ctx
    assert found.tokens == (num_ctx or 0)
    assert why in found.reason


def test_no_more_than_the_model_was_trained_for() -> None:
    """More would be cut down by the backend itself; what is loaded with that is large enough."""
    found = choose(item(9000), item(100), trained=8192)
    assert (found.num_ctx, found.reason) == (8192, "8,192 tokens: the model was trained for no more")
    there = choose(item(9000), trained=8192, loaded=8192).reason
    assert there == "8,192 tokens: the model is loaded with them, and it was trained for no more"
    at_work = choose(item(9000), trained=8192, standing=[standing(8192, is_busy=True)]).reason
    assert at_work == "8,192 tokens: the model is at work with it, and it was trained for no more"


# -- Those who ask for nothing -----------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_into_what_is_loaded() -> None:
    """600 tokens do not fit into 512: another context is loaded, with room for twice as many short tokens."""
    found = choose(item(size=2400), loaded=512)
    assert (found.num_ctx, found.reason) == (1280, "1,280 tokens: what items that ask for none may need")
    assert choose(item(size=2400, num_predict=300), loaded=512).num_ctx == 1536
    assert choose(item(size=2048), loaded=512).num_ctx == 512


def test_those_who_ask_for_little_do_not_harm_the_others() -> None:
    """Where one asks for 256 tokens, a prompt of 2,400 bytes gets what it needs; nobody gets beyond the usual."""
    assert choose(item(256), item(size=2400)).num_ctx == 1280
    assert choose(item(256), item(size=100)).num_ctx == 256
    assert choose(item(256), item(size=100_000)).num_ctx == USUAL_CONTEXT
    assert choose(item(256), item(size=100_000), trained=1000).num_ctx == 1000


def test_each_text_of_an_embedding_counts_for_itself() -> None:
    """Many texts need no more context than the longest."""
    texts = Item(item_id="x", index=0, request=EmbedRequest(input=("é" * 300, "x" * 2400, "x" * 2400)))
    assert longest_prompt_bytes(texts) == 2400
    assert longest_prompt_bytes(Item(item_id="x", index=0, request=EmbedRequest(input=()))) == 0
    assert choose(texts, loaded=600).num_ctx == 600


# -- Memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "loaded", "fits", "num_ctx", "why"),
    [
        (8192, None, 10_000, 8192, "asks for"),
        (8192, None, 5000, 4864, "memory allows no more"),
        (8192, None, 0, LEAST_CONTEXT, "memory allows no more"),
        (256, None, 0, 256, "asks for"),
        (600, None, 599, 512, "memory allows no more"),
        # It is in memory, so it fits, whatever the estimate says.
        (8192, 8192, 5000, 8192, "loaded"),
        (8192, 6000, 5000, 6000, "memory allows no more"),
        (8192, 2048, 5000, 4864, "memory allows no more"),
        # The backend's default may be too much.
        (None, None, 10_000, None, "default"),
        (None, None, 4096, None, "default"),
        (None, None, 3000, 2816, "memory allows no more"),
        (None, 2048, 1000, 2048, "loaded"),
    ],
)
def test_no_more_than_memory_allows(
    asked: int | None, loaded: int | None, fits: int, num_ctx: int | None, why: str
) -> None:
    """In full steps, but never so little that nothing could run."""
    found = choose(item(asked), loaded=loaded, fits=fits)
    assert found.num_ctx == num_ctx
    assert why in found.reason


# -- What is at work ---------------------------------------------------------------------------------------------


def test_what_is_at_work_is_joined() -> None:
    """A runner with work is taken before what is in memory, if it is large enough; an idle one is not."""
    found = choose(item(2048), loaded=8192, standing=[standing(4096, is_busy=True)])
    assert (found.num_ctx, found.tokens) == (4096, 4096)
    assert found.reason == "4,096 tokens: the model is at work with it, and no item needs more"
    assert choose(item(5000), loaded=8192, standing=[standing(4096, is_busy=True)]).num_ctx == 8192
    assert choose(item(2048), standing=[standing(4096)]).num_ctx == 2048


def test_the_default_that_is_at_work() -> None:
    """How large it is is known once it was loaded; until then only those who ask for nothing can join it."""
    loading, ready = standing(None, is_busy=True), standing(None, 4096, is_busy=True)
    assert choose(item(), standing=[loading]).num_ctx is None
    assert choose(item(), standing=[loading]).reason.startswith("the backend's default: the model is at work")
    assert choose(item(2048), standing=[loading]).num_ctx == 2048
    found = choose(item(2048), standing=[ready])
    assert (found.num_ctx, found.tokens) == (None, 4096)


def test_what_was_loaded_by_default_keeps_its_name() -> None:
    """A runner that is idle and still in memory is the same runner, with all that was learned of it."""
    kept = [standing(8192), standing(None, 4096)]
    assert choose(item(), loaded=4096, standing=kept).num_ctx is None
    assert choose(item(1000), loaded=4096, standing=kept).num_ctx is None
    # Somebody else has loaded it with another context meanwhile.
    assert choose(item(), loaded=2048, standing=kept).num_ctx == 2048


def test_kin_differ_in_their_context_alone() -> None:
    """And in whether they are loaded by an embedding."""
    one = RunnerSpec(backend="b", model="m", digest="m", options=RunnerOptions(num_ctx=5, num_batch=2))
    assert kin_of(one) == RunnerSpec(backend="b", model="m", digest="m", options=RunnerOptions(num_batch=2))
    assert with_context(kin_of(one), 5) == one
    assert with_context(one, 5) is one
    embedding = RunnerSpec(backend="b", model="m", digest="m", is_embedding=True)
    assert kin_of(embedding) == runner(None)


# -- Properties --------------------------------------------------------------------------------------------------

_SIZES = st.one_of(st.none(), st.integers(16, 20_000))


@given(
    asked=st.lists(_SIZES, min_size=1, max_size=6),
    trained=st.sampled_from([0, 2048, 8192]),
    loaded=_SIZES,
    kept=st.lists(st.tuples(_SIZES, st.integers(0, 20_000), st.booleans()), max_size=4),
    fits=st.one_of(st.none(), st.integers(0, 20_000)),
)
def test_everybody_is_served_or_there_is_a_reason(
    asked: list[int | None],
    trained: int,
    loaded: int | None,
    kept: list[tuple[int | None, int, bool]],
    fits: int | None,
) -> None:
    """The context is enough for all who ask, unless the model or memory forbids; the order of items is the same."""
    known = [standing(num_ctx, tokens, is_busy=is_busy) for num_ctx, tokens, is_busy in kept]
    found = choose(*map(item, asked), trained=trained, loaded=loaded, standing=known, fits=fits)
    assert found == choose(*map(item, asked[::-1]), trained=trained, loaded=loaded, standing=known, fits=fits)
    largest = max([size for size in asked if size is not None], default=0)
    if 0 < found.tokens < largest:
        assert found.tokens >= trained > 0 or (fits is not None and found.tokens >= min(fits - 256, largest))
    if found.num_ctx is not None and found.tokens not in {loaded, *(one.tokens for one in known)}:
        assert found.num_ctx == found.tokens
        assert not trained or found.tokens <= trained
        assert fits is None or found.tokens <= max(fits, LEAST_CONTEXT)
