"""Whether all items of a batch can run at one time."""

from __future__ import annotations

import pytest

from unisono.core.errors import NotEnoughSlotsError
from unisono.core.model import GenerateRequest, Item, ModelInfo, RunnerSpec, Slots, SlotSource, SlotState
from unisono.core.plan import Group
from unisono.core.required import lacks_slots


def group(items: int, model: str = "m") -> Group:
    """So many items on one runner."""
    return Group(
        runner=RunnerSpec(backend="b", model=model, digest=model),
        model=ModelInfo(backend="b", name=model, digest=model),
        items=tuple(Item(item_id=f"{i}", index=i, request=GenerateRequest(prompt="p")) for i in range(items)),
        is_loaded=True,
        reason="it is there",
    )


def state(count: int, source: SlotSource, at_least: int = 0) -> SlotState:
    """Slots of which that is known."""
    return SlotState(slots=Slots(count=count, source=source), at_least=at_least)


@pytest.mark.parametrize(
    ("items", "known"),
    [
        (4, state(4, SlotSource.CONFIGURED)),
        (4, state(8, SlotSource.TOLD)),
        (4, state(4, SlotSource.LEARNED)),
        # The number is not known, but so many were seen at one time.
        (4, state(0, SlotSource.UNKNOWN, at_least=4)),
        (4, state(2, SlotSource.REMEMBERED, at_least=4)),
    ],
)
def test_enough_slots(items: int, known: SlotState) -> None:
    """Configured, told, learned or seen."""
    assert lacks_slots([(group(items), known)]) is None


def test_nothing_to_run_needs_no_slots() -> None:
    """Items that fail at once need none."""
    assert lacks_slots([]) is None


@pytest.mark.parametrize(
    ("items", "known", "slots", "says"),
    [
        (5, state(4, SlotSource.CONFIGURED), 4, "has 4 slots (configured). Start Ollama with OLLAMA_NUM_PARALLEL=5"),
        (2, state(1, SlotSource.TOLD), 1, "has 1 slot (told)"),
        (5, state(4, SlotSource.LEARNED, at_least=9), 4, "UNISONO_SLOTS=5"),
        (5, state(8, SlotSource.REMEMBERED, at_least=3), 3, "has shown 3 so far"),
        (5, state(0, SlotSource.UNKNOWN), 0, "has shown none yet. If it has as many, say so with UNISONO_SLOTS"),
        (
            16,
            SlotState(
                slots=Slots(count=1, source=SlotSource.LEARNED),
                reason="OLLAMA_NUM_PARALLEL is 1, its default",
                remedy="start Ollama with OLLAMA_NUM_PARALLEL=8",
            ),
            1,
            "because OLLAMA_NUM_PARALLEL is 1, its default: start Ollama with OLLAMA_NUM_PARALLEL=16, or ask for",
        ),
    ],
)
def test_too_few(items: int, known: SlotState, slots: int, says: str) -> None:
    """How many are known, how many are needed, and what to do."""
    error = lacks_slots([(group(items), known)])
    assert isinstance(error, NotEnoughSlotsError)
    assert error.metadata == {"slots": str(slots), "items": str(items), "model": "m"}
    assert says in error.message
    assert "TOGETHER" in error.message


def test_two_runners_never_run_at_one_time() -> None:
    """However many slots each has; and a model without a name can be told of, too."""
    many = state(64, SlotSource.TOLD)
    error = lacks_slots([(group(1), many), (group(2, "n"), many)])
    assert error is not None
    assert error.metadata == {"slots": "0", "items": "3", "groups": "2"}
    nameless = lacks_slots([(group(2, ""), state(1, SlotSource.TOLD))])
    assert nameless is not None
    assert "the model has 1 slot" in nameless.message
