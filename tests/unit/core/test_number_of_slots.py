"""One prefix and many items: the schedule finds the best number of slots by itself.

Sixteen items with 620 tokens in common on eight slots, on processors of every kind. Nobody tells the conductor what
passes and prompts cost there. It has seen one batch; the next one, with another prefix, is held against every fixed
number of slots, from one to eight.
"""

from __future__ import annotations

from itertools import count, product
from typing import TypeVar

import pytest

from tests.unit.core.processor import BYTES_PER_TOKEN, Processor, Semaphore, family
from unisono.core.capacity import Capacity
from unisono.core.commands import Work
from unisono.core.conductor import Conductor

SLOTS, ITEMS, PREFIX, REST = 8, 16, 620, 20
PASS_S = 0.020
# What an answer's token and a prompt's token cost beside a pass of 20 ms: from a GPU, where nearly all of a pass is
# shared, to two cores, where hardly anything is.
PROCESSORS = list(product((0.0005, 0.002, 0.010, 0.020, 0.060), (0.0002, 0.0005, 0.001, 0.003)))
tickets = count()
_Filler = TypeVar("_Filler", Conductor, Semaphore)


def processor(filler: _Filler, token_s: float, prompt_token_s: float) -> Processor[_Filler]:
    """A processor of eight slots."""
    return Processor(conductor=filler, slots=SLOTS, pass_s=PASS_S, token_s=token_s, prompt_token_s=prompt_token_s)


def run(world: Processor[_Filler], key: int, tokens: int) -> tuple[float, float]:
    """One batch; answers with its time, and how many prefixes were computed."""
    began_s, before = world.now, world.prompt_tokens
    size = (PREFIX + REST) * BYTES_PER_TOKEN
    prefix = family(key, PREFIX * BYTES_PER_TOKEN)
    world.add(
        Work(ticket=next(tickets), batch=next(tickets), num_predict=tokens, prefix=prefix, prompt_bytes=size)
        for _ in range(ITEMS)
    )
    _ = world.run()
    return world.now - began_s, (world.prompt_tokens - before - ITEMS * REST) / PREFIX


@pytest.mark.parametrize("tokens", [24, 100])
@pytest.mark.parametrize(("token_s", "prompt_token_s"), PROCESSORS)
def test_no_fixed_number_is_much_faster(token_s: float, prompt_token_s: float, tokens: int) -> None:
    """Not one of them by more than 5 %, once the schedule has seen a batch."""
    world = processor(Conductor(Capacity()), token_s, prompt_token_s)
    _ = run(world, 1, tokens)
    took_s, _ = run(world, 2, tokens)
    fixed = [run(processor(Semaphore(lanes), token_s, prompt_token_s), 1, tokens)[0] for lanes in range(1, SLOTS + 1)]
    assert took_s <= 1.05 * min(fixed)


@pytest.mark.parametrize(("token_s", "prompt_token_s"), PROCESSORS)
def test_a_short_answer_is_no_reason_to_compute_a_prefix(token_s: float, prompt_token_s: float) -> None:
    """Of 2 tokens: not 10 % slower than the best fixed number, and up to 4.6 times faster than all eight slots."""
    world = processor(Conductor(Capacity()), token_s, prompt_token_s)
    _ = run(world, 1, 2)
    took_s, computed = run(world, 2, 2)
    fixed = [run(processor(Semaphore(lanes), token_s, prompt_token_s), 1, 2)[0] for lanes in range(1, SLOTS + 1)]
    assert took_s <= 1.10 * min(fixed)
    assert computed <= 2


@pytest.mark.parametrize(("token_s", "prompt_token_s"), PROCESSORS)
def test_a_warm_prefix_is_not_computed_again(token_s: float, prompt_token_s: float) -> None:
    """The lanes that hold it are as many as are worth having, and the second batch stays in them."""
    world = processor(Conductor(Capacity()), token_s, prompt_token_s)
    for key in (1, 2):
        _, cold = run(world, key, 24)
        _, warm = run(world, key, 24)
        assert cold >= 1
        assert warm == 0
