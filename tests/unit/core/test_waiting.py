"""What waits: which batches may go, and who is first of them."""

from __future__ import annotations

import random

import pytest

from tests.unit.core.processor import family
from unisono.core.commands import Priority, Terms
from unisono.core.idle import IdleReason
from unisono.core.waiting import ALONE, MOST_COMPARED, Batch, Waiting, WaitingRoom

A, B = family(1, 2_000), family(2, 2_000)


def room_of(*lengths: float, batch: int = 0, terms: Terms | None = None) -> tuple[WaitingRoom, list[Waiting]]:
    """A room in which a batch's items wait, that share nothing."""
    room = WaitingRoom()
    return room, put(room, *lengths, batch=batch, terms=terms)


def put(room: WaitingRoom, *lengths: float, batch: int = 0, terms: Terms | None = None) -> list[Waiting]:
    """More items come."""
    items = [Waiting(1_000 * batch + n, batch, None, 100, terms, length) for n, length in enumerate(lengths)]
    for item in items:
        room.put(item)
    return items


def may_go(room: WaitingRoom, now: float = 0.0, flying: int = 0, *, together: int | None = None) -> set[int]:
    """The batches that may go."""
    allowed = room.allowed(now, flying, together=together)
    assert not isinstance(allowed, IdleReason)
    return {batch.number for batch in allowed}


def release(room: WaitingRoom, item: Waiting) -> Batch:
    """An item leaves the room for a slot."""
    batch = room.batch(item.batch, item.terms)
    batch.seated += 1
    batch.terms.in_flight += 1
    room.take(item)
    room.served(item, item.length)
    return batch


# -- Lines -------------------------------------------------------------------------------------------------------


def test_the_longest_first_and_equals_as_they_came() -> None:
    """Whoever comes back takes its old place among its equals."""
    room, items = room_of(10.0, 30.0, 10.0, 30.0)
    order = []
    while (longest := room.longest(list(room.batches.values()))) is not None:
        order.append(longest.ticket)
        room.take(longest)
        if len(order) == 1:
            room.put(items[1])
    assert order == [1, 1, 3, 0, 2]


def test_sums_are_right_whatever_comes_and_goes() -> None:
    """The work of the room and of its families; when all have left, nothing is left."""
    rng = random.Random(1)
    room, there = WaitingRoom(), dict[int, Waiting]()
    for ticket in range(400):
        if there and rng.random() < 0.45:
            room.take(there.pop(rng.choice(list(there))))
        else:
            item = Waiting(ticket, rng.randrange(3), rng.choice([None, A, B]), 100, None, rng.randint(1, 9))
            there[ticket] = item
            room.put(item)
        assert len(room) == len(there)
        assert room.work == pytest.approx(sum(item.length for item in there.values()))
        for prefix in (None, A, B):
            key = prefix.key if prefix else ALONE
            own = [item for item in there.values() if item.prefix is prefix]
            assert (room.families[key].count if own else 0) == len(own)
            assert (key in room.families) is bool(own)
            if own:
                top = room.top(room.families[key], list(room.batches.values()))
                assert top is not None
                assert top.length == max(item.length for item in own)
    for item in there.values():
        room.take(item)
    assert (room.batches, room.families, room.longest([]), room.get(0)) == ({}, {}, None, None)


def test_a_family_s_first_of_some_batches() -> None:
    """A line of which nobody is left is forgotten, though others of the batch wait elsewhere."""
    room = WaitingRoom()
    mine, theirs = Waiting(1, 0, A, 100, None, 50.0), Waiting(2, 1, A, 100, None, 10.0)
    elsewhere = Waiting(3, 0, B, 100, None, 1.0)
    for item in (mine, theirs, elsewhere):
        room.put(item)
    family_a, both = room.families[A.key], list(room.batches.values())
    assert room.top(family_a, both) is mine
    assert room.top(family_a, both[1:]) is theirs
    room.take(mine)
    assert room.top(family_a, both) is theirs
    assert 0 not in family_a.lines
    assert room.top(family_a, both[:1]) is None


