"""The count of forward passes, held against runners whose true passes are known."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.model import PassMethod
from unisono.core.passes import MAX_IMPUTED, REORDER_NS, PassCounter

MS = 1_000_000
START_NS = 1_700_000_000_000_000_000


@dataclass(kw_only=True)
class Item:
    """What an item says."""

    tokens: int
    # Whether the model ends it itself: then its last token is the end token, whose text is nothing.
    ends_itself: bool = False
    # Which of its tokens show as an arrival; None: all that have a text.
    shown: Callable[[int], bool] | None = None
    # The answer breaks off after so many tokens.
    cut_after: int | None = None


@dataclass(kw_only=True)
class Runner:
    """A runner with slots: each pass gives every item in a slot its next token, or several where it drafts."""

    items: list[Item]
    slots: int = 4
    pass_ms: float = 20.0
    # How far apart the tokens of one pass are stamped, and how long a stamped one may be on its way.
    stamp_ms: float = 0.2
    way_ms: float = 1.0
    drafted: Callable[[int], int] = lambda _: 1
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    # What is true: the members of each pass.
    passes: list[set[int]] = field(default_factory=list)
    arrivals: int = 0
    missing: int = 0

    def play(self, counter: PassCounter) -> PassCounter:
        """Runs all items to their end, and tells the counter what is seen of it, in the order of arrival."""
        events: list[tuple[float, int, Callable[[], object]]] = []
        queue = list(range(len(self.items)))
        slots: list[int] = []
        done = dict.fromkeys(queue, 0)
        began = dict.fromkeys(queue, 0.0)
        seen = dict.fromkeys(queue, 0)
        last_way = dict.fromkeys(queue, 0.0)
        now = 0.0
        while queue or slots:
            while queue and len(slots) < self.slots:
                slots.append(queue.pop(0))
            now += self.pass_ms
            self.passes.append(set(slots))
            for n in list(slots):
                item = self.items[n]
                began[n] = began[n] or now
                stamp = now + self.chance.uniform(0, self.stamp_ms)
                # An item's own tokens come in their order.
                last_way[n] = max(last_way[n], stamp + self.chance.uniform(0, self.way_ms))
                for _ in range(self.drafted(len(self.passes))):
                    done[n] += 1
                    has_text = not (item.ends_itself and done[n] == item.tokens)
                    if has_text and (item.shown is None or item.shown(done[n])):
                        seen[n] += 1
                        events.append((last_way[n], len(events), self._spoke(counter, n, stamp)))
                    if done[n] == item.tokens or done[n] == item.cut_after:
                        break
                is_cut = done[n] == item.cut_after
                if is_cut or done[n] == item.tokens:
                    slots.remove(n)
                    eval_s = (now - began[n] + self.pass_ms * 0.5) / 1000
                    tokens = None if is_cut else item.tokens
                    end = self._ended(counter, n, stamp + 0.01, tokens, eval_s)
                    events.append((last_way[n], len(events), end))
                    self.missing += 0 if is_cut else item.tokens - seen[n]
        self.arrivals = sum(seen.values())
        for _, _, happen in sorted(events, key=lambda event: event[:2]):
            happen()
        counter.settle()
        return counter

    def _spoke(self, counter: PassCounter, n: int, stamp_ms: float) -> Callable[[], object]:
        return lambda: counter.spoke(n, START_NS + round(stamp_ms * MS))

    def _ended(
        self, counter: PassCounter, n: int, stamp_ms: float, tokens: int | None, eval_s: float
    ) -> Callable[[], object]:
        at_ns = START_NS + round(stamp_ms * MS)
        ends_itself = self.items[n].ends_itself
        return lambda: counter.ended(n, at_ns, tokens=tokens, has_end_token=ends_itself, eval_s=eval_s)


def counter(**how: int) -> PassCounter:
    """A counter by the backend's clock."""
    return PassCounter(PassMethod.CREATED_AT, **how)


def is_near(count: int, truth: int) -> bool:
    """Within 2 passes or 2 %."""
    return abs(count - truth) <= max(2, 0.02 * truth)


def lengths(chance: random.Random, number: int) -> list[int]:
    """Answers with a heavy tail: 6 to 400 tokens."""
    return [min(400, int(6 * chance.paretovariate(0.9))) for _ in range(number)]


# -- The count ---------------------------------------------------------------------------------------------------


