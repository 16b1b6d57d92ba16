"""Why there is one slot only, and what to do."""

from __future__ import annotations

import pytest

from unisono.core.advice import forced_one_slot, why_one_slot
from unisono.core.model import ModelInfo, RunnerSpec, Slots, SlotSource

RUNNER = RunnerSpec(backend="b", model="m", digest="d")
ONE = Slots(count=1, source=SlotSource.LEARNED)


def model(family: str = "llama", *capabilities: str) -> ModelInfo:
    """A model of a family."""
    return ModelInfo(
        backend="b", name="m", digest="d", family=family, capabilities=frozenset(capabilities or ("completion",))
    )


@pytest.mark.parametrize("count", [0, 2, 8])
def test_nothing_is_said_of_more_or_of_what_nobody_knows(count: int) -> None:
    """Only one slot has a reason."""
    assert why_one_slot(RUNNER, model(), Slots(count=count, source=SlotSource.LEARNED)) is None


def test_default_is_one() -> None:
    """Ollama's own default, and how to change it."""
    one = why_one_slot(RUNNER, model(), ONE)
    assert one is not None
    assert one.reason == "OLLAMA_NUM_PARALLEL is 1, its default"
    assert "OLLAMA_NUM_PARALLEL=8" in one.remedy


@pytest.mark.parametrize(
    "family",
    [
        *("mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe"),
        *("nemotron_h", "nemotron_h_moe", "nemotron_h_omni"),
    ],
)
def test_some_families_are_forced_to_one(family: str) -> None:
    """And their variants; the setting does not help."""
    one = why_one_slot(RUNNER, model(family), ONE)
    assert one is not None
    assert family in one.reason
    assert one.remedy == "use a model of another family, or several backends"
    assert why_one_slot(RUNNER, model(family), ONE, kind="llama-server") != one


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "nemotron", "gemma3", ""])
def test_other_families_are_not(family: str) -> None:
    """Names that are only similar."""
    assert forced_one_slot("ollama", family, is_embedding=False) is None


@pytest.mark.parametrize(
    ("runner", "info"),
    [
        (RunnerSpec(backend="b", model="m", digest="d", is_embedding=True), model()),
        (RUNNER, model("bert", "embedding")),
    ],
)
def test_embeddings_have_one_slot(runner: RunnerSpec, info: ModelInfo) -> None:
    """By the model, or by what is asked of it."""
    one = why_one_slot(runner, info, ONE)
    assert one is not None
    assert "embedding models" in one.reason
    assert "`input`" in one.remedy


def test_configuration_may_be_the_reason() -> None:
    """Then the backend is not to blame."""
    one = why_one_slot(RUNNER, model("mllama"), Slots(count=1, source=SlotSource.CONFIGURED))
    assert one is not None
    assert "UNISONO_SLOTS" in one.reason
    assert one.remedy.endswith("OLLAMA_NUM_PARALLEL")
    other = why_one_slot(RUNNER, model(), Slots(count=1, source=SlotSource.CONFIGURED), kind="llama-server")
    assert other is not None
    assert "OLLAMA" not in other.remedy


@pytest.mark.parametrize(
    ("kind", "remedy"), [("llama-server", "--parallel 8"), ("embedded", "8 slots"), ("other", "more slots")]
)
def test_other_backends_have_their_own_remedy(kind: str, remedy: str) -> None:
    """What is said of Ollama is not said of them."""
    one = why_one_slot(RUNNER, model("mllama", "embedding"), Slots(count=1, source=SlotSource.TOLD), kind=kind)
    assert one is not None
    assert remedy in one.remedy
    assert "OLLAMA" not in one.reason
