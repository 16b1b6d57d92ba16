"""Whether all items of a batch can run at one time, for a batch that runs so or not at all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from unisono.core.errors import NotEnoughSlotsError
from unisono.core.model import SlotSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.model import SlotState
    from unisono.core.plan import Group

# Sources that vouch for a number; one from before the service was started is to be confirmed first.
_SURE = (SlotSource.CONFIGURED, SlotSource.TOLD, SlotSource.LEARNED)
_IN_WAVES = "ask for TOGETHER, which runs in as many waves as it takes"


def lacks_slots(groups: Sequence[tuple[Group, SlotState]]) -> NotEnoughSlotsError | None:
    """Why these groups cannot go in one wave; None where they can.

    Two runners take turns, so there may be one group; and it needs as many slots as items.
    """
    if len(groups) > 1:
        items = sum(len(group.items) for group, _ in groups)
        return NotEnoughSlotsError(
            f"the items need {len(groups)} runners, which take turns, and co_scheduling REQUIRED is for one model "
            f"with one set of runner options. Send a batch for each, or {_IN_WAVES}",
            metadata={"slots": "0", "items": str(items), "groups": str(len(groups))},
        )
    for group, state in groups:
        proven, wanted = _proven(state), len(group.items)
        if wanted > proven:
            return NotEnoughSlotsError(
                f"{wanted:,} items must run at one time, and {group.runner.model or 'the model'} "
                f"{_describe(state)}. {_remedy(state, wanted)}",
                metadata={"slots": str(proven), "items": str(wanted), "model": group.runner.model},
            )
    return None


def _is_sure(state: SlotState) -> bool:
    return state.slots.count > 0 and state.slots.source in _SURE


def _proven(state: SlotState) -> int:
    """Slots that are certainly there."""
    return state.slots.count if _is_sure(state) else state.at_least


def _describe(state: SlotState) -> str:
    proven = _proven(state)
    if _is_sure(state):
        return f"has {proven:,} slot{'' if proven == 1 else 's'} ({state.slots.source.value})"
    return f"has shown {proven:,} so far" if proven else "has shown none yet"


def _remedy(state: SlotState, wanted: int) -> str:
    """What makes it possible."""
    if state.reason:
        # The remedy speaks of eight slots, as many as are tried first.
        remedy = re.sub(r"\b8\b", str(wanted), state.remedy)
        return f"That is because {state.reason}: {remedy}, or {_IN_WAVES}"
    if _is_sure(state):
        return (
            f"Start Ollama with OLLAMA_NUM_PARALLEL={wanted} and say so with UNISONO_SLOTS={wanted}, "
            f"send fewer items, or {_IN_WAVES}"
        )
    return (
        f"If it has as many, say so with UNISONO_SLOTS, or run a larger batch first, from which they are learned; "
        f"else start Ollama with OLLAMA_NUM_PARALLEL={wanted}, or {_IN_WAVES}"
    )
