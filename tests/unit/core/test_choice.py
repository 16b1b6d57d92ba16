"""Which item goes next into a free slot, and why; or why it is better left idle."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.unit.core.processor import family
from unisono.core.choice import JOIN_MARGIN, SETTLED_MARGIN, Choice, Look, choose
from unisono.core.commands import ReleaseReason
from unisono.core.costs import CostMeter
from unisono.core.idle import IdleReason
from unisono.core.lanes import Lanes
from unisono.core.prefixes import Prefix
from unisono.core.report import Costs
from unisono.core.returns import Returns
from unisono.core.waiting import Waiting, WaitingRoom

# 500 tokens of prompt each.
A, B, C, D = (family(key, 2_000) for key in (1, 2, 3, 4))
PASS_S = 0.020


class Known(CostMeter):
    """A meter that has learned its costs."""

    def __init__(
        self, pass_s: float | None, prompt_token_s: float | None, surprise: float, tokens_a_pass: float
    ) -> None:
        super().__init__()
        self._surprise = surprise
        self._tokens_a_pass = tokens_a_pass
        self._known = None if pass_s is None else Costs(pass_s=pass_s, token_s=0.001, prompt_token_s=prompt_token_s)

    @property
    def costs(self) -> Costs | None:
        """The costs."""
        return self._known

    @property
    def prompt_token_s(self) -> float | None:
        """That of a prompt."""
        return self._known.prompt_token_s if self._known is not None else None

    def surprise(self, family: int) -> float:
        """How much answers differ from what was expected."""
        return self._surprise

    @property
    def tokens_a_pass(self) -> float:
        """Of each item."""
        return self._tokens_a_pass


@dataclass
class Desk:
    """Lanes, by what they hold and how much they still have to do (None: free), and what waits."""

    holds: list[Prefix | None]
    left: list[float | None]
    pass_s: float | None = PASS_S
    prompt_token_s: float | None = 0.0005
    surprise: float = 0.0
    tokens_a_pass: float = 1.0
    spreading: set[int] = field(default_factory=set)
    room: WaitingRoom = field(default_factory=WaitingRoom)
    returns: Returns = field(default_factory=Returns)

    def wait(self, count: int, prefix: Prefix | None = None, length: float = 10.0, batch: int = 0) -> None:
        """So many items wait."""
        for _ in range(count):
            self.room.put(Waiting(len(self.room) + 1, batch, prefix, 2_400, None, length))

    def choose(self, lane: int, *, batches: set[int] | None = None) -> Choice | IdleReason:
        """Who goes into a lane, of those batches that may go."""
        lanes = Lanes()
        lanes.resize(len(self.holds))
        for number, (held, left) in enumerate(zip(self.holds, self.left, strict=True)):
            _ = lanes.sit(lanes.all[number], 1_000 + number, held, None)
            if left is None:
                lanes.stand_up(lanes.all[number])
        left_of = {number: left for number, left in enumerate(self.left) if left is not None}
        allowed = [each for each in self.room.batches.values() if batches is None or each.number in batches]
        meter = Known(self.pass_s, self.prompt_token_s, self.surprise, self.tokens_a_pass)
        return choose(
            Look(
                lanes.all[lane],
                lanes,
                self.room,
                allowed,
                meter,
                lambda: left_of,
                lambda: self.spreading,
                self.returns,
            )
        )

    def reason(self, lane: int) -> ReleaseReason | IdleReason:
        """Why somebody goes into a lane, or nobody does."""
        choice = self.choose(lane)
        return choice.reason if isinstance(choice, Choice) else choice

    def prefix(self, lane: int) -> Prefix | None:
        """Whose item goes into a lane."""
        choice = self.choose(lane)
        assert isinstance(choice, Choice)
        return choice.item.prefix


# -- What the lane holds -----------------------------------------------------------------------------------------


def test_what_is_held_goes_before_what_is_new() -> None:
    """The family of the lane, though there is more to do for another."""
    desk = Desk([A, None], [None, 500.0])
    desk.wait(5, A)
    desk.wait(50, B, 20.0)
    assert desk.reason(0) is ReleaseReason.PREFIX_HELD
    assert desk.prefix(0) is A


def test_the_longest_of_the_family() -> None:
    """A short one can still be put anywhere later."""
    desk = Desk([A, None], [None, 500.0])
    desk.wait(5, A, 10.0)
    desk.wait(1, A, 30.0)
    choice = desk.choose(0)
    assert isinstance(choice, Choice)
    assert choice.item.length == 30.0


def test_a_lane_goes_on_with_the_family_that_begins_most_like_its_own() -> None:
    """When its own is done: what it holds of another costs nothing, if no lane holds more of it."""
    near, nearer = Prefix(7, (1, 70), (2_000, 4_000)), Prefix(8, (1, 9, 80), (2_000, 3_000, 5_000))
    desk = Desk([Prefix(9, (1, 9), (2_000, 3_000)), None], [None, 500.0])
    desk.wait(9, near)
    desk.wait(3, nearer)
    desk.wait(9, B)
    assert desk.reason(0) is ReleaseReason.PREFIX_HELD
    assert desk.prefix(0) is nearer


def test_a_family_of_which_another_lane_holds_more_is_left_to_that_lane() -> None:
    """It is taken for what is new here, or not at all."""
    near = Prefix(7, (1, 70), (2_000, 6_000))
    desk = Desk([A, near], [None, 500.0])
    desk.wait(9, near)
    desk.wait(2, B)
    assert desk.reason(0) is ReleaseReason.NEW_FAMILY
    assert desk.prefix(0) is B


def test_families_of_batches_that_may_not_go_are_passed_over() -> None:
    """Neither held, nor new, nor joined."""
    desk = Desk([A, C], [None, 50.0])
    desk.wait(9, A, batch=0)
    desk.wait(9, Prefix(7, (1, 70), (2_000, 4_000)), batch=0)
    desk.wait(9, B, batch=0)
    desk.wait(9, C, batch=0)
    desk.wait(1, None, batch=1)
    choice = desk.choose(0, batches={1})
    assert isinstance(choice, Choice)
    assert (choice.item.batch, choice.reason) == (1, ReleaseReason.LONGEST)


def test_a_family_that_may_not_go_weighs_on_its_lane_and_is_not_joined() -> None:
    """Only what may go is helped."""
    desk = Desk([A, B, None], [50.0, 50.0, None], prompt_token_s=1e-6)
    desk.wait(20, A, batch=0)
    desk.wait(10, B, batch=1)
    choice = desk.choose(2, batches={1})
    assert choice is IdleReason.PREFIX_COST


# -- What is new -------------------------------------------------------------------------------------------------


def test_of_new_families_the_one_with_most_to_do() -> None:
    """Whatever its items' lengths."""
    desk = Desk([C, None], [300.0, None])
    desk.wait(2, A, 40.0)
    desk.wait(20, B, 10.0)
    assert desk.reason(1) is ReleaseReason.NEW_FAMILY
    assert desk.prefix(1) is B


