"""What a runner takes in memory."""

from __future__ import annotations

from typing import Any

import pytest

from unisono.core.memory import (
    MemoryEstimate,
    check,
    estimate,
    fits_context,
    kv_bytes_per_token,
    reserved_tokens,
    tokens_limit,
)
from unisono.core.model import ModelInfo, RunnerOptions, RunnerSpec

# SmolLM2-135M, as /api/show has it.
SMOL: dict[str, object] = {
    "general.architecture": "llama",
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
}
MIB = 1024 * 1024


def model(**more: Any) -> ModelInfo:
    """A model of 100 bytes that needs 10 a token, unless said otherwise."""
    known = {"backend": "b", "name": "m", "digest": "m", "size_bytes": 100, "kv_bytes_per_token": 10}
    return ModelInfo(**{**known, **more})


def runner(num_ctx: int | None = None) -> RunnerSpec:
    """The model with a context."""
    return RunnerSpec(backend="b", model="m", digest="m", options=RunnerOptions(num_ctx=num_ctx))


# -- Bytes a token -----------------------------------------------------------------------------------------------


def test_bytes_a_token_of_a_real_model() -> None:
    """30 layers × 3 heads × (64 + 64) numbers × 2 bytes; a real runner grew by just that (see the module)."""
    assert kv_bytes_per_token(SMOL) == 23_040
    assert 23_040 * (2048 - 512) * 8 == 283_115_520


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Lengths of their own go before what follows from the width.
        ({"llama.attention.key_length": 128, "llama.attention.value_length": 64}, 2 * 3 * 30 * 192),
        ({"llama.attention.key_length": 128}, 2 * 3 * 30 * 192),
        # A number for each layer, some without attention; and the list that Ollama leaves out.
        ({"llama.attention.head_count_kv": [3, 0, 1]}, 2 * 4 * 128),
        ({"llama.attention.head_count_kv": None}, None),
        ({"llama.attention.head_count_kv": []}, None),
        ({"llama.attention.head_count_kv": "3"}, None),
        ({"llama.attention.head_count_kv": True}, None),
        ({"llama.block_count": -1}, None),
        # What is not known.
        ({"llama.attention.head_count": None}, None),
        ({"llama.embedding_length": None}, None),
        ({"general.architecture": None}, None),
        # Other memories than keys and values; and none at all.
        ({"llama.ssm.state_size": 16}, None),
        ({"llama.wkv.head_size": 64}, None),
        ({"llama.attention.kv_lora_rank": 512}, None),
        ({"llama.attention.causal": False}, 0),
        ({"llama.attention.causal": True}, 23_040),
    ],
)
def test_bytes_a_token(change: dict[str, object], expected: int | None) -> None:
    """What the metadata of a model's file says; None where that is not enough."""
    assert kv_bytes_per_token(SMOL | change) == expected


def test_without_grouped_heads_each_head_has_its_own() -> None:
    """A model that does not name key-value heads has as many as heads."""
    facts = {name: value for name, value in SMOL.items() if not name.endswith("_kv")}
    assert kv_bytes_per_token(facts) == 2 * 9 * 128 * 30
    assert kv_bytes_per_token({}) is None


# -- A runner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ctx", "default", "slots", "trained", "expected"),
    [
        (50, 0, 2, 0, (1000, 50, 2)),
        (50, 20, 2, 0, (1000, 50, 2)),
        (None, 20, 2, 0, (400, 20, 2)),
        (None, 20, 0, 0, (200, 20, 1)),
        (50, 0, 2, 40, (800, 40, 2)),
        (30, 0, 2, 40, (600, 30, 2)),
        (None, 0, 2, 40, None),
    ],
)
def test_what_a_runner_takes(
    num_ctx: int | None, default: int, slots: int, trained: int, expected: tuple[int, int, int] | None
) -> None:
    """Weights, and the cache of all tokens of all slots; unknown slots are one."""
    found = estimate(model(context_length=trained), runner(num_ctx), slots, default)
    if expected is None:
        assert found is None
        return
    cache, tokens, counted = expected
    assert found == MemoryEstimate(weights_bytes=100, kv_cache_bytes=cache, context_tokens=tokens, slots=counted)
    assert found.total_bytes == 100 + cache


def test_no_guess() -> None:
    """Without what a token takes, or the size of the weights, nothing is said."""
    assert estimate(model(kv_bytes_per_token=None), runner(50), 1, 0) is None
    assert estimate(model(size_bytes=0), runner(50), 1, 0) is None
    assert fits_context(model(kv_bytes_per_token=None), 1, 1000) is None
    assert fits_context(model(size_bytes=0), 1, 1000) is None


@pytest.mark.parametrize(
    ("limit", "slots", "trained", "fits"),
    [(600, 1, 0, 50), (609, 2, 0, 25), (600, 0, 0, 50), (600, 1, 40, 40), (100, 1, 0, 0), (99, 1, 40, 0)],
)
def test_the_largest_context_that_fits(limit: int, slots: int, trained: int, fits: int) -> None:
    """What it takes is within the limit, and one token more would not be."""
    known = model(context_length=trained)
    assert fits_context(known, slots, limit) == fits
    if 0 < fits < trained or (fits and not trained):
        within, beyond = (estimate(known, runner(fits + more), slots, 0) for more in (0, 1))
        assert within is not None
        assert beyond is not None
        assert within.total_bytes <= limit < beyond.total_bytes


def test_without_a_cache_everything_fits() -> None:
    """A model that keeps nothing has no largest context but its own."""
    assert fits_context(model(kv_bytes_per_token=0, context_length=512), 4, 1000) == 512
    assert fits_context(model(kv_bytes_per_token=0), 4, 1000) is None
    assert fits_context(model(kv_bytes_per_token=0), 4, 99) == 0


def test_measured_beside_estimated() -> None:
    """With 8 slots of 2,048 tokens: the process as it grew, and what /api/ps says where there is no GPU."""
    smol = model(size_bytes=98_362_432, kv_bytes_per_token=23_040)
    found = estimate(smol, runner(2048), 8, 0)
    assert found is not None
    assert check(found, 521_456 * 1024) == pytest.approx(1.122, abs=0.001)
    assert check(found, 98_362_432) == pytest.approx(0.207, abs=0.001)
    assert check(found, 0) is None


# -- Tokens in flight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "limit"), [(1.0, 800), (0.5, 400), (0.25, 200), (0.01, 100)])
def test_tokens_that_may_be_in_flight(factor: float, limit: int) -> None:
    """A share of all slots' context; one item can always run."""
    assert tokens_limit(100, 8, factor) == limit
    assert tokens_limit(100, 0, factor) == 100


@pytest.mark.parametrize(
    ("prompt", "num_predict", "tokens"), [(10, 20, 30), (10, 0, 10), (90, 20, 110), (10, None, 100), (10, -1, 100)]
)
def test_tokens_that_an_item_reserves(prompt: int, num_predict: int | None, tokens: int) -> None:
    """As the schedule counts, though its slot may have fewer; all of a slot where the answer has no end."""
    assert reserved_tokens(prompt, num_predict, 100) == tokens
