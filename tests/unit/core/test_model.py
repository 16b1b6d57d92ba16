"""The values: options laid over each other, what a model can do, where time went."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from unisono.core.model import Durations, ModelInfo, Options, RunnerOptions


def test_runner_options_are_laid_over_field_by_field() -> None:
    """What is set wins, also where it is 0 or False; what is not is taken from beneath."""
    base = RunnerOptions(num_ctx=4096, num_gpu=99, use_mmap=True)
    over = RunnerOptions(num_gpu=0, use_mmap=False, num_thread=4)
    assert over.over(base) == RunnerOptions(num_ctx=4096, num_gpu=0, use_mmap=False, num_thread=4)


def test_options_are_laid_over_field_by_field() -> None:
    """An item's temperature 0 is a choice; its empty stop texts are none."""
    base = Options(temperature=0.8, seed=1, stop=("\n",), extra_json='{"a": 1}', runner=RunnerOptions(num_ctx=512))
    over = Options(temperature=0.0, seed=0, num_predict=5, runner=RunnerOptions(num_batch=64))
    assert over.over(base) == Options(
        temperature=0.0,
        seed=0,
        num_predict=5,
        stop=("\n",),
        extra_json='{"a": 1}',
        runner=RunnerOptions(num_ctx=512, num_batch=64),
    )
    assert base.over(Options()) == base
    assert Options().over(base) == base


@pytest.mark.parametrize(
    ("capabilities", "is_embedding"),
    [
        (None, False),
        (frozenset[str](), False),
        (frozenset({"completion"}), False),
        (frozenset({"embedding"}), True),
        (frozenset({"embedding", "completion"}), False),
    ],
)
def test_embedding_model_can_do_nothing_else(capabilities: frozenset[str] | None, *, is_embedding: bool) -> None:
    """A model is an embedding model if it embeds and does not complete; one of which nothing is known is not."""
    model = ModelInfo(backend="b", name="m", digest="d", capabilities=capabilities)
    assert model.is_embedding is is_embedding


@pytest.mark.parametrize(
    ("asked", "own", "drafted"),
    [(None, 0, 0), (None, 4, 4), (0, 4, 0), (2, 0, 2)],
)
def test_a_model_drafts_as_it_is_asked_or_by_itself(asked: int | None, own: int, drafted: int) -> None:
    """What a request says goes before what the model does where nothing is said."""
    model = ModelInfo(backend="b", name="m", digest="d", draft_num_predict=own)
    assert model.drafted_with(RunnerOptions(draft_num_predict=asked)) == drafted


@pytest.mark.parametrize(
    ("durations", "slot_wait_s"),
    [
        (Durations(total_s=10.0, load_s=1.0, prompt_eval_s=2.0, eval_s=3.0), 4.0),
        (Durations(total_s=10.0, prompt_eval_s=2.0, eval_s=3.0), 5.0),
        (Durations(total_s=1.0, prompt_eval_s=2.0, eval_s=3.0), 0.0),
        (Durations(prompt_eval_s=2.0, eval_s=3.0), None),
        (Durations(total_s=1.0, eval_s=3.0), None),
        (Durations(total_s=1.0, prompt_eval_s=3.0), None),
    ],
)
def test_slot_wait_is_what_is_left(durations: Durations, slot_wait_s: float | None) -> None:
    """The time without a slot is the total less load, prompt and answer; never negative, None where not known."""
    assert durations.slot_wait_s == slot_wait_s


def test_values_are_frozen() -> None:
    """Nobody changes a value that another holds."""
    with pytest.raises(FrozenInstanceError):
        Options().seed = 1  # type: ignore[misc]