def test_nothing_said_is_no_pass() -> None:
    """Without an arrival there is no pass, and nothing to doubt."""
    empty = counter()
    empty.settle()
    count = empty.count
    assert (count.count, count.imputed_share, count.confidence) == (0, 0.0, 1.0)
    assert count.method is PassMethod.CREATED_AT
    assert empty.passes(0, 10) == []
    assert empty.unmapped == 0


def test_equal_lengths_share_every_pass() -> None:
    """Eight items of 80 tokens on eight slots are 80 passes of eight members each."""
    runner = Runner(items=[Item(tokens=80) for _ in range(8)], slots=8)
    seen = runner.play(counter())
    assert seen.count.count == 80
    assert seen.count.imputed_share == 0
    assert seen.count.confidence == 1
    assert [set(one.members) for one in seen.passes(0, 1000)] == runner.passes


def test_one_after_the_other_shares_nothing() -> None:
    """On one slot, every token is a pass of its own."""
    runner = Runner(items=[Item(tokens=20) for _ in range(5)], slots=1)
    seen = runner.play(counter())
    assert is_near(seen.count.count, 100)
    assert all(len(one.members) <= 2 for one in seen.passes(0, 1000))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("slots", [1, 4, 8])
@pytest.mark.parametrize("ends_itself", [False, True])
def test_heavy_tails_and_refill(seed: int, slots: int, *, ends_itself: bool) -> None:
    """Answers of very different lengths, refilled as slots fall free, with and without end tokens: within 2 %."""
    chance = random.Random(seed)
    items = [Item(tokens=n, ends_itself=ends_itself and chance.random() < 0.7) for n in lengths(chance, 40)]
    runner = Runner(items=items, slots=slots, chance=chance)
    seen = runner.play(counter())
    assert is_near(seen.count.count, len(runner.passes))
    assert seen.count.imputed_share == 0
    # An end token is seen as the end itself.
    assert seen.count.confidence == 1


@pytest.mark.parametrize("way_ms", [5.0, 60.0, 200.0])
def test_order_of_arrival_does_not_matter(way_ms: float) -> None:
    """Tokens that come out of order, within the window, are walked by their own time."""
    runner = Runner(items=[Item(tokens=n) for n in lengths(random.Random(3), 24)], slots=8, way_ms=way_ms)
    assert way_ms * MS < REORDER_NS
    seen = runner.play(counter())
    assert is_near(seen.count.count, len(runner.passes))
    times = [one.at_ns for one in seen.passes(0, 10_000)]
    assert times == sorted(times)


def test_too_late_is_walked_all_the_same() -> None:
    """A token that comes after the window is not lost, and the passes stay in the order of time."""
    late = counter()
    for k in range(100):
        late.spoke(0, START_NS + 20 * k * MS)
    late.spoke(1, START_NS)
    for k in range(100, 200):
        late.spoke(0, START_NS + 20 * k * MS)
    late.settle()
    passes = late.passes(0, 1000)
    assert late.count.count == 200
    assert sum(1 in one.members for one in passes) == 1
    assert [one.at_ns for one in passes] == sorted(one.at_ns for one in passes)


def test_held_back_text_is_imputed() -> None:
    """A tool call, whose 18 tokens show as one arrival, took part in the passes of its neighbours."""
    items = [Item(tokens=60), Item(tokens=18, shown=lambda k: k == 18), Item(tokens=60)]
    runner = Runner(items=items)
    seen = runner.play(counter())
    assert is_near(seen.count.count, 60)
    assert sum(1 in one.members for one in seen.passes(0, 100)) == 18
    assert seen.count.imputed_share == pytest.approx(17 / 138)
    assert seen.count.confidence == pytest.approx(121 / 138)


def test_held_back_text_of_one_that_is_alone_adds_passes() -> None:
    """Where nobody else spoke, the missing tokens are passes that nobody saw."""
    runner = Runner(items=[Item(tokens=18, shown=lambda k: k == 18)])
    seen = runner.play(counter())
    assert seen.count.count == 18
    times = [one.at_ns for one in seen.passes(0, 100)]
    assert times == sorted(times)
    pauses = [(later - sooner) / MS for sooner, later in pairwise(times)]
    assert all(15 < pause < 25 for pause in pauses)


@pytest.mark.parametrize("stagger", [0, 5])
def test_two_silent_items_side_by_side_share_their_passes(stagger: int) -> None:
    """Two tool calls that nobody saw being written are not counted twice."""
    items = [Item(tokens=40 + k * stagger, ends_itself=True, shown=lambda _: False) for k in range(2)]
    runner = Runner(items=items)
    seen = runner.play(counter())
    assert is_near(seen.count.count, 40 + stagger)
    assert seen.count.confidence == pytest.approx(2 / (80 + stagger))


