"""How many tokens items in flight may reserve: what the schedule of a runner is told."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.service import chat, chats, house
from unisono._generated.unisono.v1 import item_pb2
from unisono.core.arbiter import Arbiter
from unisono.core.model import RunnerSpec


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Each limit that a runner's schedule was told, in their order."""
    told: list[float | None] = []
    real = Arbiter.limit_tokens

    def limit_tokens(self: Arbiter, runner: RunnerSpec, tokens: float | None) -> None:
        told.append(tokens)
        real(self, runner, tokens)

    monkeypatch.setattr(Arbiter, "limit_tokens", limit_tokens)
    return told


def with_slots(slots: int | None, factor: float) -> dict[str, Any]:
    """Settings of the service."""
    return {"slots": slots, "memory_factor": factor}


def asking(num_ctx: int) -> item_pb2.RunnerOptions:
    """Options that ask for a context."""
    return item_pb2.RunnerOptions(num_ctx=num_ctx)


async def test_nothing_is_limited_without_a_factor(limits: list[float | None]) -> None:
    """All of the context may be used, by whatever fits into the slots."""
    async with house(num_parallel=4, settings=with_slots(4, 1.0)) as h:
        _ = await h.run(chats(4, num_predict=2))
    assert limits == []


async def test_a_share_of_the_context_of_all_slots(limits: list[float | None]) -> None:
    """Known from the plan where the context is asked for."""
    async with house(num_parallel=4, settings=with_slots(4, 0.5)) as h:
        _ = await h.run([chat(f"i{n}", num_predict=2, runner=asking(1024)) for n in range(4)])
    assert set(limits) == {2048}


async def test_one_slot_s_context_at_least(limits: list[float | None]) -> None:
    """Or nothing could run."""
    async with house(num_parallel=4, settings=with_slots(4, 0.01)) as h:
        seen = await h.run([chat(f"i{n}", num_predict=2, runner=asking(1024)) for n in range(4)])
        assert set(seen.states().values()) == {"COMPLETED"}
    assert set(limits) == {1024}


async def test_a_default_context_is_known_once_it_is_loaded(limits: list[float | None]) -> None:
    """Before, there is no limit; nothing runs then."""
    async with house(num_parallel=4, default_num_ctx=2048, settings=with_slots(4, 0.5)) as h:
        _ = await h.run(chats(4, num_predict=2))
        assert limits[0] is None
        assert set(limits[1:]) == {4096}
        limits.clear()
        _ = await h.run(chats(4, num_predict=2))
        assert set(limits) == {4096}


async def test_the_limit_follows_the_slots_that_are_learned(limits: list[float | None]) -> None:
    """As many as are tried, until their number is known."""
    async with house(num_parallel=4, pass_s=0.002, settings=with_slots(None, 0.5)) as h:
        _ = await h.run([chat(f"i{n}", num_predict=20, runner=asking(1024)) for n in range(24)])
    assert limits[0] == 8 * 1024 * 0.5
    assert limits[-1] == 4 * 1024 * 0.5
