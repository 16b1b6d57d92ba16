"""The workloads of the bench over the stand-in, by what it counts itself: prompt tokens, loads, lost items."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.ollama.answers import tokenize
from tests.integration.service import House, Seen, house, user
from unisono._generated.unisono.v1 import item_pb2
from unisono.bench.workloads import Ask, Shape, find

SLOTS = 8
# A small model on a small GPU, twice as fast.
COSTS: dict[str, Any] = {"pass_s": 0.002, "member_s": 0.0001, "prefill_token_s": 0.00005}
# The same, slower: where slots are left over, what passes cost decides, and a busy machine adds milliseconds to them.
SLOW: dict[str, Any] = {"pass_s": 0.008, "member_s": 0.0004, "prefill_token_s": 0.0004}
# What a template writes around a message, in tokens.
AROUND = 5


def asks_of(name: str) -> tuple[Ask, ...]:
    """What a workload of one phase asks."""
    (workload,) = find((name,))
    (phase,) = workload.phases(Shape(slots=SLOTS))
    return phase.asks


def item_of(ask: Ask) -> item_pb2.Item:
    """It as an item."""
    request = item_pb2.ChatRequest(messages=[user(ask.user)])
    if ask.system:
        request.messages.insert(0, item_pb2.Message(role=item_pb2.ROLE_SYSTEM, content=ask.system))
    options = item_pb2.Options(num_predict=ask.num_predict)
    if ask.num_ctx is not None:
        options.runner.num_ctx = ask.num_ctx
    return item_pb2.Item(item_id=ask.name, chat=request, options=options)


async def run(h: House, asks: tuple[Ask, ...]) -> Seen:
    """Runs them as one batch; none may be lost."""
    seen = await h.run([item_of(ask) for ask in asks])
    assert len(seen.results) == len(asks)
    assert set(seen.states().values()) == {"COMPLETED"}
    return seen


def least_prompt_tokens(h: House, asks: tuple[Ask, ...]) -> int:
    """Each prefix once, and all the rests."""
    prefixes = {ask.system: AROUND + len(tokenize(ask.system)) for ask in asks}
    rests: int = sum(work.prompt_tokens for work in h.work) - sum(prefixes[ask.system] for ask in asks)
    return sum(prefixes.values()) + rests


@pytest.mark.parametrize("slots", [pytest.param(SLOTS, id="known"), pytest.param(None, id="unknown")])
@pytest.mark.parametrize("name", ["W3-4", "W3-16", "W3-64"])
async def test_prefixes_are_computed_about_once(name: str, slots: int | None) -> None:
    """Items of several long prefixes, in any order: a tenth more than the least is computed, or a little above."""
    settings: dict[str, Any] = {"slots": slots} if slots is not None else {}
    async with house(num_parallel=SLOTS, settings=settings, **(SLOW if name == "W3-4" else COSTS)) as h:
        asks = asks_of(name)
        _ = await run(h, asks)
        assert h.fake.prompt_tokens_computed <= 1.15 * least_prompt_tokens(h, asks)


async def test_two_contexts_are_one_load() -> None:
    """Sixteen items, of which every other one asks for twice the context."""
    async with house(num_parallel=SLOTS, load_s=0.05, **COSTS) as h:
        _ = await run(h, asks_of("W5"))
        assert h.fake.loads == 1


async def test_a_burst_on_a_cold_model_loses_nothing() -> None:
    """Seven hundred items, and a backend that refuses more than 512 while it loads."""
    async with house(num_parallel=SLOTS, load_s=0.2, max_queue=512) as h:
        seen = await run(h, asks_of("W6"))
        assert len(seen.results) == 700
        assert h.fake.loads == 1
        assert {result.attempts for result in seen.results.values()} == {1}
