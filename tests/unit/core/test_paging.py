"""Results that are too large for one message."""

from __future__ import annotations

from array import array
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.errors import BackendFailedError
from unisono.core.events import Result, weight
from unisono.core.model import Completion, ItemState, TokenLogprob
from unisono.core.paging import MAX_MESSAGE_WEIGHT, split

MIB = 1024 * 1024
PROB = TokenLogprob(token="a", logprob=-0.1, top=(TokenLogprob(token="b", logprob=-0.2),))


def result(completion: Completion | None) -> Result:
    """A result with, or without, an answer."""
    return Result(item_id="a", index=3, state=ItemState.COMPLETED, completion=completion)


@pytest.mark.parametrize("completion", [None, Completion(model="m"), Completion(model="m", content="x" * MIB)])
def test_what_fits_stays_whole(completion: Completion | None) -> None:
    """A result that fits into a message has no parts, and is not touched."""
    assert split(result(completion)) == ([], result(completion))


def test_failure_is_never_split() -> None:
    """A result without an answer is sent as it is, however long its error is."""
    failed = Result(item_id="a", index=0, state=ItemState.FAILED, error=BackendFailedError("x" * 5 * MIB))
    assert split(failed) == ([], failed)


@given(
    content=st.integers(0, 3 * MIB),
    thinking=st.integers(0, 2 * MIB),
    vectors=st.lists(st.integers(1, 1000), max_size=20),
    probs=st.integers(0, 200),
    char=st.sampled_from("aé"),
)
def test_parts_and_rest_are_the_result(
    content: int, thinking: int, vectors: list[int], probs: int, char: str
) -> None:
    """Put together in order, parts and rest are the result as it was; each fits, and all are numbered from 0."""
    answer = Completion(
        model="m",
        content=char * content,
        thinking=char * thinking,
        embeddings=tuple(array("f", [float(n)] * size) for n, size in enumerate(vectors)),
        logprobs=(PROB,) * probs,
    )
    parts, rest = split(result(answer), limit=16_384)
    done = rest.completion
    assert done is not None
    assert "".join(part.content for part in parts) + done.content == answer.content
    assert "".join(part.thinking for part in parts) + done.thinking == answer.thinking
    assert (*chain.from_iterable(part.embeddings for part in parts), *done.embeddings) == answer.embeddings
    assert (*chain.from_iterable(part.logprobs for part in parts), *done.logprobs) == answer.logprobs
    assert [part.part for part in parts] == list(range(len(parts))) == list(range(rest.parts))
    assert {(part.item_id, part.index) for part in parts} <= {("a", 3)}
    assert weight(rest) <= 16_384
    assert all(weight(part) <= MAX_MESSAGE_WEIGHT for part in parts)


def test_vector_that_is_larger_than_a_part_goes_alone() -> None:
    """One vector past the limit is not lost, and takes nobody with it."""
    vectors = tuple(array("f", [0.0] * size) for size in (10, 1000, 10))
    parts, rest = split(result(Completion(model="m", embeddings=vectors)), limit=1000)
    assert [len(part.embeddings) for part in parts] == [1, 1, 1]
    assert rest.parts == 3