def test_merged_characters() -> None:
    """Characters that took several tokens show less often than they were computed; their passes are counted."""
    items = [Item(tokens=120, shown=lambda k, n=n: (k + n) % 3 != 0) for n in range(4)]  # type: ignore[misc]
    runner = Runner(items=items)
    seen = runner.play(counter())
    assert is_near(seen.count.count, 120)
    assert seen.count.confidence == pytest.approx(80 / 120)
    alone = Runner(items=[Item(tokens=120, shown=lambda k: k % 3 != 0)])
    assert is_near(alone.play(counter()).count.count, 120)


def test_drafted_tokens_come_in_bursts() -> None:
    """With draft tokens, several tokens of one item in one burst are one pass; otherwise they would be many."""
    chance = random.Random(5)
    bursts = [chance.choice([1, 2, 3, 4]) for _ in range(1000)]

    def runner() -> Runner:
        return Runner(items=[Item(tokens=n) for n in lengths(random.Random(2), 12)], drafted=lambda k: bursts[k])

    with_drafts, naive = runner(), runner()
    seen = with_drafts.play(counter(drafted=3))
    assert is_near(seen.count.count, len(with_drafts.passes))
    assert seen.count.imputed_share == 0
    assert naive.play(counter()).count.count > 1.5 * len(with_drafts.passes)


@pytest.mark.parametrize("drafted", [1, 2, 3, 5])
def test_silence_that_was_drafted(drafted: int) -> None:
    """What nobody saw is as many passes as what was seen tells, for the silent item as for the group."""
    silent = Item(tokens=60, ends_itself=True, shown=lambda k: k > 55)
    runner = Runner(items=[silent, *(Item(tokens=100) for _ in range(3))], drafted=lambda k: 1 if k == 1 else drafted)
    seen = runner.play(counter(drafted=drafted - 1))
    assert is_near(seen.count.count, len(runner.passes))
    true = sum(0 in members for members in runner.passes)
    assert abs(sum(0 in one.members for one in seen.passes(0, 1000)) - true) <= 2


def test_silence_of_a_model_that_drafts_all_alone() -> None:
    """Where no token was seen as it was made, each counts as a pass, and the item's own are not stated."""
    alone = counter(drafted=2)
    alone.spoke(0, START_NS + 200 * MS)
    part = alone.ended(0, START_NS + 200 * MS, tokens=25, has_end_token=True, eval_s=0.2)
    assert (part.passes, part.at_least) == (None, None)
    alone.settle()
    assert alone.count.count == 24
    assert alone.count.confidence == pytest.approx(2 / 25)


def test_each_item_knows_its_own_passes() -> None:
    """With drafts, an item took part in fewer passes than it has tokens; what broke off, in those that were seen."""
    three = counter(drafted=2)
    for k in range(10):
        for _ in range(1 if k == 0 else 3):
            three.spoke(0, START_NS + 20 * k * MS)
            three.spoke(1, START_NS + 20 * k * MS)
    whole = three.ended(0, START_NS + 181 * MS, tokens=28, has_end_token=False)
    cut = three.ended(1, START_NS + 181 * MS, tokens=None, has_end_token=False)
    assert (whole.passes, whole.at_least) == (cut.passes, cut.at_least) == (10, 10)
    three.settle()
    assert three.count.count == 10


def test_a_pass_gives_no_more_than_was_drafted() -> None:
    """Passes that are quicker than the gap between two are told apart by what one of them can give."""
    quick = counter(drafted=2)
    for k in range(30):
        for _ in range(3):
            quick.spoke(0, START_NS + k * MS)
    part = quick.ended(0, START_NS + 30 * MS, tokens=90, has_end_token=False)
    assert (part.passes, part.at_least) == (30, 30)
    quick.settle()
    assert quick.count.count == 30
    assert quick.count.confidence == 1


def test_what_the_backend_calls_drafted_is_no_pass() -> None:
    """However far apart tokens arrive, and though nobody knew that the model drafts."""
    told = counter()
    for k in range(10):
        for n in range(3):
            told.spoke(0, START_NS + (20 * k + 5 * n) * MS, is_drafted=n > 0)
            told.spoke(1, START_NS + (20 * k + 5 * n) * MS, is_drafted=n > 0)
    # The end token is of the last pass; three others of each answer were not shown.
    for item in range(2):
        part = told.ended(item, START_NS + 191 * MS, tokens=34, has_end_token=True)
        assert part.passes == 11
    told.settle()
    assert told.count.count == 11
    assert told.count.confidence == pytest.approx(31 / 34)