def test_an_item_by_itself_goes_by_its_length() -> None:
    """Against a family's whole work; and one that is left of its family is no family."""
    desk = Desk([C, None], [900.0, None])
    desk.wait(1, None, 100.0)
    desk.wait(5, A, 10.0)
    assert desk.prefix(1) is None
    desk.wait(11, A, 10.0)
    assert desk.prefix(1) is A
    alone = Desk([C, None], [900.0, None])
    alone.wait(1, A, 10.0)
    assert alone.reason(1) is ReleaseReason.LONGEST


def test_little_in_common_makes_nothing_old() -> None:
    """What another lane holds of it is less than a pass is worth."""
    desk = Desk([Prefix(9, (90,), (255,)), None], [300.0, None])
    desk.wait(5, Prefix(8, (90, 91), (255, 2_000)))
    assert desk.reason(1) is ReleaseReason.NEW_FAMILY


# -- What others hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_a_pass", [1.0, 2.5])
@pytest.mark.parametrize("joins", [True, False])
def test_a_second_lane_where_it_saves_more_than_it_costs(*, joins: bool, tokens_a_pass: float) -> None:
    """Forty tokens wait behind 10: a second lane saves 20 passes of 20 ms, and costs 500 prompt tokens.

    Where a pass gives several of an item's tokens, so many fewer passes.
    """
    price = 20 / tokens_a_pass * PASS_S / 500 / JOIN_MARGIN
    prompt_token_s = price * (0.99 if joins else 1.01)
    desk = Desk([A, None], [10.0, None], prompt_token_s=prompt_token_s, tokens_a_pass=tokens_a_pass)
    desk.wait(4, A)
    assert desk.reason(1) is (ReleaseReason.JOINS_FAMILY if joins else IdleReason.PREFIX_COST)


