"""Which items go in one request, what each gets of the answer, and which half is tried next."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.bundles import MOST_BYTES, MOST_TEXTS, Standing, bundled, dealt, merged, shares
from unisono.core.errors import (
    BackendBusyError,
    BackendFailedError,
    BackendStalledError,
    BackendUnavailableError,
    BadAnswerError,
    ConnectionLostError,
    LoadFailedError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    NotAuthorizedError,
    OutOfMemoryError,
    PromptTooLongError,
    RefusedByBackendError,
    RunnerDiedError,
    UnisonoError,
)
from unisono.core.model import (
    Durations,
    EmbedRequest,
    Finished,
    FinishReason,
    GenerateRequest,
    Item,
    Options,
    RunnerOptions,
    Usage,
)

TEXTS = st.lists(st.text(max_size=20), min_size=1, max_size=5)


def item(*texts: str, index: int = 0, options: Options | None = None, **fields: object) -> Item:
    """Texts to embed."""
    request = EmbedRequest(input=texts, **fields)  # type: ignore[arg-type]
    return Item(item_id=f"i{index}", index=index, request=request, options=options or Options())


def answer(vectors: int, tokens: int, cached: int | None = None) -> Finished:
    """An answer of so many vectors, whose numbers are their places."""
    return Finished(
        at_ns=7,
        finish_reason=FinishReason.EMBEDDED,
        model="m",
        usage=Usage(prompt_tokens=tokens, cached_prompt_tokens=cached),
        durations=Durations(total_s=2.0),
        embeddings=tuple(array("f", [place]) for place in range(vectors)),
    )


# -- Into bundles ----------------------------------------------------------------------------------------------


def test_items_that_differ_in_their_texts_alone_go_together() -> None:
    """In their order; and nothing to bundle is no bundle."""
    assert bundled([item("a"), item("b", "c"), item("d")]) == [(0, 1, 2)]
    assert bundled([]) == []


@pytest.mark.parametrize(
    "other",
    [
        item("b", dimensions=8),
        item("b", truncate=True),
        item("b", options=Options(seed=1)),
        item("b", options=Options(extra_json='{"low_vram":true}')),
        item("b", options=Options(runner=RunnerOptions(num_ctx=512))),
    ],
    ids=["dimensions", "truncate", "options", "extra options", "runner options"],
)
def test_what_is_asked_otherwise_goes_apart(other: Item) -> None:
    """Each kind in bundles of its own, that stand where their first item stood."""
    assert bundled([other, item("a"), item("b"), other]) == [(0, 3), (1, 2)]


def test_not_to_cut_is_what_happens_anyway() -> None:
    """`truncate: false`, and nothing said, are the same request."""
    assert bundled([item("a", truncate=False), item("b")]) == [(0, 1)]


def test_bundles_are_bounded_by_texts() -> None:
    """An item is never divided: what does not fit begins the next, and a large one is alone."""
    assert bundled([item("a", "b"), item("c", "d"), item("e")], most_texts=3) == [(0,), (1, 2)]
    assert bundled([item("a"), item(*"bcdef"), item("g")], most_texts=3) == [(0,), (1,), (2,)]
    assert [len(bundle) for bundle in bundled([item("x")] * (2 * MOST_TEXTS + 1))] == [MOST_TEXTS, MOST_TEXTS, 1]


def test_bundles_are_bounded_by_bytes() -> None:
    """Bytes of UTF-8, not characters."""
    assert bundled([item("äöü"), item("a"), item("bc")], most_bytes=7) == [(0, 1), (2,)]
    assert bundled([item("a" * 20), item("b")], most_bytes=7) == [(0,), (1,)]
    assert bundled([item("a" * (MOST_BYTES // 2))] * 3) == [(0, 1), (2,)]


def test_what_wants_no_embedding_goes_alone() -> None:
    """A prompt has no texts to put with others."""
    prompt = Item(item_id="p", index=0, request=GenerateRequest(prompt="x"))
    assert bundled([item("a"), prompt, item("b"), prompt]) == [(0, 2), (1,), (3,)]
    assert merged([prompt]) is prompt
    assert merged([prompt, prompt]) is prompt


@given(st.lists(st.tuples(TEXTS, st.sampled_from([None, 4, 8])), max_size=40), st.integers(1, 6))
def test_every_item_is_in_one_bundle(kinds: list[tuple[list[str], int | None]], most: int) -> None:
    """Of each kind in order; no bundle of several is larger than it may be; none could have taken the next."""
    items = [item(*texts, dimensions=kind) for texts, kind in kinds]
    bundles = bundled(items, most_texts=most)
    assert sorted(place for bundle in bundles for place in bundle) == list(range(len(items)))
    assert [bundle[0] for bundle in bundles] == sorted(bundle[0] for bundle in bundles)
    sizes = [len(texts) for texts, _ in kinds]
    for kind in (None, 4, 8):
        own = [bundle for bundle in bundles if kinds[bundle[0]][1] == kind]
        assert [place for bundle in own for place in bundle] == [p for p, one in enumerate(kinds) if one[1] == kind]
        assert all(len(one) == 1 or sum(sizes[place] for place in one) <= most for one in own)
        for one, after in pairwise(own):
            assert sum(sizes[place] for place in one) + sizes[after[0]] > most


# -- One request, and its answer -------------------------------------------------------------------------------


def test_a_bundle_is_the_first_item_with_all_texts() -> None:
    """All else is the same in all of them."""
    items = [item("a", "b", index=3, dimensions=4), item("c", index=5, dimensions=4)]
    sent = merged(items)
    assert sent == item("a", "b", "c", index=3, dimensions=4)
    assert merged(items[:1]) is items[0]


def test_an_answer_is_dealt_out() -> None:
    """Each gets the vectors of its own texts, and its share of the tokens; the rest is said of all."""
    items = [item("aaaa", "bb"), item("cc"), item("d")]
    first, second, third = dealt(answer(4, 18, cached=9), items)
    assert [[list(vector) for vector in one.embeddings] for one in (first, second, third)] == [
        [[0.0], [1.0]],
        [[2.0]],
        [[3.0]],
    ]
    assert [one.usage.prompt_tokens for one in (first, second, third)] == [12, 4, 2]
    assert [one.usage.cached_prompt_tokens for one in (first, second, third)] == [6, 2, 1]
    assert {(one.at_ns, one.model, one.durations, one.finish_reason) for one in (first, second, third)} == {
        (7, "m", Durations(total_s=2.0), FinishReason.EMBEDDED)
    }


def test_what_is_cached_need_not_be_said() -> None:
    """Then nobody has a share of it."""
    assert [one.usage.cached_prompt_tokens for one in dealt(answer(2, 4), [item("a"), item("b")])] == [None, None]


def test_an_item_alone_gets_the_whole_answer() -> None:
    """Untouched."""
    whole = answer(2, 9)
    assert dealt(whole, [item("a", "b")]) == [whole]


@given(st.lists(TEXTS, min_size=1, max_size=20), st.integers(0, 10_000))
def test_nothing_of_an_answer_is_lost(texts: list[list[str]], tokens: int) -> None:
    """Put together again, the parts are the whole."""
    items = [item(*one) for one in texts]
    whole = answer(sum(map(len, texts)), tokens)
    parts = dealt(whole, items)
    assert sum((part.embeddings for part in parts), ()) == whole.embeddings
    assert [len(part.embeddings) for part in parts] == [len(one) for one in texts]
    assert sum(part.usage.prompt_tokens for part in parts) == tokens


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [(10, [1, 1], [5, 5]), (10, [3, 1], [7, 3]), (3, [0, 0, 0], [1, 1, 1]), (2, [0, 5, 5], [0, 1, 1]), (0, [4], [0])],
)
def test_shares(total: int, weights: list[int], parts: list[int]) -> None:
    """By weight, and equal where there is none."""
    assert shares(total, weights) == parts


# -- After a failure -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PromptTooLongError, RefusedByBackendError])
def test_a_mistake_divides_and_charges_nobody(kind: type[UnisonoError]) -> None:
    """The halves have as many attempts as the bundle had left."""
    standing = Standing(max_attempts=3, charged=1)
    assert standing.after(kind("x")) == standing
    assert standing.attempts_left(100) == standing.attempts_left(1) == 2
    assert Standing(max_attempts=3, charged=5).attempts_left(2) == 1


@pytest.mark.parametrize(
    "kind",
    [
        RunnerDiedError,
        ConnectionLostError,
        BackendStalledError,
        OutOfMemoryError,
        BadAnswerError,
        BackendFailedError,
    ],
)
def test_a_failure_makes_suspects(kind: type[UnisonoError]) -> None:
    """Together they have one attempt; one alone has all of its own."""
    suspects = Standing(max_attempts=3, charged=2).after(kind("x"))
    assert suspects == Standing(max_attempts=3, is_suspect=True)
    assert [suspects.attempts_left(count) for count in (50, 2, 1)] == [1, 1, 3]
    assert suspects.after(kind("again")) == suspects


@pytest.mark.parametrize(
    "kind",
    [
        BackendBusyError,
        BackendUnavailableError,
        LoadFailedError,
        ModelLacksCapabilityError,
        ModelNotFoundError,
        NotAuthorizedError,
    ],
)
def test_what_concerns_all_does_not_divide(kind: type[UnisonoError]) -> None:
    """No half would fare better."""
    assert Standing(max_attempts=3).after(kind("x")) is None


def test_suspects_may_come_at_a_bad_time() -> None:
    """They had one attempt only, so a full queue does not end them."""
    suspects = Standing(max_attempts=3, is_suspect=True)
    assert suspects.after(BackendBusyError("x")) == suspects
    assert suspects.after(LoadFailedError("x")) is None