def test_haste_that_nobody_explains_is_no_certainty() -> None:
    """Tokens in bursts, from a model of which nobody knew that it drafts, are counted as passes, but not believed."""
    unknown = Runner(items=[Item(tokens=40) for _ in range(4)], drafted=lambda k: 1 if k == 1 else 3)
    seen = unknown.play(counter())
    assert len(unknown.passes) == 14
    assert seen.count.count >= 40
    assert seen.count.confidence == pytest.approx(14 / 40)
    # What is certain is no more than what there was.
    burst = counter()
    for k in range(10):
        for _ in range(3):
            burst.spoke(0, START_NS + 20 * k * MS)
    part = burst.ended(0, START_NS + 200 * MS, tokens=30, has_end_token=False)
    assert (part.passes, part.at_least) == (30, 10)


@pytest.mark.parametrize(("pass_ms", "confidence"), [(0.1, 1), (1.0, 1), (3.0, 1), (20.0, 1)])
def test_passes_that_are_just_quick_are_certain(pass_ms: float, confidence: float) -> None:
    """A runner that is quicker than a burst has no pauses between: what comes in haste are its passes."""
    runner = Runner(items=[Item(tokens=200) for _ in range(4)], pass_ms=pass_ms, stamp_ms=0.01, way_ms=0.01)
    assert runner.play(counter()).count.confidence == confidence


def test_cut_answers_count_as_far_as_they_were_seen() -> None:
    """An answer that broke off has no count of its own: what was seen of it counts, nothing is imputed."""
    items = [
        Item(tokens=50),
        Item(tokens=50, cut_after=20, shown=lambda k: k % 2 == 0),
        Item(tokens=30, cut_after=10),
    ]
    runner = Runner(items=items)
    seen = runner.play(counter())
    assert is_near(seen.count.count, 50)
    assert seen.count.imputed_share == 0
    assert seen.count.confidence == 1
    assert sum(1 in one.members for one in seen.passes(0, 100)) == 10


def test_next_attempt_counts_as_well() -> None:
    """An item that was cut and is tried again takes part in the passes of both attempts."""
    twice = counter()
    for k in range(5):
        twice.spoke(3, START_NS + 20 * k * MS)
    assert twice.ended(3, START_NS + 100 * MS, tokens=None, has_end_token=False).shared_with == 0
    for k in range(8):
        twice.spoke(3, START_NS + (1000 + 20 * k) * MS)
    twice.ended(3, START_NS + 1160 * MS, tokens=8, has_end_token=False)
    twice.settle()
    assert twice.count.count == 13


def test_items_that_said_nothing_are_no_pass() -> None:
    """An embedding, or an answer that broke off before its first token, has no passes and shared with nobody."""
    silent = counter()
    assert silent.ended(0, START_NS, tokens=0, has_end_token=False).shared_with == 0
    assert silent.ended(1, START_NS, tokens=None, has_end_token=False).shared_with == 0
    silent.settle()
    assert silent.count.count == 0


def test_more_arrivals_than_tokens_is_no_doubt() -> None:
    """A backend that counts fewer tokens than it showed adds nothing, and confidence stays a share."""
    generous = counter()
    for k in range(10):
        generous.spoke(0, START_NS + 20 * k * MS)
    generous.ended(0, START_NS + 200 * MS, tokens=8, has_end_token=True)
    generous.settle()
    assert generous.count.count == 10
    assert generous.count.confidence == 1
    assert generous.count.imputed_share == 0


# -- Who shared with whom ----------------------------------------------------------------------------------------


def test_tells_how_many_others_spoke_meanwhile() -> None:
    """The answer to an item's end is how many others spoke while it did, whether they ended before or after it."""
    three = counter()
    three.spoke(0, START_NS)
    three.spoke(1, START_NS)
    assert three.ended(1, START_NS + MS, tokens=1, has_end_token=False).shared_with == 1
    three.spoke(2, START_NS + 20 * MS)
    assert three.ended(2, START_NS + 21 * MS, tokens=1, has_end_token=False).shared_with == 1
    assert three.ended(0, START_NS + 22 * MS, tokens=None, has_end_token=False).shared_with == 2


# -- The map -----------------------------------------------------------------------------------------------------