@pytest.mark.parametrize(("pass_s", "prompt_token_s"), [(None, None), (PASS_S, None)])
def test_nobody_joins_before_the_price_is_known(pass_s: float | None, prompt_token_s: float | None) -> None:
    """The first of the family tells it."""
    desk = Desk([A, None], [100.0, None], pass_s=pass_s, prompt_token_s=prompt_token_s)
    desk.wait(40, A)
    assert desk.reason(1) is IdleReason.PREFIX_PRICE


def test_equal_families_are_helped_together() -> None:
    """Four families on eight lanes: to help one saves nothing, to help all four halves the passes."""
    desk = Desk([A, B, C, D, None, None, None, None], [10.0] * 4 + [None] * 4)
    for prefix in (A, B, C, D):
        desk.wait(10, prefix)
    # 50 passes are saved, and 2,000 prompt tokens computed.
    price = 50 * PASS_S / 2_000 / JOIN_MARGIN
    desk.prompt_token_s = 0.99 * price
    assert desk.reason(4) is ReleaseReason.JOINS_FAMILY
    desk.prompt_token_s = 1.01 * price
    assert desk.reason(4) is IdleReason.PREFIX_COST


def test_what_cannot_all_be_helped_is_not_helped() -> None:
    """With two free lanes for four equal families the passes stay what they are."""
    desk = Desk([A, B, C, D, None, None], [10.0] * 4 + [None] * 2, prompt_token_s=1e-6)
    for prefix in (A, B, C, D):
        desk.wait(10, prefix)
    assert desk.reason(4) is IdleReason.PREFIX_COST


def test_the_family_that_is_furthest_behind_is_helped_first() -> None:
    """Its lane decides how many passes there are."""
    desk = Desk([A, B, None], [10.0, 10.0, None], prompt_token_s=1e-6)
    desk.wait(10, A)
    desk.wait(40, B)
    assert desk.reason(2) is ReleaseReason.JOINS_FAMILY
    assert desk.prefix(2) is B


@pytest.mark.parametrize(("free", "reason"), [(3, IdleReason.PREFIX_COST), (4, ReleaseReason.JOINS_FAMILY)])
def test_lanes_that_save_no_round_are_not_joined(free: int, reason: ReleaseReason | IdleReason) -> None:
    """Four of equal length are left for four lanes: only with four lanes more is a whole round saved."""
    desk = Desk([A] * 4 + [None] * free, [10.0] * 4 + [None] * free, prompt_token_s=1e-6)
    desk.wait(4, A)
    assert desk.reason(4) is reason


def test_the_last_round_is_not_saved_at_any_price() -> None:
    """One of the four would gain by a lane of its own; all together they do not."""
    desk = Desk([A] * 4 + [None] * 4, [10.0] * 4 + [None] * 4, prompt_token_s=0.9 * 10 * PASS_S / 500 / JOIN_MARGIN)
    desk.wait(4, A)
    assert desk.reason(4) is IdleReason.PREFIX_COST


@pytest.mark.parametrize(
    ("margin", "is_spreading", "reason"),
    [
        (0.9 * SETTLED_MARGIN, False, IdleReason.PREFIX_COST),
        (1.1 * SETTLED_MARGIN, False, ReleaseReason.JOINS_FAMILY),
        (1.1 * JOIN_MARGIN, True, ReleaseReason.JOINS_FAMILY),
    ],
)
def test_what_was_spread_before_is_not_spread_further_for_a_little(
    margin: float, reason: ReleaseReason | IdleReason, *, is_spreading: bool
) -> None:
    """Two lanes hold it, and eight of ten tokens wait: a third lane saves a round of 10 passes, or 0.2 s."""
    desk = Desk([A, A, None], [10.0, 10.0, None], prompt_token_s=10 * PASS_S / 500 / margin)
    desk.spreading = {A.key} if is_spreading else set()
    desk.wait(6, A)
    assert desk.reason(2) is reason


def test_what_came_back_counts_again() -> None:
    """A third lane would save a third of its price with each batch: at the fifth return it is given one."""
    desk = Desk([A, A, None], [10.0, 10.0, None], prompt_token_s=3 * 10 * PASS_S / 500)
    desk.wait(6, A)
    reasons = []
    for _ in range(5):
        reasons.append(desk.reason(2))
        desk.returns.came(A.digests[-1])
    assert reasons == [IdleReason.PREFIX_COST] * 4 + [ReleaseReason.JOINS_FAMILY]


