"""A quick part of `make faults`: a death at each failpoint, one after failed writes, and one at a random instant."""

from __future__ import annotations

import random

import pytest

from tests.faults import kills
from tests.faults.kills import PLACES, Kill
from tests.faults.validators import BrokenPromiseError
from unisono.adapters.journal import failpoints


def test_the_places_are_those_of_the_journal() -> None:
    """A failpoint that is added is one to die at."""
    assert tuple(PLACES) == failpoints.PLACES


@pytest.mark.slow
async def test_nothing_is_lost_changed_or_seen_twice() -> None:
    """Wherever the service dies, of what was submitted, streamed and uploaded.

    The seed is another one each time, and the plan is printed where it fails.
    """
    seed = random.randrange(10**6)
    planned = kills.plan(random_kills=1, each=1, errors=1, seed=seed)
    said: list[str] = [f"seed {seed}", *map(str, planned)]
    try:
        found = await kills.run(planned, items=60, limit_s=30.0, tell=said.append)
    except BrokenPromiseError as error:
        error.add_note("\n".join(said))
        raise
    assert sum(found.kills.values()) == len(planned) == 6
    assert min(found.batches.values()) >= 1
    assert found.results >= 60 + 20 + 20


def test_a_plan_is_told_by_its_seed() -> None:
    """So that what was found can be found again."""
    one, same, other = (kills.plan(random_kills=5, each=2, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 5 + 2 * len(PLACES)
    assert {kill.place for kill in kills.plan(random_kills=0, each=3, seed=1, only=["call.after_commit"])} == {
        "call.after_commit"
    }
    assert str(Kill("call.after_commit", 3)) == "call.after_commit=kill@3"
