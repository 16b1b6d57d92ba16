"""Why a runner has one slot only, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.model import SlotSource

if TYPE_CHECKING:
    from unisono.core.model import ModelInfo, RunnerSpec, Slots

# Families for which Ollama forces one slot; variants carry the name in front ("qwen3vlmoe").
# Source: Ollama 0.32, server/sched.go.
SINGLE_SLOT_FAMILIES = ("mllama", "qwen3vl", "qwen35", "qwen3next", "lfm2", "nemotron_h")

# How each kind of backend is given more slots.
MORE_SLOTS = {
    "ollama": (
        "start Ollama with OLLAMA_NUM_PARALLEL=8 in its environment (each slot needs memory for its own context)"
    ),
    "llama-server": "start llama-server with --parallel 8 (the context given by -c is divided among the slots)",
    "embedded": "configure the embedded engine with 8 slots",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneSlot:
    """Clauses without a capital letter or a full stop: they are put into sentences."""

    reason: str
    remedy: str


def why_one_slot(runner: RunnerSpec, model: ModelInfo, slots: Slots, *, kind: str = "ollama") -> OneSlot | None:
    """The reason and the remedy where a runner has one slot; None where it has more, or nobody knows.

    `kind`: of its backend. The configuration comes first: it hides what the backend has.
    """
    if slots.count != 1:
        return None
    if slots.source is SlotSource.CONFIGURED:
        number = "OLLAMA_NUM_PARALLEL" if kind == "ollama" else "the backend's number of slots"
        return OneSlot(reason="UNISONO_SLOTS is 1", remedy=f"unset UNISONO_SLOTS, or set it to {number}")
    is_embedding = runner.is_embedding or model.is_embedding
    return forced_one_slot(kind, model.family, is_embedding=is_embedding) or OneSlot(
        reason="OLLAMA_NUM_PARALLEL is 1, its default" if kind == "ollama" else "it was started with one",
        remedy=MORE_SLOTS.get(kind, "give it more slots"),
    )


def forced_one_slot(kind: str, family: str, *, is_embedding: bool) -> OneSlot | None:
    """The same for a model that gets one slot from its backend whatever is asked for; None for any other."""
    if kind != "ollama":
        return None
    if is_embedding:
        return OneSlot(
            reason="Ollama gives embedding models one slot, whatever OLLAMA_NUM_PARALLEL says",
            remedy="put many texts into one item's `input`: they are computed together",
        )
    if family.startswith(SINGLE_SLOT_FAMILIES):
        return OneSlot(
            reason=f"Ollama runs the family {family} one request at a time, whatever OLLAMA_NUM_PARALLEL says",
            remedy="use a model of another family, or several backends",
        )
    return None