def test_no_more_than_some_families_are_compared() -> None:
    """Items that share nothing are none."""
    room, _ = room_of(1.0)
    for key in range(1, MOST_COMPARED + 50):
        room.put(Waiting(key + 10, 0, family(key, 500), 600, None, 1.0))
    assert [each.prefix.key for each in room.compared() if each.prefix] == list(range(1, MOST_COMPARED + 1))


# -- Which batches may go ----------------------------------------------------------------------------------------


def test_nobody_waits() -> None:
    """Nor does a batch that is parked."""
    room, _ = room_of()
    assert room.allowed(0.0, 0) is IdleReason.NO_ITEMS
    _ = put(room, 1.0)
    room.batch(0).is_parked = True
    assert room.allowed(0.0, 0) is IdleReason.NO_ITEMS
    assert room.next_moment(0.0) is None


def test_the_highest_priority_alone() -> None:
    """Until it is at its own limit: then the others go."""
    room, _ = room_of(1.0)
    urgent = put(room, 1.0, 1.0, batch=1, terms=Terms(priority=Priority.HIGH, max_concurrency=1))
    assert may_go(room) == {1}
    _ = release(room, urgent[0])
    assert may_go(room) == {0}


def test_one_that_has_nothing_in_a_slot_goes_first() -> None:
    """However little the others have had."""
    room, items = room_of(1.0, 1.0)
    _ = release(room, items[0])
    _ = put(room, 500.0, batch=1)
    assert may_go(room) == {1}


def test_batches_may_be_ahead_by_two_items() -> None:
    """For the sake of what a slot holds; the one that has had more waits."""
    room, items = room_of(*[10.0] * 9)
    others = put(room, *[10.0] * 9, batch=1)
    for item in (items[0], others[0], items[1], items[2]):
        _ = release(room, item)
    assert may_go(room) == {0, 1}
    _ = release(room, items[3])
    assert may_go(room) == {1}


def test_what_is_about_to_go_counts() -> None:
    """A batch has had what it was promised; what is taken back, it has not had."""
    room, items = room_of(10.0, 10.0)
    others = put(room, 10.0, 10.0, batch=1)
    for item in (items[0], others[0]):
        batch = room.batch(item.batch)
        batch.seated += 1
    room.promise(items[0], 10.0)
    both = list(room.batches.values())
    # At one length, who has had least, though the other came before.
    assert room.longest(both) is others[0]
    assert room.top(room.families[ALONE], both) is others[0]
    room.promise(items[1], 10.0)
    assert may_go(room) == {0, 1}
    room.promise(items[1], 10.0)
    assert may_go(room) == {1}
    for item in (items[0], items[1], items[1]):
        room.unpromise(item, 10.0)
    assert may_go(room) == {0, 1}
    assert room.longest(both) is items[0]


def test_one_that_was_idle_does_not_save_up() -> None:
    """It begins where the others are."""
    room, items = room_of(*[10.0] * 50)
    late = put(room, 10.0, batch=1)[0]
    batch = release(room, late)
    batch.seated = 0
    for item in items[:40]:
        _ = release(room, item)
    _ = put(room, *[10.0] * 9, batch=1)
    assert room.batches[1].served >= room.batches[0].served - 10.0


def test_shares_by_weight() -> None:
    """What counts is tokens: of those released, the heavier batch gets three of four."""
    room, _ = room_of(*[10.0] * 400, batch=1, terms=Terms(weight=1))
    _ = put(room, *[20.0] * 400, batch=2, terms=Terms(weight=3))
    # Each has something in a slot all the time.
    room.batch(1).seated = room.batch(2).seated = 1
    tokens = {1: 0.0, 2: 0.0}
    for _ in range(300):
        allowed = room.allowed(0.0, 2)
        assert not isinstance(allowed, IdleReason)
        item = room.longest([min(allowed, key=lambda batch: batch.served)])
        assert item is not None
        tokens[item.batch] += item.length
        _ = release(room, item)
    assert tokens[2] / tokens[1] == pytest.approx(3, rel=0.05)


# -- Their own limits --------------------------------------------------------------------------------------------