@pytest.mark.parametrize(("came", "reason"), [(B, IdleReason.PREFIX_COST), (None, ReleaseReason.JOINS_FAMILY)])
def test_nothing_is_taken_from_what_came_back_too(came: Prefix | None, reason: ReleaseReason | IdleReason) -> None:
    """On the mere hope that something comes again."""
    desk = Desk([A, A, B], [10.0, 10.0, None], prompt_token_s=3 * 10 * PASS_S / 500)
    desk.wait(6, A)
    for _ in range(9):
        desk.returns.came(A.digests[-1])
    if came is not None:
        desk.returns.came(came.digests[-1])
    assert desk.reason(2) is reason


def test_where_lengths_are_guesses_rounds_are_not_counted() -> None:
    """Answers that end where they like leave no gaps."""
    desk = Desk([A] * 4 + [None] * 3, [10.0] * 4 + [None] * 3, prompt_token_s=1e-6, surprise=0.5)
    desk.wait(4, A)
    assert desk.reason(4) is ReleaseReason.JOINS_FAMILY


def test_a_lane_with_much_else_to_do_leaves_nothing_to_save() -> None:
    """The passes are as many as the fullest lane has tokens to do."""
    desk = Desk([A, C, None], [10.0, 900.0, None], prompt_token_s=1e-6)
    desk.wait(8, A)
    assert desk.reason(2) is IdleReason.PREFIX_COST


# -- The tail ----------------------------------------------------------------------------------------------------


def test_an_item_as_long_as_the_rest_goes_first() -> None:
    """Though the lane holds another family: whatever runs beside it ends earlier."""
    desk = Desk([A, None], [None, 10.0])
    desk.wait(5, A, 10.0)
    desk.wait(1, None, 70.0)
    assert desk.reason(0) is ReleaseReason.TAIL
    assert desk.prefix(0) is None


def test_a_long_item_with_much_beside_it_is_no_tail() -> None:
    """It can wait: there is more than it to do for each lane."""
    desk = Desk([A, None], [None, 10.0])
    desk.wait(20, A, 10.0)
    desk.wait(1, None, 70.0)
    assert desk.reason(0) is ReleaseReason.PREFIX_HELD


# The lane that holds the prefix is free in 30 passes: 0.6 s; the prefix is 500 tokens.
@pytest.mark.parametrize(("pass_s", "tokens_a_pass"), [(PASS_S, 1.0), (3 * PASS_S, 3.0)])
@pytest.mark.parametrize(
    ("prompt_token_s", "reason"), [(0.00094, ReleaseReason.TAIL), (0.00098, ReleaseReason.PREFIX_HELD)]
)
def test_a_tail_whose_prefix_is_elsewhere(
    prompt_token_s: float, reason: ReleaseReason, pass_s: float, tokens_a_pass: float
) -> None:
    """It goes where it must compute its prefix, if that is quicker than to wait for the lane that holds it."""
    desk = Desk([A, B], [None, 30.0], prompt_token_s=prompt_token_s, tokens_a_pass=tokens_a_pass, pass_s=pass_s)
    desk.wait(3, A, 10.0)
    desk.wait(1, B, 70.0)
    assert desk.reason(0) is reason


@pytest.mark.parametrize(("pass_s", "prompt_token_s"), [(None, None), (PASS_S, None)])
def test_a_tail_waits_for_its_lane_while_costs_are_not_known(
    pass_s: float | None, prompt_token_s: float | None
) -> None:
    """What is held is certain."""
    desk = Desk([A, B], [None, 30.0], pass_s=pass_s, prompt_token_s=prompt_token_s)
    desk.wait(3, A, 10.0)
    desk.wait(1, B, 70.0)
    assert desk.reason(0) is ReleaseReason.PREFIX_HELD


def test_a_tail_that_is_chosen_anyway_keeps_its_reason() -> None:
    """It is of the family that the lane holds."""
    desk = Desk([A, None], [None, 10.0])
    desk.wait(1, A, 70.0)
    desk.wait(3, B, 10.0)
    assert desk.reason(0) is ReleaseReason.PREFIX_HELD
