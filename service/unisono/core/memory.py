"""What a runner takes in memory: its weights, and the keys and values of all the tokens that its slots can hold.

Theory of operation. Attention keeps for each token, in each layer, a key and a value for each of the layer's
key-value heads; two bytes a number, by default. A runner reserves that for every token of context of every slot when
it is loaded, whether it is used or not. On Ollama 0.32.15 with SmolLM2-135M and 8 slots, the process grew by 283.1 MB
and 377.6 MB where the context grew from 512 over 2,048 to 4,096 tokens; these figures say 283.1 MB and 377.5 MB.
Working buffers come on top: 58 MB there. What /api/ps calls a model's size held its weights alone on a machine
without GPU.

Where a backend cannot tell what these figures need, there is no estimate: None, and never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.core.model import ModelInfo, RunnerSpec

# A number of the cache: 16 bits, unless OLLAMA_KV_CACHE_TYPE says otherwise.
_BYTES_PER_NUMBER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBounds:
    """How much memory may be used, by the settings."""

    # The share of a runner's context that items in flight may reserve.
    factor: float = 1.0
    # What a runner may take; None: not known.
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a runner takes, in bytes, without its working buffers."""

    weights_bytes: int
    kv_cache_bytes: int
    # Tokens of context of each slot.
    context_tokens: int
    slots: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes


def estimate(model: ModelInfo, runner: RunnerSpec, slots: int, default_context: int) -> MemoryEstimate | None:
    """What a runner takes with so many slots; None where that cannot be derived.

    `default_context`: the tokens of context where the runner's options name none; 0: not known.
    """
    context = runner.options.num_ctx or default_context
    if model.context_length:
        context = min(context, model.context_length)
    if model.kv_bytes_per_token is None or not model.size_bytes or not context:
        return None
    slots = max(1, slots)
    return MemoryEstimate(
        weights_bytes=model.size_bytes,
        kv_cache_bytes=model.kv_bytes_per_token * context * slots,
        context_tokens=context,
        slots=slots,
    )


def fits_context(model: ModelInfo, slots: int, limit_bytes: int) -> int | None:
    """The largest num_ctx within a limit; 0: not even the weights fit; None: not known, or there is no largest."""
    if model.kv_bytes_per_token is None or not model.size_bytes:
        return None
    room = limit_bytes - model.size_bytes
    if room < 0:
        return 0
    if model.kv_bytes_per_token == 0:
        return model.context_length or None
    fits = room // (model.kv_bytes_per_token * max(1, slots))
    return min(fits, model.context_length) if model.context_length else fits


def check(estimated: MemoryEstimate, measured_bytes: int) -> float | None:
    """How many times the estimate was measured; None where nothing was."""
    return measured_bytes / estimated.total_bytes if measured_bytes > 0 else None


def tokens_limit(context_tokens: int, slots: int, factor: float) -> int:
    """The most tokens, of prompts and answers, that items in flight may reserve together.

    `context_tokens`: of each slot. The factor is above 0 and at most 1. One slot's context is always allowed, or
    nothing could run at all.
    """
    return max(context_tokens, int(factor * max(1, slots) * context_tokens))


def reserved_tokens(prompt_tokens: int, num_predict: int | None, context_tokens: int) -> int:
    """The most that one item may reserve of that, as the schedule counts: its prompt and the longest answer, though a
    slot may have fewer; a whole slot where the answer has no bound.
    """
    if num_predict is None or num_predict < 0:
        return context_tokens
    return prompt_tokens + num_predict


def kv_bytes_per_token(facts: Mapping[str, object]) -> int | None:
    """What a token of context takes, from the metadata of a model's file (GGUF); None where they do not tell.

    1. Models whose attention looks both ways answer without a cache.
    2. Models with a state of their own (Mamba and its like), and those that compress keys and values together
       (DeepSeek's), keep something else than keys and values: not known.
    3. Otherwise the sum over the layers of their heads, times the length of a key and a value. Layers that look back
       only so far (a sliding window) are counted as if they kept everything: the most it can be.
    """
    arch = facts.get("general.architecture")

    def fact(name: str) -> object:
        return facts.get(f"{arch}.{name}")

    if fact("attention.causal") is False:
        return 0
    if any(fact(name) is not None for name in ("ssm.state_size", "wkv.head_size", "attention.kv_lora_rank")):
        return None
    heads = _number(fact("attention.head_count"))
    width = _number(fact("embedding_length")) // heads if heads else 0
    # A list has a number for each layer, 0 for those without attention. Ollama leaves long lists out: null.
    kv_heads = facts.get(f"{arch}.attention.head_count_kv", heads)
    if isinstance(kv_heads, list):
        all_heads = sum(map(_number, kv_heads))
    else:
        all_heads = _number(kv_heads) * _number(fact("block_count"))
    lengths = _number(fact("attention.key_length"), width), _number(fact("attention.value_length"), width)
    return (_BYTES_PER_NUMBER * all_heads * sum(lengths) or None) if all(lengths) else None


def _number(value: object, default: int = 0) -> int:
    """A whole number above 0, or what stands for none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
