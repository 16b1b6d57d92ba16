"""What the schedule is worth: prefixes computed, passes taken, and every caller's share, on a simulated processor."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import pytest

from tests.unit.core.processor import BYTES_PER_TOKEN, Processor, family
from unisono.core.capacity import Capacity
from unisono.core.commands import Priority, Release, ReleaseReason, Terms, Work
from unisono.core.conductor import Conductor
from unisono.core.idle import IdleReason
from unisono.core.prefixes import Prefix
from unisono.core.schedule import Schedule
from unisono.core.seats import Seat
from unisono.core.waiting import Waiting
from unisono.core.window import WindowSettings

# What each item of a family has of its own.
REST_BYTES = 80


def runner(slots: int, **costs: float) -> Processor[Conductor]:
    """An open runner whose slots are configured."""
    return Processor(conductor=Conductor(Capacity(configured=slots)), slots=slots, **costs)  # type: ignore[arg-type]


def items(
    numbers: Iterable[int],
    *,
    batch: int = 0,
    tokens: int | None = 8,
    prefix: Prefix | None = None,
    terms: Terms | None = None,
) -> list[Work]:
    """Items of one batch and family."""
    size = (prefix.size if prefix is not None else 0) + REST_BYTES
    return [
        Work(ticket=n, batch=batch, num_predict=tokens, prefix=prefix, prompt_bytes=size, terms=terms)
        for n in numbers
    ]


def prompts(world: Processor[Conductor], tokens: int) -> float:
    """How many prefixes of so many tokens were computed, about."""
    rests = len(world.ends) * REST_BYTES / BYTES_PER_TOKEN
    return (world.prompt_tokens - rests) / tokens


def reasons(world: Processor[Conductor]) -> Counter[ReleaseReason]:
    """Why items went."""
    return Counter(reason for release in world.releases for reason in release.reasons)


# -- Prefixes ----------------------------------------------------------------------------------------------------


def test_a_dear_prefix_is_computed_once() -> None:
    """Sixteen items of 2 tokens with 2,000 tokens in common: one slot, whatever there are."""
    world = runner(8)
    world.add(items(range(16), tokens=2, prefix=family(1, 8_000)))
    _ = world.run()
    assert prompts(world, 2_000) == pytest.approx(1)


def test_a_cheap_prefix_is_computed_in_every_slot() -> None:
    """Sixteen items of 200 tokens with 100 in common: to share passes is worth more."""
    world = runner(8)
    world.add(items(range(16), tokens=200, prefix=family(1, 400)))
    _ = world.run()
    assert prompts(world, 100) == pytest.approx(8)
    assert world.passes <= 2 * 200 + 8


def test_the_first_tells_the_price_before_others_are_spread() -> None:
    """Until it has spoken twice, no other slot computes the prefix; then as many as it is worth."""
    world = runner(8)
    world.add(items(range(40), tokens=50, prefix=family(1, 2_000)))
    _ = world.run(passes=1)
    assert [release.tickets for release in world.releases] == [(0,)]
    _ = world.run()
    assert reasons(world)[ReleaseReason.NEW_FAMILY] == 1
    assert 2 <= reasons(world)[ReleaseReason.JOINS_FAMILY] <= 7


@pytest.mark.parametrize("families", [4, 8, 16, 64])
def test_each_prefix_is_computed_once(families: int) -> None:
    """Families as many as slots, or more, that come mixed: none is computed twice."""
    world = runner(4)
    works = [
        work
        for key in range(1, families + 1)
        for work in items(range(100 * key, 100 * key + 4), prefix=family(key, 8_000))
    ]
    random.Random(families).shuffle(works)
    world.add(works)
    _ = world.run()
    assert prompts(world, 2_000) == pytest.approx(families, rel=0.15)


@pytest.mark.parametrize(("families", "each"), [(16, 4), (64, 2)])
@pytest.mark.parametrize("slots", [4, 8, 16])
def test_a_probe_costs_a_prefix_or_two(slots: int, families: int, each: int) -> None:
    """Once their number is learned, one more than the slots is tried now and then: by one item, and no more.

    Whoever stands at the backend takes whatever slot falls free, and who was to have that takes the next.
    """
    world = Processor(conductor=Conductor(Capacity()), slots=slots, tells_times=True)
    world.add(items(range(64), batch=0))
    _ = world.run()
    assert world.conductor.capacity.slots.count == slots
    for batch in range(1, 5):
        works = [
            work
            for family_ in range(families)
            for work in items(
                range(10_000 * batch + 100 * family_, 10_000 * batch + 100 * family_ + each),
                batch=batch,
                prefix=family(1_000 * batch + family_, 2_240),
            )
        ]
        random.Random(batch).shuffle(works)
        before = world.prompt_tokens
        world.add(works)
        _ = world.run()
        computed = (world.prompt_tokens - before - len(works) * REST_BYTES / BYTES_PER_TOKEN) / 560
        assert families <= computed <= 1.15 * families + 1


def test_a_number_remembered_too_low_is_put_right_among_families() -> None:
    """The first item too many holds a slot beside the others: there are more."""
    capacity = Capacity()
    capacity.seed(2)
    world = Processor(conductor=Conductor(capacity), slots=8, tells_times=True)
    for key in range(1, 17):
        world.add(items(range(100 * key, 100 * key + 4), prefix=family(key, 2_240)))
    _ = world.run()
    assert capacity.at_least == 8
    assert prompts(world, 560) <= 17


def test_equal_families_are_helped_together() -> None:
    """Four cheap families on eight slots take two each; at the end, one or another where a slot is left over."""
    world = runner(8)
    for key in range(1, 5):
        world.add(items(range(100 * key, 100 * key + 20), tokens=60, prefix=family(key, 400)))
    _ = world.run()
    assert 8 <= prompts(world, 100) <= 14
    # 80 answers of 60 tokens on 8 slots.
    assert world.passes <= 1.08 * 600


def test_what_is_held_goes_before_what_is_new() -> None:
    """A second batch on a prefix that a slot holds computes it not at all."""
    world = runner(4)
    world.add(items(range(8), prefix=family(1, 8_000)))
    _ = world.run()
    before = world.prompt_tokens
    world.add(items(range(100, 108), batch=1, prefix=family(1, 8_000)))
    _ = world.run()
    assert world.prompt_tokens - before == 8 * REST_BYTES // BYTES_PER_TOKEN
    assert {release.held_bytes[0] for release in world.releases[-4:]} == {8_000}


def test_a_runner_that_is_loaded_anew_has_forgotten_its_prefixes() -> None:
    """What was held is new then, and one slot computes it first."""
    world = runner(4)
    world.add(items(range(8), prefix=family(1, 8_000)))
    _ = world.run()
    world.do(world.conductor.shut(world.now))
    world.do(world.conductor.open(world.now, is_fresh=True))
    world.add(items(range(100, 108), batch=1, prefix=family(1, 8_000)))
    first = next(release for release in world.releases if release.tickets[0] >= 100)
    assert first.reasons == (ReleaseReason.NEW_FAMILY,)
    assert first.held_bytes == (0,)
    _ = world.run()


def test_lanes_are_what_the_runner_does() -> None:
    """Items that share nothing, beside families: what a lane was said to hold is what its slot held."""
    rng = random.Random(5)
    world = runner(4)
    works = [work for key in (1, 2, 3) for work in items(range(100 * key, 100 * key + 8), prefix=family(key, 8_000))]
    works += items(range(20), tokens=8)
    rng.shuffle(works)
    world.add(works)
    _ = world.run()
    held = sum(bytes_ or 0 for release in world.releases for bytes_ in release.held_bytes)
    asked = sum(work.prompt_bytes for work in works)
    assert world.prompt_tokens == pytest.approx((asked - held) / BYTES_PER_TOKEN, rel=0.01)


# -- Who stands at the door --------------------------------------------------------------------------------------


def times_at_the_door(world: Processor[Conductor]) -> int:
    """How often somebody went to the backend's own queue, for whichever slot falls free."""
    return sum(1 for release in world.releases if None in release.lanes)