def test_map_is_right() -> None:
    """Nearly every pass of a mixed batch names its true members."""
    runner = Runner(items=[Item(tokens=n) for n in lengths(random.Random(11), 30)], slots=4)
    passes = runner.play(counter()).passes(0, 100_000)
    assert is_near(len(passes), len(runner.passes))
    seen = sum(len(one.members) for one in passes)
    assert seen == sum(len(members) for members in runner.passes)
    right = sum(set(one.members) == truth for one, truth in zip(passes, runner.passes, strict=False))
    assert right >= 0.9 * len(passes)
    for one in passes:
        assert len(set(one.members)) == len(one.members)


def test_pages_are_the_map() -> None:
    """Pages of any size, put together, are the whole map, numbered without gaps."""
    seen = Runner(items=[Item(tokens=30) for _ in range(4)]).play(counter())
    whole = seen.passes(0, 10_000)
    assert [one.number for one in whole] == list(range(30))
    pages = [one for start in range(0, 30, 7) for one in seen.passes(start, 7)]
    assert pages == whole
    assert seen.passes(30, 10) == []
    assert seen.passes(0, 0) == []


def test_pages_while_it_counts() -> None:
    """The map can be read while items speak: what is there never has more passes than are counted."""
    live = counter()
    for k in range(50):
        for item in range(3):
            live.spoke(item, START_NS + 20 * k * MS + item)
        assert len(live.passes(0, 1000)) == live.count.count <= k + 1
    assert live.count.count >= 50 - 2 * REORDER_NS // (20 * MS) - 1
    live.settle()
    assert live.count.count == 50


def test_map_has_an_end() -> None:
    """Past max_participations passes are counted, but not mapped; pages pass them over."""
    runner = Runner(items=[Item(tokens=100) for _ in range(4)])
    seen = runner.play(counter(max_participations=80))
    assert seen.count.count == 100
    assert seen.unmapped == 80
    assert len(seen.passes(0, 1000)) == 20
    assert seen.passes(20, 1000) == []


def test_held_back_text_past_the_end_of_the_map_is_not_counted_twice() -> None:
    """Passes whose members are not known take silent items in, too."""

    def items() -> list[Item]:
        return [Item(tokens=200), *(Item(tokens=50, shown=lambda k: k % 5 == 0) for _ in range(9))]

    whole, cut = Runner(items=items()), Runner(items=items())
    mapped = whole.play(counter())
    unmapped = cut.play(counter(max_participations=10))
    assert unmapped.unmapped > 150
    assert is_near(mapped.count.count, 200)
    assert is_near(unmapped.count.count, 200)


def test_page_goes_on_behind_what_is_not_mapped() -> None:
    """A page is only short where the map ends, though unmapped passes lie between; numbers tell where they are."""
    mixed = counter(max_participations=3)
    # Passes 0 to 2 are mapped; then there is no room, so that the one that is imputed between them has no members.
    for k in range(3):
        mixed.spoke(0, START_NS + 40 * k * MS)
    mixed.settle()
    mixed.ended(0, START_NS + 80 * MS, tokens=4, has_end_token=False)
    mixed.settle()
    assert mixed.count.count == 4
    assert mixed.unmapped == 1
    numbers = [one.number for one in mixed.passes(0, 3)]
    assert len(numbers) == 3
    assert set(numbers) < {0, 1, 2, 3}
    assert numbers[-1] == 3


def test_next_attempt_does_not_join_a_pass_that_its_first_one_took() -> None:
    """An item that was given a pass for a silent token, and speaks again at once, begins the next pass."""
    again = counter()
    again.spoke(0, START_NS)
    again.spoke(1, START_NS)
    again.spoke(0, START_NS + 20 * MS)
    # Its second token was never shown: it is given the second pass.
    again.ended(1, START_NS + 21 * MS, tokens=2, has_end_token=False)
    again.settle()
    again.spoke(1, START_NS + 40 * MS)
    again.settle()
    assert [sorted(one.members) for one in again.passes(0, 10)] == [[0, 1], [0, 1], [1]]


def test_passes_that_nobody_saw_are_over_when_somebody_speaks() -> None:
    """Who speaks after passes were added behind the last one that was seen, joins none of these."""
    gap = counter()
    gap.spoke(0, START_NS)
    gap.ended(0, START_NS + 100 * MS, tokens=5, has_end_token=False)
    gap.settle()
    gap.spoke(1, START_NS + 100 * MS)
    gap.spoke(1, START_NS + 50 * MS)
    gap.settle()
    passes = gap.passes(0, 10)
    assert [one.members for one in passes] == [(0,)] * 5 + [(1,)] * 2
    assert [one.at_ns for one in passes] == sorted(one.at_ns for one in passes)


