"""What checks is checked: a validator takes a history that is well, and names the promise that a spoilt one broke."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults import validators
from tests.faults.history import Asked, Bounds, Connection, End, History, Sample, calls_told, tokens_of
from tests.faults.validators import BrokenPromiseError
from unisono._generated.unisono.v1 import event_pb2, item_pb2

ITEMS = ("i0", "i1", "i2")


def event(sequence: int, **more: object) -> event_pb2.BatchEvent:
    """A lasting event."""
    return event_pb2.BatchEvent(sequence=sequence, **more)  # type: ignore[arg-type]


def result(item_id: str, **more: object) -> event_pb2.Result:
    """An answer, in one attempt."""
    usage = item_pb2.Usage(completion_tokens=tokens_of(item_id))
    return event_pb2.Result(
        item_id=item_id,
        state=event_pb2.ITEM_STATE_COMPLETED,
        attempts=1,
        usage=usage,
        **more,  # type: ignore[arg-type]
    )


def told() -> History:
    """What a caller hears of a batch of three items, in two connections."""
    history = History("g0", set(ITEMS), ids=["b", "b"])
    _ = history.connect()
    history.add(event(1, result=result("i0")))
    history.add(event_pb2.BatchEvent(heartbeat=event_pb2.Heartbeat()))
    history.add(event(2, progress=event_pb2.Progress(completed=1)))
    _ = history.connect()
    history.add(event(3, result=result("i1")))
    history.add(event(4, result=result("i2", disturbed=1)))
    history.add(event(5, progress=event_pb2.Progress(completed=3)))
    history.add(event(6, summary=event_pb2.Summary(state=event_pb2.BATCH_STATE_COMPLETED)))
    history.again = [*history.events]
    history.pages = [*history.results.items()]
    history.counters = Counter(accepted=3, completed=3, last_sequence=6)
    return history


def test_a_history_that_is_well() -> None:
    """Passing events are none of it."""
    history = told()
    validators.well(history)
    assert (history.last, history.is_over, len(history.events)) == (6, True, 6)
    assert calls_told([history]) == 4


SPOILT: dict[str, tuple[Callable[[History], object], Callable[[History], object], str]] = {
    "an item never ended": (validators.complete, lambda h: h.ends.pop(), "complete"),
    "one ended that was never accepted": (validators.complete, lambda h: h.wanted.discard("i1"), "complete"),
    "no end": (validators.complete, lambda h: h.over_at.clear(), "complete"),
    "two ends": (validators.complete, lambda h: h.over_at.append(6), "complete"),
    "something after the end": (validators.complete, lambda h: h.events.append(b"x"), "complete"),
    "a failure": (validators.answered, lambda h: spoil(h, 1, state="FAILED", reason="ODD"), "answered"),
    "half an answer": (validators.whole, lambda h: spoil(h, 1, tokens=1), "whole"),
    "an item that ended twice": (validators.unique, lambda h: h.ends.append(h.ends[0]), "unique"),
    "two batches": (validators.unique, lambda h: h.ids.append("c"), "unique"),
    "an event that changed": (validators.stable, lambda h: h.again.__setitem__(0, b"x"), "stable"),
    "an event that is gone": (validators.stable, lambda h: h.again.pop(), "stable"),
    "a result on two pages": (validators.stable, lambda h: h.pages.append(h.pages[0]), "stable"),
    "a result that changed": (validators.stable, lambda h: h.pages.__setitem__(0, ("i0", b"x")), "stable"),
    "a gap": (validators.resumable, lambda h: h.connections[1].numbers.pop(0), "resumable"),
    "an event twice": (validators.resumable, lambda h: h.connections[1].numbers.insert(0, 2), "resumable"),
    "a wrong place": (validators.resumable, lambda h: h.connections.append(Connection(4)), "resumable"),
    "less had ended": (validators.monotone, lambda h: h.progress.append(2), "monotone"),
    "more had ended than there are": (validators.monotone, lambda h: h.progress.append(4), "monotone"),
    "a counter": (validators.counted, lambda h: h.counters.update(failed=1), "accounted"),
    "a counter of events": (validators.counted, lambda h: h.counters.update(last_sequence=1), "accounted"),
}


def spoil(history: History, place: int, **changes: object) -> None:
    """Another end of an item."""
    history.ends[place] = replace(history.ends[place], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_promise_is_noticed(how: str) -> None:
    """Each kind of it, by its name: by its own validator, and by all of them together."""
    validator, spoils, name = SPOILT[how]
    history = told()
    validator(history)
    _ = spoils(history)
    with pytest.raises(BrokenPromiseError, match=f"^{name}: "):
        validator(history)
    with pytest.raises(BrokenPromiseError):
        validators.well(history)


def test_a_failure_that_is_allowed() -> None:
    """By its reason, and by no other."""
    history = told()
    spoil(history, 1, state="FAILED", reason="BACKEND_UNAVAILABLE")
    validators.answered(history, unless=["BACKEND_UNAVAILABLE"])
    with pytest.raises(BrokenPromiseError, match=r"^answered: "):
        validators.answered(history, unless=["CONNECTION_LOST"])


def test_batches_that_are_listed() -> None:
    """All of them, once, and no other."""
    one, other = told(), replace(told(), name="g1", ids=["c"])
    validators.listed([one, other], ["c", "b"])
    for ids, name in (["b"], "complete"), (["b", "c", "d"], "unique"), (["b", "c", "c"], "unique"):
        with pytest.raises(BrokenPromiseError, match=f"^{name}: "):
            validators.listed([one, other], ids)
    with pytest.raises(BrokenPromiseError, match=r"^unique: "):
        validators.listed([one, told()], ["b", "b"])


def asked(**changes: int) -> Asked:
    """What the backend was asked for the three items: one of them twice."""
    calls = Counter({"g0 i0": 1, "g0 i1": 1, "g0 i2": 2})
    return Asked(calls=calls, **changes)


def test_calls_are_accounted_for() -> None:
    """Calls of the backend are attempts of results, and what was lost in a death, within its bound."""
    assert validators.accounted([told()], asked()) == 0
    more, fewer, odd, none = (copy.deepcopy(asked(a_kill=2)) for _ in range(4))
    more.calls["g0 i0"] += 2
    fewer.calls["g0 i2"] -= 1
    odd.calls["g0 i3"] += 1
    none.calls.pop("g0 i0")
    for one in (more, fewer, odd, none):
        with pytest.raises(BrokenPromiseError, match=r"^accounted: "):
            _ = validators.accounted([told()], one)
    assert validators.accounted([told()], replace(more, service_kills=1)) == 2
    assert validators.accounted([told()], replace(fewer, backend_kills=1)) == -1
    with pytest.raises(BrokenPromiseError, match=r"^accounted: 2 calls .* at most 1"):
        _ = validators.accounted([told()], replace(more, service_kills=1, a_kill=1))


@pytest.mark.parametrize("name", ["memory_bytes", "folder_bytes", "running", "in_flight", "queued"])
def test_a_figure_above_its_bound(name: str) -> None:
    """Each of them, at any moment."""
    bounds = Bounds(memory_bytes=9, folder_bytes=9, running=9, in_flight=9, queued=9)
    small = Sample(memory_bytes=1, folder_bytes=2, running=3, in_flight=4, queued=9)
    assert validators.bounded([Sample(), small, Sample(memory_bytes=5)], bounds) == replace(small, memory_bytes=5)
    with pytest.raises(BrokenPromiseError, match=f"^bounded: {name}"):
        _ = validators.bounded([small, replace(small, **{name: 10}), small], bounds)


def test_nothing_measured_is_nothing_shown() -> None:
    """A run without a sample says nothing of its bounds."""
    with pytest.raises(BrokenPromiseError, match=r"^bounded: nothing"):
        _ = validators.bounded([], Bounds(memory_bytes=9, folder_bytes=9, running=9, in_flight=9, queued=9))


def test_an_end_tells_its_reason() -> None:
    """That of its status, where it has one."""
    history = told()
    failed = event_pb2.Result(item_id="i0", state=event_pb2.ITEM_STATE_FAILED)
    failed.error.code = 14
    history.add(event(7, result=failed))
    assert history.ends[-1] == End(item_id="i0", state="FAILED", reason="", calls=0)
