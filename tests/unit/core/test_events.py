"""What an event is charged for."""

from __future__ import annotations

from array import array

import pytest

from unisono.core.errors import BackendFailedError
from unisono.core.events import Accepted, LastingEvent, Result, ResultPart, weight
from unisono.core.model import Completion, ItemState, TokenLogprob, ToolCall
from unisono.core.report import Progress

PLAIN = weight(Accepted(batch_id="b", item_count=1))
PROB = TokenLogprob(token="a", logprob=-0.1, top=(TokenLogprob(token="b", logprob=-0.2),) * 4)


def result(**more: object) -> Result:
    """A result of an item with an id of four bytes."""
    return Result(item_id="four", index=0, state=ItemState.COMPLETED, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("event", "beyond"),
    [
        (Progress(), 0),
        (result(), 4),
        (result(error=BackendFailedError("12345678")), 4 + 8),
        (result(completion=Completion(model="m", content="a" * 100, thinking="b" * 10)), 4 + 110),
        # Characters beyond ASCII take up to four bytes.
        (result(completion=Completion(model="m", content="é" * 100)), 4 + 400),
        (result(completion=Completion(model="m", embeddings=(array("f", [0.0] * 384),) * 2)), 4 + 2 * 384 * 4),
        (result(completion=Completion(model="m", tool_calls=(ToolCall(name="f", arguments_json="{}"),) * 3)), 4 + 6),
        (ResultPart(item_id="four", index=0, part=0, content="abc", thinking="de"), 5),
        (ResultPart(item_id="four", index=0, part=0, embeddings=(array("f", [0.0]),)), 4),
    ],
)
def test_weight_is_texts_and_vectors(event: LastingEvent, beyond: int) -> None:
    """An event is charged a flat sum, and every byte of its texts and vectors."""
    assert PLAIN >= 256
    assert weight(event) == PLAIN + beyond


def test_log_probabilities_are_charged_with_their_alternatives() -> None:
    """Each token's probability and each alternative count alike."""
    one = weight(result(completion=Completion(model="m", logprobs=(PROB,)))) - weight(result())
    ten = weight(result(completion=Completion(model="m", logprobs=(PROB,) * 10))) - weight(result())
    assert ten == 10 * one
    assert one >= 5 * 100
    part = ResultPart(item_id="four", index=0, part=0, logprobs=(PROB,))
    assert weight(part) - PLAIN == one
