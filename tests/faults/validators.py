"""What must be so, as functions of a recorded history: each raises BrokenPromiseError, with the promise's name.

Nothing here calls anything or waits for anything; `test_validators.py` shows for each that it can fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import fields

from tests.faults.history import COMPLETED, Asked, Bounds, History, Sample, calls_told, tokens_of

# The counter of each state that an item ends in.
_COUNTERS = {COMPLETED: "completed", "FAILED": "failed", "CANCELLED": "cancelled", "EXPIRED": "expired"}


class BrokenPromiseError(AssertionError):
    """The service did not do what it promises; the message names the promise."""


def promise(name: str, is_kept: object, what: object = "") -> None:
    """Raises BrokenPromiseError unless it is kept."""
    if not is_kept:
        raise BrokenPromiseError(f"{name}: {what}")


# -- One batch -------------------------------------------------------------------------------------------------


def complete(history: History) -> None:
    """Each item that was accepted ended, no other did, and the batch's end came once, as the last event."""
    ended = {end.item_id for end in history.ends}
    missing, foreign = sorted(history.wanted - ended), sorted(ended - history.wanted)
    promise("complete", not missing, f"{history.name}: {len(missing)} never ended: {missing[:5]}")
    promise("complete", not foreign, f"{history.name}: ended, and were never accepted: {foreign[:5]}")
    promise("complete", len(history.over_at) == 1, f"{history.name}: its end was told {len(history.over_at)} times")
    after = len(history.events) - history.over_at[0]
    promise("complete", after == 0, f"{history.name}: {after} events follow the summary")


def answered(history: History, *, unless: Collection[str] = ()) -> None:
    """Each item has its answer, or ended with one of these reasons."""
    wrong = [end for end in history.ends if end.state != COMPLETED and end.reason not in unless]
    promise("answered", not wrong, f"{history.name}: {len(wrong)}, such as {wrong[:1]}")


def whole(history: History) -> None:
    """No answer is a part of one: each has all the tokens that were asked for."""
    cut = [end for end in history.ends if end.state == COMPLETED and end.tokens != tokens_of(end.item_id)]
    promise("whole", not cut, f"{history.name}: {len(cut)}, such as {cut[:1]}")


def unique(history: History) -> None:
    """No item ended twice, and the batch has one id, however often it was asked for."""
    twice = [item for item, count in Counter(end.item_id for end in history.ends).items() if count > 1]
    promise("unique", not twice, f"{history.name}: ended twice: {twice[:5]}")
    promise("unique", len(set(history.ids)) == 1, f"{history.name} is {sorted(set(history.ids))}")


def stable(history: History) -> None:
    """What was told once is the same for ever: the events, and the results on their pages."""
    promise("stable", history.again == history.events, f"{history.name}: the events are others")
    twice = len(history.pages) - len(dict(history.pages))
    promise("stable", twice == 0, f"{history.name}: {twice} results are on two pages")
    promise("stable", dict(history.pages) == history.results, f"{history.name}: the results on the pages are others")


def resumable(history: History) -> None:
    """Each connection goes on with the event after the last one that was seen, and has no gap."""
    last = 0
    for connection in history.connections:
        promise("resumable", connection.after == last, f"{history.name}: asked for {connection.after}, had {last}")
        for number in connection.numbers:
            promise("resumable", number == last + 1, f"{history.name}: event {number} after {last}")
            last = number


def monotone(history: History) -> None:
    """What has ended never becomes less, nor more than there is."""
    least = 0
    for ended in history.progress:
        promise("monotone", ended >= least, f"{history.name}: {ended} ended after {least}")
        least = ended
    promise("monotone", least <= len(history.wanted), f"{history.name}: {least} ended of {len(history.wanted)}")


def counted(history: History) -> None:
    """The batch's counters are those of its results."""
    told = Counter(_COUNTERS[end.state] for end in history.ends)
    told["accepted"] = len(history.wanted)
    if "last_sequence" in history.counters:
        told["last_sequence"] = len(history.events)
    # Counters that are 0 are equal to those that are not there.
    promise("accounted", history.counters == told, f"{history.name}: {history.counters}, results say {told}")


def well(history: History, *, unless: Collection[str] = ()) -> None:
    """All of these."""
    complete(history)
    answered(history, unless=unless)
    whole(history)
    unique(history)
    resumable(history)
    monotone(history)
    stable(history)
    counted(history)


# -- All of them -----------------------------------------------------------------------------------------------


def listed(histories: Sequence[History], ids: Sequence[str]) -> None:
    """The batches that there are were all asked for, each by one caller."""
    known = Counter(one.batch_id for one in histories)
    found = Counter(ids)
    promise("unique", all(count == 1 for count in known.values()), f"batches of two callers: {known.most_common(3)}")
    promise("unique", found <= known, f"nobody asked for {sorted(found - known)[:5]}, or they are there twice")
    promise("complete", known <= found, f"are gone: {sorted(known - found)[:5]}")


def accounted(histories: Sequence[History], asked: Asked) -> int:
    """Calls of the backend are those of the results, and what was lost in a death; answers with how many that is.

    Of a death of the service, what was at the backend is asked for again; of one of the backend, what was on its way
    never arrived.
    """
    names = {f"{one.name} {item}" for one in histories for item in one.wanted}
    foreign = sorted(set(asked.calls) - names)
    promise("accounted", not foreign, f"the backend was asked for something else: {foreign[:3]}")
    done = {f"{one.name} {end.item_id}" for one in histories for end in one.ends if end.state == COMPLETED}
    never = sorted(done - set(asked.calls))
    promise("accounted", not never, f"answered, and the backend was never asked: {never[:3]}")
    beyond = asked.calls.total() - calls_told(histories)
    most, least = asked.service_kills * asked.a_kill, -asked.backend_kills * asked.a_kill
    promise("accounted", beyond <= most, f"{beyond} calls are no attempt of a result; at most {most} may be lost")
    promise("accounted", beyond >= least, f"{-beyond} attempts never arrived; at most {-least} may be on their way")
    return beyond


def bounded(samples: Sequence[Sample], bounds: Bounds) -> Sample:
    """No figure was ever above its bound; answers with the largest of each."""
    largest = Sample(
        **{each.name: max((getattr(one, each.name) for one in samples), default=0) for each in fields(Sample)}
    )
    for each in fields(Sample):
        most, limit = getattr(largest, each.name), getattr(bounds, each.name)
        promise("bounded", most <= limit, f"{each.name} was {most:,}, and may be {limit:,}")
    promise("bounded", samples, "nothing was measured")
    return largest
