"""A quick part of `make faults`: a death at each failpoint, one after failed writes, and one at a random instant."""

from __future__ import annotations

import random

import pytest

from tests.faults import kills
from tests.faults.kills import PLACES, Kill
from tests.faults.rig import BrokenPromiseError, History
from unisono._generated.unisono.v1 import event_pb2
from unisono.adapters.journal import failpoints


def test_the_places_are_those_of_the_journal() -> None:
    """A failpoint that is added is one to die at."""
    assert tuple(PLACES) == failpoints.PLACES


@pytest.mark.slow
async def test_nothing_is_lost_changed_or_seen_twice() -> None:
    """Wherever the service dies; the seed is another one each time, and the plan is printed where it fails."""
    seed = random.randrange(10**6)
    planned = kills.plan(random_kills=1, each=1, errors=1, seed=seed)
    said: list[str] = [f"seed {seed}", *map(str, planned)]
    try:
        found = await kills.run(planned, items=80, limit_s=30.0, tell=said.append)
    except BrokenPromiseError as error:
        error.add_note("\n".join(said))
        raise
    assert sum(found.kills.values()) == len(planned) == 6
    assert found.results >= 80


def event(sequence: int, **more: object) -> event_pb2.BatchEvent:
    """A lasting event."""
    return event_pb2.BatchEvent(sequence=sequence, **more)  # type: ignore[arg-type]


def result(item_id: str) -> event_pb2.Result:
    """The end of an item."""
    return event_pb2.Result(item_id=item_id, state=event_pb2.ITEM_STATE_COMPLETED)


SUMMARY = event_pb2.Summary(state=event_pb2.BATCH_STATE_COMPLETED)
FIRST = event(1, result=result("i0"))


@pytest.mark.parametrize(
    ("events", "names"),
    [
        ([event(2, result=result("i0"))], "resumable"),
        ([FIRST, FIRST], "resumable"),
        ([FIRST, event(2, result=result("i0"))], "unique"),
        ([FIRST, event(2, summary=SUMMARY), event(3, result=result("i1"))], "complete"),
        ([FIRST, event(2, summary=SUMMARY)], "complete"),
        ([FIRST, event(2, result=result("i2")), event(3, summary=SUMMARY)], "complete"),
        ([FIRST, event(2, result=result("i1"))], "complete"),
        (
            [
                event(1, progress=event_pb2.Progress(completed=2)),
                event(2, progress=event_pb2.Progress(completed=1)),
            ],
            "monotone",
        ),
    ],
)
def test_a_broken_promise_is_noticed(events: list[event_pb2.BatchEvent], names: str) -> None:
    """Each kind of it, by its name: what checks is checked too."""
    with pytest.raises(BrokenPromiseError, match=f"^{names}"):
        told(*events).check_end()


def told(*events: event_pb2.BatchEvent) -> History:
    """The history of a batch of two items."""
    history = History("r", 2)
    for one in events:
        history.add(one)
    return history


def test_a_history_that_is_well() -> None:
    """Passing events are none of it."""
    passing = event_pb2.BatchEvent(heartbeat=event_pb2.Heartbeat())
    history = told(FIRST, passing, event(2, result=result("i1")), event(3, summary=SUMMARY))
    history.check_end()
    history.accepted("b")
    with pytest.raises(BrokenPromiseError, match=r"^unique"):
        history.accepted("c")


def test_a_plan_is_told_by_its_seed() -> None:
    """So that what was found can be found again."""
    one, same, other = (kills.plan(random_kills=5, each=2, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 5 + 2 * len(PLACES)
    assert {kill.place for kill in kills.plan(random_kills=0, each=3, seed=1, only=["call.after_commit"])} == {
        "call.after_commit"
    }
    assert str(Kill("call.after_commit", 3)) == "call.after_commit=kill@3"
