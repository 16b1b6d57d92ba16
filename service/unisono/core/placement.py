"""Which backend answers the items of a model that several have.

Theory of operation. Backends of different machines compute side by side, so a batch of several models is spread over
them. But all items of one model, in one decision, go to one backend: they share passes only there. A backend is
*ready* where the model's files (their digest) are loaded, or at work: elsewhere a load costs seconds. So it has an
advantage, of as many items as fill its slots and wait for them once. In this order:

1. Where the fewest items wait or are in flight, beyond that advantage.
2. Where it is ready.
3. Where the fewest items wait or are in flight at all, those of this decision counted as well.
4. The first in the configuration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unisono.core.model import ModelInfo

# A ready backend may have so many times its slots of items, before one that would have to load the model is better:
# those that hold a slot, and one for each that waits.
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendState:
    """What a backend is doing at this moment."""

    # Items that wait for it, or are there.
    busy: int = 0
    # Digests of the models that are in its memory, or have items on it, and how many items of each it takes at once.
    ready: Mapping[str, int] = field(default_factory=dict)


def place(
    candidates: Mapping[str, Sequence[ModelInfo]], counts: Mapping[str, int], states: Mapping[str, BackendState]
) -> dict[str, ModelInfo]:
    """For each name one of its candidates, which stand in the order of the configuration.

    `counts`: how many items ask for a name. `states` has every backend of a candidate.
    """
    busy = Counter({backend: state.busy for backend, state in states.items()})
    placed: set[tuple[str, str]] = set()
    chosen: dict[str, ModelInfo] = {}

    def rank(model: ModelInfo) -> tuple[bool, int, bool, int]:
        # Two names can be one model: whoever comes second goes where the first went.
        is_placed = (model.backend, model.digest) in placed
        slots = states[model.backend].ready.get(model.digest)
        items = busy[model.backend]
        return not is_placed, max(0, items - _ROUNDS * (slots or 0)), slots is None, items

    # Whoever has no choice goes first, so that the others can make room for it.
    for name in sorted(candidates, key=lambda name: len(candidates[name]) > 1):
        model = chosen[name] = min(candidates[name], key=rank)
        placed.add((model.backend, model.digest))
        busy[model.backend] += counts.get(name, 1)
    return chosen
