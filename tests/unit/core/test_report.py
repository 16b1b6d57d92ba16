"""The figures of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.model import PassMethod, RunnerSpec
from unisono.core.passes import PassCount
from unisono.core.report import GroupPlanned, GroupReport, fewest_passes


@pytest.mark.parametrize(
    ("tokens", "slots", "fewest"),
    [
        ([], 4, 0),
        ([80] * 16, 8, 160),
        ([80] * 16, 0, None),
        ([80] * 16, -1, None),
        ([200, 6], 4, 200),
        ([5, 5, 1], 2, 6),
    ],
)
def test_fewest_passes(tokens: list[int], slots: int, fewest: int | None) -> None:
    """The longest answer, or all tokens ÷ slots rounded up, whichever is more; None while the slots are not known."""
    assert fewest_passes(tokens, slots) == fewest


@given(tokens=st.lists(st.integers(0, 500), min_size=1, max_size=30), slots=st.integers(1, 9))
def test_longest_first_comes_close_to_the_fewest(tokens: list[int], slots: int) -> None:
    """The bound is one that can nearly be met, and never undercut: longest first needs less than twice as many."""
    ends = [0] * slots
    for length in sorted(tokens, reverse=True):
        ends[ends.index(min(ends))] += length
    fewest = fewest_passes(tokens, slots)
    assert fewest is not None
    assert fewest <= max(ends) <= 2 * fewest


@pytest.mark.parametrize(
    ("passes", "participations", "shared"),
    [(161, 1280, pytest.approx(7.95, abs=0.01)), (196, 206, pytest.approx(1.05, abs=0.01)), (0, 0, None)],
    ids=["shared", "nearly alone, of which 10 tokens are an answer", "no pass"],
)
def test_items_per_pass(passes: int, participations: int, shared: float | None) -> None:
    """Participations ÷ passes, whoever was answered; None where there was no pass."""
    found = replace(group(passes=passes, tokens=10), participations=participations)
    assert found.items_per_pass == shared


@pytest.mark.parametrize(
    ("alone_s", "gain"), [(21.0, 3.0), (None, None), (0.0, None)], ids=["known", "not known", "nothing"]
)
def test_gain(alone_s: float | None, gain: float | None) -> None:
    """One at a time ÷ what it took; None where there is nothing to compare with."""
    assert replace(group(passes=161, tokens=1280), one_at_a_time_s=alone_s).gain == gain


def group(*, passes: int, tokens: int) -> GroupReport:
    """The report of a group that took seven seconds."""
    return GroupReport(
        group=GroupPlanned(
            group=0, runner=RunnerSpec(backend="b", model="m", digest="d"), item_count=16, is_loaded=True
        ),
        passes=PassCount(count=passes, method=PassMethod.CREATED_AT, imputed_share=0, confidence=1),
        fewest_passes=160,
        waves=1,
        first_wave=None,
        loads=0,
        load_s=0.0,
        duration_s=7.0,
        prompt_tokens=100,
        completion_tokens=tokens,
    )
