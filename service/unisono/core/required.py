"""Whether all items of a batch can run at one time, for a batch that runs so or not at all.

Four things can keep them apart: the batch's own terms; two runners, which take turns; too few slots that are proven
and can be used; and memory that the settings do not allow.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

from unisono.core.errors import NotEnoughSlotsError, Violation
from unisono.core.limits import text_bytes
from unisono.core.memory import reserved_tokens, tokens_limit
from unisono.core.model import SlotSource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.core.batch import BatchConfig
    from unisono.core.memory import MemoryBounds
    from unisono.core.model import RunnerSpec, SlotState
    from unisono.core.plan import Group

# Sources that vouch for a number; a remembered one, of another run or another load, is to be confirmed first.
_SURE = (SlotSource.CONFIGURED, SlotSource.TOLD, SlotSource.LEARNED)
_IN_WAVES = "ask for TOGETHER, which runs in as many waves as it takes"


def contradictions(config: BatchConfig, item_count: int) -> list[Violation]:
    """What in the batch's own terms keeps so many items from running at one time."""
    most = config.max_concurrency
    if most is None or most >= item_count:
        return []
    what = (
        f"is {most:,}, and {item_count:,} items must run at one time (co_scheduling REQUIRED): raise it, leave it "
        f"out, or {_IN_WAVES}"
    )
    return [Violation(field="config.max_concurrency", description=what)]


def lacks_room(
    groups: Sequence[tuple[Group, SlotState]],
    bounds: MemoryBounds,
    *,
    bytes_per_token: Callable[[RunnerSpec], float],
) -> NotEnoughSlotsError | None:
    """Why these groups cannot go in one wave; None where they can.

    `bytes_per_token`: of a runner's prompts, as the schedule counts them.
    """
    if len(groups) > 1:
        items = sum(len(group.items) for group, _ in groups)
        return NotEnoughSlotsError(
            f"the items need {len(groups)} runners, which take turns, and co_scheduling REQUIRED is for one model "
            f"with one set of runner options. Send a batch for each, or {_IN_WAVES}",
            metadata={"slots": "0", "items": str(items), "groups": str(len(groups))},
        )
    for group, state in groups:
        return (
            _lacks_slots(group, state)
            or _lacks_memory(group, state, bounds.limit_bytes)
            or _lacks_context(group, state, bounds.factor, bytes_per_token(group.runner))
        )
    return None


# -- Slots -----------------------------------------------------------------------------------------------------


def _lacks_slots(group: Group, state: SlotState) -> NotEnoughSlotsError | None:
    """Fewer are proven than there are items, or fewer can be used at this moment."""
    proven, wanted = _proven(state), len(group.items)
    # One item can always run.
    usable = max(1, min(proven, state.limit))
    if wanted <= usable:
        return None
    who = group.runner.model or "the model"
    if wanted <= proven:
        why = (
            f"{who} {_describe(state)}, of which {usable:,} can be used at this moment: others use the backend, it "
            f"came back with fewer, or requests timed out or ran out of memory. To do: {_IN_WAVES}, and finds out "
            "how many can be used"
        )
    else:
        why = f"{who} {_describe(state)}. {_remedy(state, wanted)}"
    return _error(group, usable, f"{_wanted(group)}, and {why}")


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


# -- Memory ----------------------------------------------------------------------------------------------------


def _lacks_memory(group: Group, state: SlotState, limit_bytes: int | None) -> NotEnoughSlotsError | None:
    """It would have to be loaded, and would take more memory than a runner may. Not derivable: no objection."""
    estimated = group.memory_with(max(state.fewest, len(group.items)))
    if limit_bytes is None or group.is_loaded or estimated is None or estimated.total_bytes <= limit_bytes:
        return None
    room = limit_bytes - estimated.weights_bytes
    fits = room * estimated.slots // estimated.kv_cache_bytes if room > 0 else 0
    return _error(
        group,
        fits,
        f"{_wanted(group)}, and with {estimated.slots:,} slot{'' if estimated.slots == 1 else 's'} of "
        f"{estimated.context_tokens:,} tokens {group.runner.model or 'the model'} takes about "
        f"{estimated.total_bytes:,} bytes, of {limit_bytes:,} that a runner may take (UNISONO_MEMORY_LIMIT). "
        "Ask for a smaller options.runner.num_ctx, send fewer items to a backend that has fewer slots, or raise the "
        "setting",
        limit="memory_limit",
    )


def _lacks_context(
    group: Group, state: SlotState, factor: float, bytes_per_token: float
) -> NotEnoughSlotsError | None:
    """Together they would reserve more of the runner's context than may be reserved."""
    count = len(group.items)
    if factor >= 1 or group.runner.is_embedding or count == 1:
        return None
    context = group.context_tokens
    if not context:
        return _error(
            group,
            1,
            f"{_wanted(group)}, may reserve {factor:g} of the context together "
            "(UNISONO_MEMORY_FACTOR), and how much that is nobody knows before the model is loaded. "
            f"Ask for an options.runner.num_ctx, or {_IN_WAVES}",
            limit="memory_factor",
        )
    allowed = tokens_limit(context, state.slots.count or state.limit, factor)
    tokens = sorted(
        (
            reserved_tokens(math.ceil(text_bytes(item) / bytes_per_token), item.options.num_predict, context)
            for item in group.items
        ),
        reverse=True,
    )
    together = list(accumulate(tokens))
    if together[-1] <= allowed:
        return None
    return _error(
        group,
        # One by itself always may.
        max(1, bisect_right(together, allowed)),
        f"{_wanted(group)}, and may need {together[-1]:,} tokens of context together, prompts "
        f"and answers, of which {allowed:,} may be reserved (UNISONO_MEMORY_FACTOR is {factor:g}). Set a smaller "
        f"options.num_predict, send fewer items, raise the setting, or {_IN_WAVES}",
        limit="memory_factor",
    )


def _wanted(group: Group) -> str:
    items = len(group.items)
    return f"{items:,} item{'' if items == 1 else 's'} must run at one time"


def _error(group: Group, slots: int, message: str, **more: str) -> NotEnoughSlotsError:
    facts = {"slots": str(slots), "items": str(len(group.items)), "model": group.runner.model}
    return NotEnoughSlotsError(message, metadata={**facts, **more})
