"""Models that make room for each other, and models that are in memory side by side."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.fakes.ollama import FakeModel
from tests.integration.service import House, Seen, chat, chats, house
from unisono.app import resolve

MODELS = [FakeModel(name=name) for name in ("ash", "birch", "cedar")]
NAMES = [model.name for model in MODELS]


def spans(h: House) -> dict[str, tuple[int, int]]:
    """When the first request of each model got a slot, and when its last one ended."""
    found: dict[str, tuple[int, int]] = {}
    for one in h.work:
        assert one.model is not None
        assert one.slot_ns is not None
        assert one.end_ns is not None
        name = one.model.removesuffix(":latest")
        begun, ended = found.get(name, (one.slot_ns, one.end_ns))
        found[name] = min(begun, one.slot_ns), max(ended, one.end_ns)
    return found


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether there was a moment that is in both."""
    return one[0] < other[1] and other[0] < one[1]


async def mixed(h: House, names: list[str], count: int) -> Seen:
    """Items of several models, in random order."""
    items = [chat(f"i{n}", model=names[n % len(names)], num_predict=10) for n in range(count)]
    random.Random(7).shuffle(items)
    return await h.run(items)


async def test_each_model_is_loaded_once_where_one_fits() -> None:
    """Whatever the order of the items: all of a model, then the next. The one in memory goes first."""
    async with house(models=MODELS, max_loaded_models=1, load_s=0.02, pass_s=0.001) as h:
        seen = await mixed(h, NAMES, 30)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert h.fake.loads == 3
        in_turn = sorted(spans(h).values())
        assert not any(overlap(one, other) for one, other in pairwise(in_turn))
        last = seen.of("loading")[-1].group
        (resident,) = [one.model for one in seen.of("group_planned") if one.group == last]
        seen = await mixed(h, NAMES, 30)
        assert seen.of("group_planned")[0].model == resident
        assert h.fake.loads == 5


async def test_two_batches_do_not_make_each_other_s_models_go() -> None:
    """Items of two callers for the same three models share their loads."""
    async with house(models=MODELS, max_loaded_models=1, load_s=0.02, pass_s=0.001) as h:
        items = [chat(f"i{n}", model=NAMES[n % 3], num_predict=10) for n in range(15)]
        first, second = h.run_batch(items), h.run_batch(list(reversed(items)))
        for call in (first, second):
            assert set((await call.to_end()).states().values()) == {"COMPLETED"}
        assert h.fake.loads == 3


async def test_two_models_in_memory_run_at_one_time() -> None:
    """Side by side they use what each alone would leave idle."""
    async with house(models=MODELS, max_loaded_models=2, pass_s=0.002) as h:
        for name in NAMES[:2]:
            _ = await h.run([chat("warm", model=name, num_predict=1)])
        h.fake.pass_log.clear()
        before = len(h.work)
        seen = await mixed(h, NAMES[:2], 12)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert h.fake.loads == 2
        mine = [one for one in h.work[before:] if one.slot_ns is not None and one.end_ns is not None]
        by_model = [[one for one in mine if one.model == f"{name}:latest"] for name in NAMES[:2]]
        firsts = [min(one.slot_ns or 0 for one in theirs) for theirs in by_model]
        lasts = [max(one.end_ns or 0 for one in theirs) for theirs in by_model]
        assert max(firsts) < min(lasts)


async def test_a_model_that_must_be_loaded_waits_for_those_that_run() -> None:
    """Though two fit: nobody knows beforehand, and a load could take a model away from its items."""
    async with house(models=MODELS, max_loaded_models=2, load_s=0.02, pass_s=0.002) as h:
        _ = await h.run([chat("warm", model="ash", num_predict=1)])
        before = len(h.work)
        _ = await mixed(h, NAMES[:2], 12)
        ash, birch = ([one for one in h.work[before:] if one.model == f"{name}:latest"] for name in NAMES[:2])
        assert max(one.end_ns or 0 for one in ash) <= min(one.slot_ns or 0 for one in birch)
        assert h.fake.loads == 2


async def test_names_of_one_file_share_a_runner_across_batches() -> None:
    """What one batch calls by its first name, and another by a copy's, fills the same slots, and is loaded once."""
    models = [FakeModel(name="base", digest="ab" * 32), FakeModel(name="copy", digest="ab" * 32)]
    async with house(models=models, num_parallel=4, pass_s=0.002, settings={"slots": 4}) as h:
        _ = await h.run([chat("warm", model="copy", num_predict=1)])
        before = len(h.work)
        calls = [h.run_batch(chats(4, num_predict=40), model=name) for name in ("base", "copy")]
        seen = [await call.to_end() for call in calls]
        assert {state for one in seen for state in one.states().values()} == {"COMPLETED"}
        assert {planned.model for one in seen for planned in one.of("group_planned")} == {"copy:latest"}
        assert h.fake.loads == 1
        # Each batch has its share of the four slots from the first wave on; nobody waits for another's turn.
        begun = sorted(one.slot_ns or 0 for one in h.work[before:])
        first_end = min(one.end_ns or 0 for one in h.work[before:])
        assert begun[3] < first_end
        assert len({one.model for one in h.work[before:]}) == 1


@pytest.mark.parametrize("is_pulled_anew", [False, True], ids=["removed", "other files"])
async def test_a_first_name_that_is_gone_is_not_used(
    monkeypatch: pytest.MonkeyPatch, *, is_pulled_anew: bool
) -> None:
    """A copy goes on under its own name."""
    monkeypatch.setattr(resolve, "MODEL_TTL_S", 0.0)
    models = [FakeModel(name="base", digest="ab" * 32), FakeModel(name="copy", digest="ab" * 32)]
    async with house(models=models) as h:
        _ = await h.run([chat("a", model="base")])
        known = h.fake._models
        del known["base:latest"]
        if is_pulled_anew:
            known["base:latest"] = FakeModel(name="base", digest="cd" * 32)
        for _ in range(2):
            seen = await h.run([chat("b", model="copy")])
            assert seen.states() == {"b": "COMPLETED"}
            assert [planned.model for planned in seen.of("group_planned")] == ["copy:latest"]
