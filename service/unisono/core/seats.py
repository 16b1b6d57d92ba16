"""Who sits in which lane, who stands at the door, and who has been given a seat and not taken it yet.

Theory of operation. A *seat* is a decision: this item, into that lane, for this reason. Whoever is given a lane that
is free counts as sitting there at once, in the lane, in its batch's shares and limits. Whoever is to follow in a lane
that is taken does not. Until it goes, a decision can be taken back, and all is as it was before.

From the release on an item sits in its lane; or, released before a lane was free, it stands at the door, which is the
backend's own queue, and sits down in the first lane that somebody leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.commands import ReleaseReason
from unisono.core.prefixes import common_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from unisono.core.costs import CostMeter
    from unisono.core.lanes import Lane, Lanes
    from unisono.core.prefixes import Prefix
    from unisono.core.waiting import Waiting, WaitingRoom


# Who goes for these reasons computes a prefix that others will find.
_COMPUTES = frozenset({ReleaseReason.NEW_FAMILY, ReleaseReason.JOINS_FAMILY})


@dataclass(slots=True, eq=False)
class Seat:
    """An item that is about to be released, or made ready for it."""

    item: Waiting
    lane: Lane
    reason: ReleaseReason
    # Whether it counts as sitting already: its lane is free.
    counts: bool = False
    # Bytes of its beginning that the lane holds.
    held_bytes: int = 0
    # When its batch's items_per_second would have let it go; what is taken back gives that back.
    rate_s: float = 0.0
    # What its batch is charged for it, in tokens.
    charge: float = 0.0


class Seats:
    """The seats of one runner."""

    def __init__(self, room: WaitingRoom, lanes: Lanes, meter: CostMeter) -> None:
        # By ticket: who sits, who stands at the door, and what was decided and has not gone.
        self.seated: dict[int, tuple[Waiting, Lane]] = {}
        self.door: dict[int, Waiting] = {}
        self.decided: dict[int, Seat] = {}
        self._room = room
        self._lanes = lanes
        self._meter = meter
        # Of those who sit: whose prompts are being computed, and whether that is for the sake of their prefix too.
        self._prefilling: dict[int, bool] = {}

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def flying(self) -> int:
        """Items at the backend."""
        return len(self.seated) + len(self.door)

    @property
    def near_end(self) -> int:
        """Of those who sit, the ones that are about to reach their num_predict."""
        return sum(1 for item, _ in self.seated.values() if item.is_near_end)

    def going(self) -> list[Seat]:
        """What has been decided for lanes that are free."""
        return [seat for seat in self.decided.values() if seat.counts]

    def following(self) -> list[Seat]:
        """What has been decided for lanes that are taken, or were when it was decided."""
        return [seat for seat in self.decided.values() if not seat.counts]

    def left(self) -> dict[int, float]:
        """For each lane that is taken, or as good as, by its number: the tokens that it still has to do."""
        left = {lane.number: item.left for item, lane in self.seated.values()}
        left.update({seat.lane.number: seat.item.left for seat in self.going()})
        return left

    def spreading(self) -> set[int]:
        """Families of which a prefix is being computed somewhere, or is about to be."""
        found = {self.seated[ticket][0].family for ticket, computes in self._prefilling.items() if computes}
        return found | {seat.item.family for seat in self.going() if seat.reason in _COMPUTES}

    def tokens(self, more: Iterable[Waiting]) -> float:
        """Of all at the backend, or as good as there, and some more: tokens of prompts and answers, by estimate."""
        there = [*(item for item, _ in self.seated.values()), *self.door.values()]
        there += [seat.item for seat in self.going()]
        return sum(self._meter.tokens(item.prompt_bytes) + item.length for item in (*there, *more))

    # -- Deciding ----------------------------------------------------------------------------------------------

    def follow(self, item: Waiting, lane: Lane, reason: ReleaseReason) -> Seat:
        """The item is to be next in a lane that is taken."""
        self._room.take(item)
        lane.successor = item.ticket
        seat = self.decided[item.ticket] = Seat(item, lane, reason)
        return seat

    def take(self, item: Waiting, lane: Lane, reason: ReleaseReason, now: float) -> Seat:
        """The item is about to sit in a lane that is free, and counts as if it did."""
        held = common_bytes(lane.holds, item.prefix)
        charge, rate_s = self._charge(item), self._count_in(item, now)
        seat = Seat(item, lane, reason, counts=True, held_bytes=held, rate_s=rate_s, charge=charge)
        self._room.promise(item, charge)
        self._room.take(item)
        lane.successor, lane.before = item.ticket, lane.holds
        self._lanes.hold(lane, item.prefix)
        self.decided[item.ticket] = seat
        return seat

    def undecide(self, seat: Seat) -> None:
        """What has not gone waits again, in its old place."""
        item, lane = seat.item, seat.lane
        del self.decided[item.ticket]
        lane.successor = None
        if seat.counts:
            self._lanes.hold(lane, lane.before)
            lane.before = None
        self._room.put(item)
        if seat.counts:
            self._room.unpromise(item, seat.charge)
            batch = self._room.batch(item.batch, item.terms)
            batch.terms.next_release_s = seat.rate_s
            self._count_out(item)

    # -- Coming and going --------------------------------------------------------------------------------------

    def go(self, seat: Seat, now: float) -> int | None:
        """It is released: it sits, or stands at the door. Answers with the bytes of it that its lane holds."""
        item, lane = seat.item, seat.lane
        del self.decided[item.ticket]
        if seat.counts:
            self._room.unpromise(item, seat.charge)
        item.charge = self._charge(item)
        self._room.charge(item, item.charge)
        self._room.compare(item.charge, item.length)
        item.tokens, item.is_near_end, item.is_gathered = 0, False, False
        lane.successor = None
        if seat.counts:
            held, lane.before = lane.before, None
            return self._sit(item, lane, held, now, computes=seat.reason in _COMPUTES)
        _ = self._count_in(item, now)
        self.door[item.ticket] = item
        return None

    def spoke(self, ticket: int, now: float, *, is_drafted: bool = False) -> None:
        """It got a token. `is_drafted`: from the pass that gave its last one."""
        if ticket in self._prefilling:
            del self._prefilling[ticket]
            self._meter.prompt_done(now)
        self._meter.spoke(ticket, now, is_drafted=is_drafted)

    def leave(self, ticket: int, now: float, *, is_lane_too_many: bool = False) -> None:
        """It neither stands nor sits any more, if it did; who stands at the door takes its lane.

        Unless that is one too many: then it was no slot, and the slot has been taken by who seemed to sit in another.
        """
        stood = self.door.pop(ticket, None)
        if stood is not None:
            self._meter.left(ticket)
            self._settle(stood)
            self._count_out(stood)
        if ticket not in self.seated:
            return
        item, lane = self.seated.pop(ticket)
        self._settle(item)
        self._lanes.stand_up(lane)
        if ticket in self._prefilling:
            del self._prefilling[ticket]
            self._meter.prompt_lost()
        self._meter.left(ticket)
        self._count_out(item)
        if self.door and not is_lane_too_many:
            follower = self.door.pop(next(iter(self.door)))
            _ = self._sit(follower, lane, lane.holds, now)

    def _sit(self, item: Waiting, lane: Lane, held: Prefix | None, now: float, *, computes: bool = False) -> int:
        known_bytes = self._lanes.sit(lane, item.ticket, item.prefix, held)
        self.seated[item.ticket] = (item, lane)
        self._prefilling[item.ticket] = computes
        self._meter.prompt_begun(max(0, item.prompt_bytes - known_bytes), now)
        return known_bytes

    def _charge(self, item: Waiting) -> float:
        """The tokens expected of it by what is known now, so that equal items cost the same, whenever they came."""
        return self._meter.expected_length(item.bound, item.family)

    def _settle(self, item: Waiting) -> None:
        """Its batch has had what it got; what said nothing was perhaps not heard, and counts as expected.

        What is expected of those that are still there may be known better now: that matters to several batches.
        """
        self._room.charge(item, -item.charge)
        self._room.served(item, float(item.tokens) or item.charge)
        item.charge = 0.0
        if len(self._room.batches) == 1:
            return
        for other in (*(one for one, _ in self.seated.values()), *self.door.values()):
            charge = max(float(other.tokens), self._charge(other))
            if charge != other.charge:
                self._room.charge(other, charge - other.charge)
                other.charge = charge

    def _count_in(self, item: Waiting, now: float) -> float:
        """It is at the backend, or as good as. Answers with what its batch's rate was before."""
        batch = self._room.batch(item.batch, item.terms)
        terms = batch.terms
        batch.seated += 1
        terms.in_flight += 1
        before = terms.next_release_s
        if terms.items_per_second is not None:
            terms.next_release_s = max(now, before) + 1 / terms.items_per_second
        return before

    def _count_out(self, item: Waiting) -> None:
        """It is not at the backend any more."""
        batch = self._room.batch(item.batch, item.terms)
        batch.seated -= 1
        batch.terms.in_flight -= 1
        self._room.forget(batch)
