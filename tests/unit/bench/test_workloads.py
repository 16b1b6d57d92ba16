"""The workloads: the same for all sides, and of nobody's cache."""

from __future__ import annotations

import random
from statistics import median

import pytest

from unisono.bench.sides import cut
from unisono.bench.workloads import CALLERS, WORKLOADS, Ask, Shape, Workload, find, heavy_tail


def asks_of(workload: Workload, **shape: int | bool) -> list[Ask]:
    """All requests of a workload on eight slots."""
    made = Shape(slots=8, is_quick=True)
    for name, value in shape.items():
        object.__setattr__(made, name, value)
    return [one for phase in workload.phases(made) for one in phase.asks]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each.name)
def test_sides_have_equal_work_and_prompts_of_their_own(workload: Workload) -> None:
    """The same lengths, families, contexts and models in the same order, and no prompt begins as another side's."""
    ours, theirs = asks_of(workload, side=0), asks_of(workload, side=1)
    shape = [(len(one.system), len(one.user), one.num_predict, one.family, one.num_ctx, one.model) for one in ours]
    assert shape == [
        (len(one.system), len(one.user), one.num_predict, one.family, one.num_ctx, one.model) for one in theirs
    ]
    starts = {(one.system or one.user)[:16] for one in ours}
    assert not starts & {(one.system or one.user)[:16] for one in theirs}
    assert len({one.name for one in ours}) == len(ours)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each.name)
def test_a_seed_gives_the_same_work(workload: Workload) -> None:
    """Of one run and side; another run has other prompts."""
    assert asks_of(workload) == asks_of(workload)
    assert {one.user + one.system for one in asks_of(workload)}.isdisjoint(
        one.user + one.system for one in asks_of(workload, run=1)
    )


def test_sizes() -> None:
    """What the workloads are said to be."""
    full = {each.name: each.phases(Shape(slots=8)) for each in WORKLOADS}
    counts = {name: [len(phase.asks) for phase in phases] for name, phases in full.items()}
    assert counts == {
        "W1": [8],
        "W2": [64],
        "W3-4": [40],
        "W3-16": [64],
        "W3-64": [128],
        "W4-2": [16, 16],
        "W4-24": [16, 16],
        "W5": [16],
        "W6": [700],
        "W7": [24],
        "W8": [CALLERS * 4],
        "W9": [20_000],
    }
    w6 = next(each for each in WORKLOADS if each.name == "W6")
    assert len(w6.phases(Shape(slots=8, is_full=True))[0].asks) == 5_000
    (w3,) = full["W3-16"]
    assert {len(one.system.split()) for one in w3.asks} == {452}
    assert len({one.system for one in w3.asks}) == 16
    cold, warm = full["W4-24"]
    assert {one.system for one in cold.asks} == {one.system for one in warm.asks}
    assert not {one.user for one in cold.asks} & {one.user for one in warm.asks}
    assert {one.num_ctx for one in full["W5"][0].asks} == {2048, 4096}
    assert {one.model for one in full["W7"][0].asks} == {0, 1, 2}


def test_a_heavy_tail() -> None:
    """Most answers are short, a few thirty times as long."""
    rng = random.Random(1)
    lengths = [heavy_tail(rng) for _ in range(2_000)]
    assert (min(lengths), max(lengths)) == (6, 200)
    assert median(lengths) < 16
    assert sum(length == 200 for length in lengths) > 20


def test_workloads_are_found_by_name() -> None:
    """Also several that share one, in any case; an unknown name is told, with all there are."""
    assert [each.name for each in find(("w3", "W1"))] == ["W1", "W3-4", "W3-16", "W3-64"]
    with pytest.raises(ValueError, match=r"no workload W10; there are W1, W2"):
        find(("W10", "W1"))


def test_callers_share_the_work() -> None:
    """Parts of nearly equal length, in order, none left out."""
    parts = cut(range(10), 4)
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    assert [one for part in parts for one in part] == list(range(10))
