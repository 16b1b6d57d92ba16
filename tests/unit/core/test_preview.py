"""The order of a plan, played through: the longest first, families on their slots, each with its reason."""

from __future__ import annotations

from dataclasses import replace

from unisono.core.commands import ReleaseReason
from unisono.core.model import GenerateRequest, Item, ModelInfo, Options, RunnerSpec
from unisono.core.plan import Group
from unisono.core.prefixes import families
from unisono.core.preview import MOST_PLAYED, order_of

RUNNER = RunnerSpec(backend="ollama", model="m", digest="d")
MODEL = ModelInfo(backend="ollama", name="m", digest="d")


def group(*items: tuple[str, int]) -> Group:
    """A group of prompts with their num_predict."""
    made = tuple(
        Item(item_id=str(n), index=n, request=GenerateRequest(prompt=text), options=Options(num_predict=length))
        for n, (text, length) in enumerate(items)
    )
    return Group(
        runner=RUNNER, model=MODEL, items=made, prefixes=tuple(families(made)), is_loaded=True, reason="it is alone"
    )


def test_without_families_the_longest_goes_first() -> None:
    """And at one length, whoever was given first."""
    order = order_of(group(("a", 10), ("b", 50), ("c", 10), ("d", 90)), lanes=2)
    assert [place for place, _ in order] == [3, 1, 0, 2]
    assert {reason for _, reason in order} <= {ReleaseReason.LONGEST, ReleaseReason.TAIL}


def test_families_stay_on_their_slots() -> None:
    """Each of two families begins on a slot of its own, and its others follow there."""
    one, other = "x" * 1_024, "y" * 1_024
    order = order_of(group(*[((one, other)[n % 2] + str(n), 20) for n in range(8)]), lanes=2)
    assert sorted(place for place, _ in order) == list(range(8))
    assert [reason for _, reason in order] == [ReleaseReason.NEW_FAMILY] * 2 + [ReleaseReason.PREFIX_HELD] * 6


def test_waves_go_together() -> None:
    """With TOGETHER, every item is one of a wave."""
    order = order_of(group(*[(str(n), 10) for n in range(5)]), lanes=2, is_together=True)
    assert [place for place, _ in order] == [0, 1, 2, 3, 4]
    assert {reason for _, reason in order} == {ReleaseReason.TOGETHER}


def test_a_very_large_group_is_played_through_in_part() -> None:
    """What lies behind follows in the order given; nobody is left out. Unknown slots count as one lane at least."""
    large = group(*[("p", 5)] * (MOST_PLAYED + 3))
    order = order_of(replace(large, prefixes=()), lanes=0)
    assert [place for place, _ in order] == list(range(MOST_PLAYED + 3))