def test_nobody_stands_at_the_door_where_families_matter() -> None:
    """It would get the first slot that falls free, whatever that one holds."""
    world = runner(4)
    for key in (1, 2, 3, 4):
        world.add(items(range(100 * key, 100 * key + 9), prefix=family(key, 8_000)))
    _ = world.run()
    assert times_at_the_door(world) == 0


def test_somebody_stands_at_the_door_where_any_slot_will_do() -> None:
    """Also where all slots hold what all wait for."""
    world = runner(4)
    world.add(items(range(20)))
    _ = world.run()
    assert times_at_the_door(world) > 10
    shared = runner(2)
    shared.add(items(range(40), tokens=100, prefix=family(1, 400)))
    _ = shared.run()
    assert times_at_the_door(shared) > 30


# -- Lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configured", [8, None])
@pytest.mark.parametrize("seed", range(8))
def test_heavy_tails_take_few_passes_more_than_they_must(seed: int, configured: int | None) -> None:
    """Sixty-four answers of 6 to 200 tokens on eight slots, known or not: within 3 % of the fewest possible."""
    rng = random.Random(seed)
    lengths = [min(200, int(6 * rng.paretovariate(0.9))) for _ in range(64)]
    world = Processor(conductor=Conductor(Capacity(configured=configured)), slots=8)
    world.add([Work(ticket=n, batch=0, num_predict=length) for n, length in enumerate(lengths)])
    _ = world.run()
    assert world.passes <= 1.03 * max(*lengths, sum(lengths) / 8)
    assert [lengths[n] for n in world.order] == sorted(lengths, reverse=True)


