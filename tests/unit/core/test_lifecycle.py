"""The table of an item's phases."""

from __future__ import annotations

from itertools import product

import pytest

from unisono.core.lifecycle import IN_FLIGHT, Phase, Step, after


def allowed() -> dict[tuple[Phase, Step], Phase]:
    """Every step that the table has."""
    table = {}
    for phase, step in product(Phase, Step):
        try:
            table[phase, step] = after(phase, step)
        except ValueError:
            continue
    return table


def test_the_usual_way() -> None:
    """An item that nothing happens to is staged, released, speaks and ends."""
    phase = Phase.QUEUED
    for step in (Step.STAGE, Step.STAGED, Step.RELEASE, Step.SPEAK, Step.END):
        phase = after(phase, step)
    assert phase is Phase.ENDED


def test_every_phase_but_the_last_can_end() -> None:
    """An item can be ended wherever it is, and nothing leads away from the end."""
    table = allowed()
    assert {phase for phase, step in table if step is Step.END} == set(Phase) - {Phase.ENDED}
    assert not any(phase is Phase.ENDED for phase, _ in table)
    assert all(to is Phase.ENDED for (_, step), to in table.items() if step is Step.END)


def test_every_phase_can_be_reached() -> None:
    """No phase is there for nothing."""
    reached = {Phase.QUEUED}
    table = allowed()
    while new := {to for (phase, _), to in table.items() if phase in reached} - reached:
        reached |= new
    assert reached == set(Phase)


@pytest.mark.parametrize(
    ("phase", "step"),
    [
        (Phase.QUEUED, Step.RELEASE),
        (Phase.STAGING, Step.RELEASE),
        (Phase.STAGED, Step.SPEAK),
        (Phase.SPEAKING, Step.SPEAK),
        (Phase.WAITING, Step.STAGE),
        (Phase.ENDED, Step.END),
    ],
)
def test_impossible_steps_raise(phase: Phase, step: Step) -> None:
    """A step that the table does not have raises, and says which."""
    with pytest.raises(ValueError, match=f"an item that is {phase.value} cannot {step.value}"):
        after(phase, step)


def test_only_released_items_are_in_flight() -> None:
    """What counts against a runner's limit has been released, and has not come back."""
    assert {Phase.RELEASED, Phase.SPEAKING} == IN_FLIGHT
