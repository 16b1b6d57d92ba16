"""Whether all items of a batch can run at one time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unisono.core.batch import BatchConfig, CoScheduling
from unisono.core.errors import NotEnoughSlotsError
from unisono.core.memory import MemoryBounds
from unisono.core.model import (
    GenerateRequest,
    Item,
    ModelInfo,
    Options,
    RunnerSpec,
    Slots,
    SlotSource,
    SlotState,
)
from unisono.core.plan import Group
from unisono.core.required import contradictions, lacks_room


def group(items: int, model: str = "m", *, num_predict: int | None = None) -> Group:
    """So many items on one runner, each with a prompt of 40 bytes."""
    asked = [
        Item(
            item_id=f"{i}",
            index=i,
            request=GenerateRequest(prompt="p" * 40),
            options=Options(num_predict=num_predict),
        )
        for i in range(items)
    ]
    return Group(
        runner=RunnerSpec(backend="b", model=model, digest=model),
        model=ModelInfo(backend="b", name=model, digest=model),
        items=tuple(asked),
        is_loaded=True,
        reason="it is there",
    )


def state(count: int, source: SlotSource, at_least: int = 0, limit: int = 64) -> SlotState:
    """Slots of which that is known."""
    return SlotState(slots=Slots(count=count, source=source), at_least=at_least, limit=limit)


def lack(*groups: tuple[Group, SlotState], bounds: MemoryBounds | None = None) -> NotEnoughSlotsError | None:
    """Why they cannot go, with four bytes a token."""
    return lacks_room(groups, bounds or MemoryBounds(), bytes_per_token=lambda _: 4.0)


FOUR = state(4, SlotSource.TOLD)


# -- Terms -------------------------------------------------------------------------------------------------------


def test_terms_that_allow_fewer_at_a_time_contradict() -> None:
    """As many as the items, or no limit, is none."""
    config = BatchConfig(co_scheduling=CoScheduling.REQUIRED, max_concurrency=3)
    assert contradictions(config, 3) == []
    assert contradictions(replace(config, max_concurrency=None), 9) == []
    (wrong,) = contradictions(config, 4)
    assert wrong.field == "config.max_concurrency"
    for part in ("is 3", "4 items", "co_scheduling REQUIRED", "raise it", "TOGETHER"):
        assert part in wrong.description


# -- Slots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "known"),
    [
        (4, state(4, SlotSource.CONFIGURED)),
        (4, state(8, SlotSource.TOLD)),
        # Every runner has one.
        (1, state(0, SlotSource.UNKNOWN)),
        (1, state(8, SlotSource.REMEMBERED)),
        (4, state(4, SlotSource.LEARNED, limit=4)),
        # The number is not known, but so many were seen at one time.
        (4, state(0, SlotSource.UNKNOWN, at_least=4, limit=8)),
        (4, state(2, SlotSource.REMEMBERED, at_least=4)),
    ],
)
def test_enough_slots(items: int, known: SlotState) -> None:
    """Configured, told, learned or seen."""
    assert lack((group(items), known)) is None


def test_nothing_to_run_needs_no_slots() -> None:
    """Items that fail at once need none."""
    assert lack() is None


@pytest.mark.parametrize(
    ("items", "known", "slots", "says"),
    [
        (5, state(4, SlotSource.CONFIGURED), 4, "has 4 slots (configured). Start Ollama with OLLAMA_NUM_PARALLEL=5"),
        (2, state(1, SlotSource.TOLD), 1, "has 1 slot (told)"),
        (5, state(4, SlotSource.LEARNED, at_least=9), 4, "UNISONO_SLOTS=5"),
        (5, state(8, SlotSource.REMEMBERED, at_least=3), 3, "has shown 3 so far"),
        (5, state(0, SlotSource.UNKNOWN), 1, "has shown none yet. If it has as many, say so with UNISONO_SLOTS"),
        (
            16,
            SlotState(
                slots=Slots(count=1, source=SlotSource.LEARNED),
                limit=1,
                reason="OLLAMA_NUM_PARALLEL is 1, its default",
                remedy="start Ollama with OLLAMA_NUM_PARALLEL=8",
            ),
            1,
            "because OLLAMA_NUM_PARALLEL is 1, its default: start Ollama with OLLAMA_NUM_PARALLEL=16, or ask for",
        ),
        # So many there are, but they cannot all be used.
        (4, state(8, SlotSource.LEARNED, limit=2), 2, "has 8 slots (learned), of which 2 can be used at this moment"),
        (4, state(8, SlotSource.CONFIGURED, limit=3), 3, "of which 3 can be used at this moment"),
        (4, state(0, SlotSource.UNKNOWN, at_least=8, limit=2), 2, "has shown 8 so far, of which 2 can be used"),
    ],
)
def test_too_few(items: int, known: SlotState, slots: int, says: str) -> None:
    """How many are known, how many are needed, and what to do."""
    error = lack((group(items), known))
    assert isinstance(error, NotEnoughSlotsError)
    assert error.metadata == {"slots": str(slots), "items": str(items), "model": "m"}
    assert says in error.message
    assert "TOGETHER" in error.message


def test_two_runners_never_run_at_one_time() -> None:
    """However many slots each has; and a model without a name can be told of, too."""
    many = state(64, SlotSource.TOLD)
    error = lack((group(1), many), (group(2, "n"), many))
    assert error is not None
    assert error.metadata == {"slots": "0", "items": "3", "groups": "2"}
    nameless = lack((group(2, ""), state(1, SlotSource.TOLD)))
    assert nameless is not None
    assert "the model has 1 slot" in nameless.message


# -- Memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_predict", "items", "fit"),
    [
        # 10 tokens of prompt each; 200 may be reserved, half of four slots of 100.
        (40, 4, None),
        (41, 4, 3),
        (90, 2, None),
        (90, 3, 2),
        # However large its answer may be: it takes what the schedule says it takes.
        (190, 2, 1),
        (1000, 2, 1),
        # Without a bound, a slot each.
        (None, 2, None),
        (-1, 3, 2),
        (None, 1, None),
        (1000, 1, None),
    ],
)
def test_share_of_the_context(num_predict: int | None, items: int, fit: int | None) -> None:
    """All prompts and the longest answers must be allowed to be reserved together."""
    asked = replace(group(items, num_predict=num_predict), context_tokens=100)
    error = lack((asked, FOUR), bounds=MemoryBounds(factor=0.5))
    assert (error is None) is (fit is None)
    if error is not None:
        assert error.metadata == {"slots": str(fit), "items": str(items), "model": "m", "limit": "memory_factor"}
        for part in ("200 may be reserved", "UNISONO_MEMORY_FACTOR is 0.5", "num_predict", "TOGETHER"):
            assert part in error.message
    assert lack((asked, FOUR)) is None


def test_share_of_a_context_that_nobody_knows() -> None:
    """Two may be too many; one never is, and embeddings keep no context."""
    bounds = MemoryBounds(factor=0.5)
    error = lack((group(2), FOUR), bounds=bounds)
    assert error is not None
    assert error.metadata["limit"] == "memory_factor"
    assert "num_ctx" in error.message
    assert lack((group(1), FOUR), bounds=bounds) is None
    texts = group(2)
    assert lack((replace(texts, runner=replace(texts.runner, is_embedding=True)), FOUR), bounds=bounds) is None


def test_share_of_as_many_slots_as_are_tried() -> None:
    """While their number is not known, as the schedule does it."""
    asked = replace(group(4, num_predict=90), context_tokens=100)
    bounds = MemoryBounds(factor=0.5)
    assert lack((asked, state(0, SlotSource.UNKNOWN, at_least=4, limit=8)), bounds=bounds) is None
    assert lack((asked, state(0, SlotSource.UNKNOWN, at_least=4, limit=7)), bounds=bounds) is not None


@pytest.mark.parametrize(
    ("known", "limit_bytes", "fit"),
    [
        # 1,000 bytes of weights, 10 bytes a token, 100 tokens a slot.
        (FOUR, 5_000, None),
        (FOUR, 4_999, 3),
        (FOUR, 900, 0),
        (state(8, SlotSource.TOLD), 9_000, None),
        (state(8, SlotSource.TOLD), 8_999, 7),
        # As many as will run, where no more are known.
        (state(0, SlotSource.UNKNOWN, at_least=4), 5_000, None),
        (state(0, SlotSource.UNKNOWN, at_least=4), 3_000, 2),
        (FOUR, None, None),
    ],
)
def test_memory_of_a_runner(known: SlotState, limit_bytes: int | None, fit: int | None) -> None:
    """With all its slots it must take no more than a runner may, unless it is there already."""
    asked = group(4)
    model = replace(asked.model, size_bytes=1_000, kv_bytes_per_token=10)
    asked = replace(asked, model=model, context_tokens=100, is_loaded=False)
    bounds = MemoryBounds(limit_bytes=limit_bytes)
    error = lack((asked, known), bounds=bounds)
    assert (error is None) is (fit is None)
    if error is not None:
        assert error.metadata == {"slots": str(fit), "items": "4", "model": "m", "limit": "memory_limit"}
        for part in (f"of {limit_bytes:,} that a runner may take", "UNISONO_MEMORY_LIMIT", "num_ctx"):
            assert part in error.message
    assert lack((replace(asked, is_loaded=True), known), bounds=bounds) is None
    alone = lack((replace(asked, items=asked.items[:1]), known), bounds=MemoryBounds(limit_bytes=1))
    assert alone is not None
    assert alone.message.startswith("1 item must run at one time")
    # Where nobody knows what it takes, nothing speaks against it.
    unknown = replace(asked, model=replace(model, kv_bytes_per_token=None))
    assert lack((unknown, known), bounds=bounds) is None
