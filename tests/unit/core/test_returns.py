"""A prompt's beginning that keeps coming back is worth more slots than one batch would give it."""

from __future__ import annotations

from itertools import count, product

import pytest

from tests.unit.core.processor import BYTES_PER_TOKEN, Processor, family
from unisono.core.capacity import Capacity
from unisono.core.commands import Work
from unisono.core.conductor import Conductor
from unisono.core.returns import MOST_RETURNS, Returns

SLOTS, ITEMS, PREFIX, REST = 8, 16, 620, 20
# As in test_number_of_slots: what an answer's token and a prompt's token cost beside a pass of 20 ms.
PROCESSORS = list(product((0.0005, 0.005, 0.020), (0.0002, 0.001, 0.003)))
tickets = count()


def test_each_return_lets_one_more_be_expected() -> None:
    """The first one not: it may have been the last."""
    returns = Returns()
    expected = []
    for _ in range(4):
        expected.append(returns.expected(7))
        returns.came(7)
    assert expected == [1, 1, 2, 3]
    assert returns.expected(8) == 1
    assert returns.expected(None) == 1


def test_hope_has_a_limit() -> None:
    """However often it came."""
    returns = Returns()
    for _ in range(100):
        returns.came(7)
    assert returns.expected(7) == MOST_RETURNS


def test_what_was_not_seen_for_longest_is_forgotten() -> None:
    """A thousand beginnings are remembered."""
    returns = Returns()
    for digest in (1, 2, 1, 2, *range(3, 1_001), 1, 1_001):
        returns.came(digest)
    assert (returns.expected(1), returns.expected(2)) == (3, 1)


def test_a_prompt_has_returned_as_soon_as_any_beginning_of_it_has() -> None:
    """As far as it was found held."""
    returns = Returns()
    prefix = family(1, 2_000)
    assert not returns.has_returned(prefix)
    assert not returns.has_returned(None)
    returns.came(prefix.digests[0])
    assert returns.has_returned(prefix)


def batches(keys: list[int], token_s: float, prompt_token_s: float, tokens: int) -> list[tuple[float, float]]:
    """Batches of 16 items, each with one prefix; of each its time, and how many prefixes were computed."""
    world = Processor(
        conductor=Conductor(Capacity(configured=SLOTS)),
        slots=SLOTS,
        pass_s=0.020,
        token_s=token_s,
        prompt_token_s=prompt_token_s,
    )
    found = []
    for key in keys:
        began_s, before = world.now, world.prompt_tokens
        size = (PREFIX + REST) * BYTES_PER_TOKEN
        prefix, batch = family(key, PREFIX * BYTES_PER_TOKEN), next(tickets)
        world.add(
            Work(ticket=next(tickets), batch=batch, num_predict=tokens, prefix=prefix, prompt_bytes=size)
            for _ in range(ITEMS)
        )
        _ = world.run()
        found.append((world.now - began_s, (world.prompt_tokens - before - ITEMS * REST) / PREFIX))
    return found


@pytest.mark.parametrize("tokens", [2, 24])
@pytest.mark.parametrize(("token_s", "prompt_token_s"), PROCESSORS)
def test_what_is_spent_on_a_hope_comes_back(
    token_s: float, prompt_token_s: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty batches take less time together than without it, and the second computes nothing that is held."""
    hoping = batches([1] * 20, token_s, prompt_token_s, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(Returns, "expected", lambda _returns, _digest: 1)
        thrifty = batches([1] * 20, token_s, prompt_token_s, tokens)
    assert hoping[1][1] == 0
    assert sum(time_s for time_s, _ in hoping) <= 1.01 * sum(time_s for time_s, _ in thrifty)
    # And then it is paid for.
    assert hoping[-1][0] <= 1.01 * thrifty[-1][0]


def test_in_the_end_all_slots_hold_it() -> None:
    """A pass whose cost is shared: three times faster than the second batch, which used two slots."""
    found = batches([1] * 20, 0.0005, 0.001, 24)
    second_s, last_s = found[1][0], found[-1][0]
    assert last_s < second_s / 2.5
    assert [prefixes for _, prefixes in found[-8:]] == [0] * 8


@pytest.mark.parametrize("prompts", [2, 3, 4])
def test_prompts_that_come_in_turn_do_not_drive_each_other_out(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more prefixes than without the hope, as long as the slots have room for all of them."""
    keys = [number % prompts for number in range(12 * prompts)]
    hoping = batches(keys, 0.0005, 0.001, 24)
    with monkeypatch.context() as patch:
        patch.setattr(Returns, "expected", lambda _returns, _digest: 1)
        thrifty = batches(keys, 0.0005, 0.001, 24)
    assert sum(time_s for time_s, _ in hoping) <= sum(time_s for time_s, _ in thrifty)