# -- For any events ----------------------------------------------------------------------------------------------


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 2000),
        st.sampled_from(["spoke"] * 6 + ["ended", "cut"]),
        st.integers(0, 40),
        st.booleans(),
    ),
    max_size=120,
)


@given(events=EVENTS, drafts=st.booleans(), room=st.sampled_from([0, 5, 1000]))
def test_count_lies_between_what_must_and_what_can_be(
    events: Iterable[tuple[int, int, str, int, bool]], room: int, *, drafts: bool
) -> None:
    """Never fewer passes than one item's arrivals (drafts aside), never more than all arrivals and imputed tokens."""
    any_counter = counter(drafted=2 * drafts, max_participations=room)
    arrivals = [0] * 5
    missing = ends = 0
    in_attempt = [0] * 5
    for item, at_ms, what, tokens, has_end_token in events:
        at_ns = START_NS + at_ms * MS
        if what == "spoke":
            any_counter.spoke(item, at_ns)
            arrivals[item] += 1
            in_attempt[item] += 1
        else:
            told = tokens if what == "ended" else None
            part = any_counter.ended(item, at_ns, tokens=told, has_end_token=has_end_token, eval_s=0.1)
            assert part.shared_with >= 0
            assert part.passes is None or 0 <= (part.at_least or 0) <= part.passes
            if told:
                ends += has_end_token
                missing += max(0, told - in_attempt[item])
            in_attempt[item] = 0
    any_counter.settle()
    count = any_counter.count
    assert count.count <= sum(arrivals) + ends + missing
    if not drafts:
        assert count.count >= max(arrivals)
    assert 0 <= count.imputed_share <= 1
    assert 0 <= count.confidence <= 1
    passes = any_counter.passes(0, 100_000)
    assert len(passes) + any_counter.unmapped == count.count
    assert [one.number for one in passes] == sorted({one.number for one in passes})
    assert [one.at_ns for one in passes] == sorted(one.at_ns for one in passes)
    assert all(len(set(one.members)) == len(one.members) for one in passes)


# -- Cost --------------------------------------------------------------------------------------------------------


def test_a_token_costs_microseconds() -> None:
    """Counting is far cheaper than reading a token from a socket: 30 µs each."""
    fast = counter()
    tokens = 60_000
    began = time.perf_counter()
    for k in range(tokens // 8):
        for item in range(8):
            fast.spoke(item, START_NS + 10 * k * MS + item)
    fast.settle()
    assert (time.perf_counter() - began) / tokens < 15e-6
    assert fast.count.count == tokens // 8


def test_the_passes_of_this_moment_need_not_wait_for_stragglers() -> None:
    """A figure for people who watch includes tokens that are not sorted in yet, and is the count in the end."""
    counted = PassCounter(PassMethod.CREATED_AT)
    assert counted.so_far == 0
    for token in range(5):
        for item in range(3):
            counted.spoke(item, 1_000_000_000 + token * 10_000_000)
        assert counted.so_far == token + 1
    counted.settle()
    assert counted.so_far == counted.count.count == 5


def test_a_pass_has_no_more_members_than_slots() -> None:
    """At the border of two waves nobody repeats; the number of slots, where it is known, tells the passes apart."""
    for slots, passes in ((2, 4), (0, 3)):
        counted = PassCounter(PassMethod.CREATED_AT)
        counted.slots = slots
        for token, items in enumerate(((0, 1), (0, 1), (2, 3), (2, 3))):
            for item in items:
                counted.spoke(item, 1_000_000_000 + token * 1_000_000)
        counted.settle()
        assert counted.count.count == passes
        assert max(len(one.members) for one in counted.passes(0, 10)) == (2 if slots else 4)


def test_a_backend_that_tells_absurd_numbers_costs_nothing() -> None:
    """Tokens that could not have been made in the time are not believed: a wrong number stops nobody."""
    counted = PassCounter(PassMethod.CREATED_AT)
    counted.spoke(0, 1_000_000_000)
    _ = counted.ended(0, 2_000_000_000, tokens=10**12, has_end_token=False, eval_s=1e9)
    counted.settle()
    assert counted.count.count <= MAX_IMPUTED + 1
    assert counted.count.confidence < 0.001