def test_the_tail_goes_first_though_its_lane_holds_another_prefix() -> None:
    """One answer as long as all the rest of a family is not its last."""
    world = runner(2)
    world.add(items(range(10), tokens=10, prefix=family(1, 2_000)))
    _ = world.run()
    world.add([*items(range(100, 106), tokens=10, prefix=family(1, 2_000)), *items([200], tokens=70)])
    _ = world.run()
    assert world.order.index(200) <= world.order.index(101)
    assert world.ends[200].attempts == 1


def test_nobody_waits_for_a_lane_while_another_is_free() -> None:
    """Who was to follow in one lane goes into the other where that falls free first, and nobody else is there."""
    schedule = Schedule(Capacity(), WindowSettings())
    for ticket in range(9):
        schedule.add(waiting(ticket), is_single=False, now=0.0)
    assert go(schedule, schedule.plan(0.0)) == list(range(8))
    assert [seat.lane.number for seat in schedule.ahead(0.0)] == [0]
    schedule.drop(5, 1.0)
    assert [(seat.item.ticket, seat.lane.number) for seat in schedule.plan(1.0)] == [(8, 5)]


# -- Shares ------------------------------------------------------------------------------------------------------


def test_weights_are_shares_of_tokens() -> None:
    """One with three times the weight gets three times the tokens, as long as both have work."""
    world = runner(4)
    world.add(items(range(300), tokens=10, terms=Terms(weight=1)))
    world.add(items(range(1_000, 1_300), batch=1, tokens=20, terms=Terms(weight=3)))
    _ = world.run(passes=500)
    tokens = Counter[int]()
    for ticket in world.ends:
        tokens[ticket // 1_000] += 20 if ticket >= 1_000 else 10
    assert tokens[1] / tokens[0] == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("configured", [8, None])
@pytest.mark.parametrize("prefixes", [0, 1, 24])
@pytest.mark.parametrize("is_equal", [True, False])
def test_equal_batches_get_on_equally(configured: int | None, prefixes: int, is_equal: bool) -> None:  # noqa: FBT001
    """Four batches of the same 24 items that come together: none has two average answers more than another.

    Or is ahead by these and the one with which it came so far, where slots hold what some of the items begin with.
    Answers of one length end together, so that all slots fall free at once, and are decided on at once.
    """
    world = Processor(conductor=Conductor(Capacity(configured=configured)), slots=8)
    lengths = [64] * 24 if is_equal else [16, 32, 80, 128] * 6
    works = [
        work
        for batch in range(4)
        for n, tokens in enumerate(lengths)
        for work in items(
            [100 * batch + n],
            batch=batch,
            tokens=tokens,
            prefix=family(n % prefixes, 400) if prefixes else None,
        )
    ]
    world.add(works)
    apart = 0
    while all(sum(ticket // 100 == batch for ticket in world.order) < 24 for batch in range(4)):
        _ = world.run(passes=1)
        had = [sum(lengths[ticket % 100] for ticket in world.order if ticket // 100 == batch) for batch in range(4)]
        apart = max(apart, max(had) - min(had))
    assert apart <= 2 * 64 + (0 if is_equal or prefixes < 2 else max(lengths))


@pytest.mark.parametrize("bound", [256, None])
@pytest.mark.parametrize("between", [0, 5, 15, 60])
def test_equal_batches_that_come_one_after_another_get_on_equally(between: int, bound: int | None) -> None:
    """Answers turn out to be far shorter than was expected of the first ones: that changes nobody's share.

    From when all are there on, until one of them is through, each gets on as the others do, but for what the first
    one was ahead by.
    """
    tickets = [100 * batch + n for batch in range(4) for n in range(60)]
    world = Processor(conductor=Conductor(Capacity(configured=8)), slots=8, lengths=dict.fromkeys(tickets, 40))
    for batch in range(4):
        world.add(items(range(100 * batch, 100 * batch + 60), batch=batch, tokens=bound))
        _ = world.run(passes=between)
    before = Counter(ticket // 100 for ticket in world.order)
    now = before
    while max(now.values()) < 60:
        _ = world.run(passes=1)
        now = Counter(ticket // 100 for ticket in world.order)
    since = [now[batch] - before[batch] for batch in range(4)]
    assert max(since) - min(since) <= 10, since


def test_one_item_beside_five_thousand_goes_with_the_next_slot() -> None:
    """It need not wait for more than one of them to end."""
    world = runner(4)
    world.add(items(range(5_000)))
    _ = world.run(passes=50)
    ended = len(world.ends)
    world.add(items([9_000], batch=1))
    while 9_000 not in world.order:
        _ = world.run(passes=1)
    # Those that end in one pass, of which one made room; and one may have stood at the door.
    assert len(world.ends) - ended <= 4 + 1
    _ = world.run(passes=30)
    assert 9_000 in world.ends


def test_a_higher_priority_goes_first() -> None:
    """Whatever the lower one has waited."""
    world = runner(2)
    world.add(items(range(50), terms=Terms(priority=Priority.LOW)))
    _ = world.run(passes=20)
    came = len(world.order)
    world.add(items(range(100, 120), batch=1, terms=Terms(priority=Priority.HIGH)))
    _ = world.run()
    assert world.order[came : came + 20] == list(range(100, 120))


def test_so_many_at_a_time() -> None:
    """The others' slots go to whoever else waits."""
    terms = Terms(max_concurrency=2)
    world = runner(4)
    world.add(items(range(20), terms=terms))
    world.add(items(range(100, 120), batch=1))
    while len(world.ends) < 40:
        _ = world.run(passes=1)
        assert terms.in_flight <= 2
    assert world.order.index(2) > 3


def test_so_many_a_second() -> None:
    """Evenly, and none is saved up."""
    world = runner(4)
    world.add(items(range(10), tokens=1, terms=Terms(items_per_second=5.0)))
    began_s = world.now
    _ = world.run()
    assert 1.8 <= world.now - began_s <= 2.2


def test_what_is_taken_back_costs_no_rate() -> None:
    """A seat that was decided and not taken gives its moment back."""
    terms = Terms(items_per_second=1.0)
    schedule = Schedule(Capacity(configured=1), WindowSettings())
    schedule.add(waiting(0, terms=terms), is_single=False, now=10.0)
    assert len(schedule.plan(10.0)) == 1
    assert terms.next_release_s == 11.0
    schedule.reconsider()
    assert terms.next_release_s == 0.0
    assert terms.in_flight == 0


def test_waves_never_overlap() -> None:
    """All of a wave have ended before one of the next goes; the slots are its alone."""
    world = runner(4)
    world.lengths = {n: 3 + 7 * n % 20 for n in range(12)}
    world.add(items(range(12), tokens=40, terms=Terms(is_together=True)))
    world.add(items(range(100, 110), batch=1))
    waves: list[set[int]] = []
    seen = 0
    while len(world.ends) < 22:
        _ = world.run(passes=1)
        for release in world.releases[seen:]:
            if release.reasons[0] is ReleaseReason.TOGETHER:
                assert set(release.tickets) <= set(range(12))
                waves.append(set(release.tickets))
                assert all(former <= set(world.ends) for former in waves[:-1])
        seen = len(world.releases)
    assert [len(wave) for wave in waves] == [4, 4, 4]


def test_a_wave_is_no_probe() -> None:
    """While one lane more than the known number is tried, waves have as many items as that, and others try it."""
    capacity = Capacity()
    capacity.seed(4)
    world = Processor(conductor=Conductor(capacity), slots=4, tells_times=True)
    assert capacity.limit == 5
    world.add(items(range(12), terms=Terms(is_together=True)))
    _ = world.run()
    assert [len(release.tickets) for release in world.releases] == [4, 4, 4]
    capacity = Capacity()
    capacity.seed(4)
    world = Processor(conductor=Conductor(capacity), slots=4, tells_times=True)
    world.add(items(range(12)))
    _ = world.run()
    assert len(world.releases[0].tickets) == 5


# -- The schedule by itself --------------------------------------------------------------------------------------


def waiting(
    ticket: int, *, batch: int = 0, prefix: Prefix | None = None, length: float = 10.0, terms: Terms | None = None
) -> Waiting:
    """An item that waits."""
    return Waiting(ticket, batch, prefix, 400, terms, length)


def desk(slots: int, count: int, **more: float) -> Schedule:
    """A schedule of so many lanes, for which so many items wait."""
    schedule = Schedule(Capacity(configured=slots), WindowSettings())
    for ticket in range(count):
        schedule.add(waiting(ticket, **more), is_single=False, now=0.0)  # type: ignore[arg-type]
    return schedule


def go(schedule: Schedule, seats: list[Seat]) -> list[int]:
    """These are released."""
    for seat in seats:
        _ = schedule.go(seat, 0.0)
    return [seat.item.ticket for seat in seats]


def test_memory_holds_back_what_does_not_fit() -> None:
    """Each reserves 100 tokens of prompt and 10 of answer: of 300 there is room for two."""
    schedule = desk(4, 4)
    schedule.token_limit = 300
    assert go(schedule, schedule.plan(0.0)) == [0, 1]
    assert schedule.idle == {IdleReason.MEMORY: 2}
    schedule.drop(0, 1.0)
    assert go(schedule, schedule.plan(1.0)) == [2]
    schedule.token_limit = None
    schedule.reconsider()
    assert go(schedule, schedule.plan(1.0)) == [3]


def test_one_that_is_larger_than_memory_goes_by_itself() -> None:
    """The backend may still say no; nobody waits for ever."""
    schedule = desk(4, 2, length=900.0)
    schedule.token_limit = 300
    assert go(schedule, schedule.plan(0.0)) == [0]
    assert schedule.plan(0.0) == []
    schedule.drop(0, 1.0)
    assert go(schedule, schedule.plan(1.0)) == [1]


def test_memory_counts_at_the_door_too() -> None:
    """Whoever stands there will sit beside the others."""
    schedule = desk(2, 4)
    schedule.token_limit = 300
    assert go(schedule, schedule.plan(0.0)) == [0, 1]
    ready = [seat.item.ticket for seat in schedule.ahead(0.0)]
    assert ready == [2, 3]
    assert schedule.door(0.0, ready) == []
    schedule.token_limit = 340
    assert go(schedule, schedule.door(0.0, ready)) == [2]
    assert schedule.flying == 3


def test_who_follows_is_decided_anew_when_a_lane_falls_free() -> None:
    """Something longer has come since; what was decided waits again."""
    schedule = desk(1, 2)
    _ = go(schedule, schedule.plan(0.0))
    assert [seat.item.ticket for seat in schedule.ahead(0.0)] == [1]
    assert schedule.is_decided(1)
    schedule.add(waiting(7, length=50.0), is_single=False, now=0.0)
    schedule.drop(0, 1.0)
    assert [seat.item.ticket for seat in schedule.plan(1.0)] == [7]
    assert not schedule.is_decided(1)


def test_nothing_is_decided_when_somebody_new_comes() -> None:
    """Whose turn it is, is looked at from the beginning; nobody has lost its place."""
    schedule = desk(1, 1)
    assert [seat.item.ticket for seat in schedule.plan(0.0)] == [0]
    schedule.reconsider()
    assert not schedule.is_decided(0)
    schedule.add(waiting(7, length=50.0), is_single=False, now=0.0)
    assert [seat.item.ticket for seat in schedule.plan(0.0)] == [7]


def test_a_plan_stays_while_nothing_happens() -> None:
    """The same seats, as often as one asks."""
    schedule = desk(2, 3)
    first = schedule.plan(0.0)
    assert schedule.plan(0.0) == first
    assert all(mine is theirs for mine, theirs in zip(schedule.plan(5.0), first, strict=True))


def test_a_lower_limit_counts_from_the_next_decision_on() -> None:
    """Who sits stays; the lanes are gone when they have left them."""
    capacity = Capacity(configured=4)
    schedule = Schedule(capacity, WindowSettings())
    for ticket in range(8):
        schedule.add(waiting(ticket), is_single=False, now=0.0)
    assert go(schedule, schedule.plan(0.0)) == [0, 1, 2, 3]
    capacity.stumbled()
    assert capacity.limit == 2
    assert schedule.plan(0.0) == []
    assert schedule.lanes == 4
    for ticket in (0, 1):
        schedule.drop(ticket, 1.0)
    assert schedule.plan(1.0) == []
    assert schedule.lanes == 2
    schedule.drop(2, 1.0)
    assert len(schedule.plan(1.0)) == 1


@pytest.mark.parametrize(("families", "lanes"), [(0, 16), (20, 8)])
def test_no_more_lanes_than_were_seen_where_families_matter(families: int, lanes: int) -> None:
    """While the slots are not known, more are tried only if it does not matter who gets which."""
    capacity = Capacity()
    capacity.seed(0, 16)
    assert capacity.limit == 16
    schedule = Schedule(capacity, WindowSettings())
    for ticket in range(40):
        prefix = family(ticket % families + 1, 2_000) if families else None
        schedule.add(waiting(ticket, prefix=prefix), is_single=False, now=0.0)
    assert len(schedule.plan(0.0)) == lanes


def test_who_stands_at_the_door_takes_the_lane_that_falls_free() -> None:
    """First come, first served; and it may go away before."""
    schedule = desk(1, 4)
    _ = go(schedule, schedule.plan(0.0))
    _ = go(schedule, schedule.door(0.0, [seat.item.ticket for seat in schedule.ahead(0.0)]))
    assert schedule.flying == 2
    assert schedule.most == 2
    schedule.drop(1, 0.5)
    assert schedule.flying == 1
    _ = go(schedule, schedule.door(0.5, [seat.item.ticket for seat in schedule.ahead(0.5)]))
    schedule.drop(0, 1.0)
    assert (schedule.flying, schedule.idle) == (1, {})
    assert schedule.plan(1.0) == []


@pytest.mark.parametrize("size", [None, 3])
def test_single_requests_are_gathered(size: int | None) -> None:
    """Until there are as many as lanes, or as it was said, or for as long as the window is open."""
    schedule = Schedule(Capacity(configured=4), WindowSettings(window_s=0.5, size=size))
    schedule.add(waiting(0), is_single=True, now=0.0)
    # A lone one does not wait.
    assert go(schedule, schedule.plan(0.0)) == [0]
    for ticket in (1, 2):
        schedule.add(waiting(ticket), is_single=True, now=1.0)
    schedule.gather(1.2)
    assert schedule.plan(1.2) == []
    assert schedule.idle == {IdleReason.WINDOW: 3}
    assert schedule.next_moment() == 1.5
    if size is None:
        schedule.gather(1.5)
    else:
        schedule.add(waiting(3), is_single=True, now=1.3)
        schedule.gather(1.3)
    seats = schedule.plan(1.5)
    assert [seat.item.ticket for seat in seats] == ([1, 2] if size is None else [1, 2, 3])
    assert all(seat.item.is_gathered for seat in seats)


def test_who_is_gathered_waits_and_may_leave() -> None:
    """It counts as waiting though no batch has it yet; when it has left, nothing of it is remembered."""
    schedule = Schedule(Capacity(configured=4), WindowSettings(window_s=0.5))
    schedule.add(waiting(0), is_single=True, now=0.0)
    _ = go(schedule, schedule.plan(0.0))
    schedule.add(waiting(1, batch=7), is_single=True, now=1.0)
    before = schedule.has_waiting
    schedule.drop(1, 1.1)
    assert (before, schedule.has_waiting) == (True, False)
    assert schedule.next_moment() is None
    assert 7 not in schedule.room.batches


def test_releases_name_what_they_do() -> None:
    """Each has a reason, a lane and what that holds, item by item; the waves are counted."""
    world = runner(4)
    world.add(items(range(30), prefix=family(1, 400)))
    world.add(items(range(100, 110)))
    _ = world.run()
    assert [release.wave for release in world.releases] == list(range(len(world.releases)))
    for release in world.releases:
        assert isinstance(release, Release)
        assert len(release.tickets) == len(release.reasons) == len(release.lanes) == len(release.held_bytes)
        for lane, held in zip(release.lanes, release.held_bytes, strict=True):
            assert (lane is None) is (held is None)
            assert lane is None or 0 <= lane < 4
    assert all(earlier.wave < later.wave for earlier, later in pairwise(world.releases))