def test_so_many_at_a_time_on_all_runners() -> None:
    """What waits for another runner's end is looked at again soon; what waits for its own is not."""
    terms = Terms(max_concurrency=1)
    room, items = room_of(1.0, 1.0, terms=terms)
    terms.in_flight = 1
    assert room.allowed(0.0, 0) is IdleReason.BATCH_LIMIT
    assert room.next_moment(5.0) == pytest.approx(5.02)
    terms.in_flight = 0
    _ = release(room, items[0])
    assert room.allowed(0.0, 1) is IdleReason.BATCH_LIMIT
    assert room.next_moment(5.0) is None


def test_so_many_a_second() -> None:
    """It may go again when the moment has come; for what is only made ready, that does not count."""
    terms = Terms(items_per_second=2.0, next_release_s=7.5)
    room, _ = room_of(1.0, terms=terms)
    assert room.allowed(7.4, 0) is IdleReason.BATCH_LIMIT
    assert room.next_moment(7.4) == 7.5
    assert room.allowed(7.4, 0, is_ahead=True) == [room.batch(0)]
    assert may_go(room, 7.5) == {0}
    assert room.next_moment(7.5) is None


def test_a_batch_in_waves_goes_when_nothing_else_does() -> None:
    """Until then nobody goes, so that the slots run empty."""
    terms = Terms(is_together=True)
    room, items = room_of(1.0, 1.0, terms=terms)
    assert room.allowed(0.0, 3) is IdleReason.TOGETHER
    assert may_go(room) == {0}
    batch = release(room, items[0])
    # Its own wave may be filled, and no other one begun.
    assert may_go(room, flying=1, together=0) == {0}
    assert room.allowed(0.0, 1) is IdleReason.TOGETHER
    room.take(items[1])
    _ = put(room, 1.0, batch=1)
    assert room.allowed(0.0, 1, together=0) is IdleReason.TOGETHER
    batch.seated = 0


def test_a_batch_in_waves_beside_another() -> None:
    """They take turns: when it has had less, the others wait for it; when it has had more, it waits for them."""
    room, items = room_of(*[10.0] * 9, terms=Terms(is_together=True))
    others = put(room, *[10.0] * 9, batch=1)
    _ = release(room, others[0])
    assert room.allowed(0.0, 1) is IdleReason.TOGETHER
    room.batches[1].seated = 0
    for item in items[:4]:
        release(room, item).seated = 0
    assert may_go(room) == {1}
    # Ahead of time, it may be made ready.
    room.batches[1].is_parked = True
    assert room.allowed(0.0, 1, is_ahead=True) == [room.batches[0]]


# -- Batches -----------------------------------------------------------------------------------------------------


def test_a_batch_is_forgotten_when_nothing_is_left_of_it() -> None:
    """Not while it is parked, or has something in a slot."""
    room, items = room_of(1.0)
    batch = release(room, items[0])
    room.forget(batch)
    assert 0 in room.batches
    batch.seated, batch.is_parked = 0, True
    room.forget(batch)
    assert 0 in room.batches
    batch.is_parked = False
    room.forget(batch)
    room.forget(batch)
    assert room.batches == {}


def test_terms_may_come_later() -> None:
    """A batch that was known without terms gets them with its first items."""
    room = WaitingRoom()
    batch = room.batch(0)
    terms = Terms(weight=3)
    assert room.batch(0, terms) is batch
    assert batch.terms is terms
    assert room.batch(0).terms is terms


def test_newcomers_without_end_do_not_keep_a_batch_away() -> None:
    """One after the other begins, each with one item; a batch of many gets its share beside three at a time."""
    room, items = room_of(*[10.0] * 60)
    number, served = 1, 0
    waiting: list[Waiting] = []
    for _ in range(80):
        while len(waiting) < 3:
            waiting.append(put(room, 10.0, batch=number)[0])
            number += 1
        (first,) = may_go(room) if len(may_go(room)) == 1 else (0,)
        if first == 0:
            batch = release(room, items[served])
            served += 1
        else:
            chosen = next(item for item in waiting if item.batch == first)
            waiting.remove(chosen)
            batch = release(room, chosen)
        batch.seated -= 1
        room.forget(batch)
    assert 15 <= served <= 30
