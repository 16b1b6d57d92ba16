"""Who sits where, and who is next: the lanes of a runner, filled from what waits.

Theory of operation. A *seat* is a decision: this item, into that lane, for this reason. Seats are decided for lanes
that are free (they go as soon as they are staged), and beforehand for lanes that are taken (so that the successor is
staged when the lane falls free). A decision that has not gone yet is taken back and made anew whenever something
happens that may change it, since by then another item may be the right one.

Where it does not matter which item gets which slot, one more than the slots may stand *at the door*, which is the
backend's own queue: it sits down in the moment in which a slot falls free. So may one for each item that is about
to reach its num_predict.

Requests of single callers are *gathered* first: until there are as many as lanes, or for some milliseconds.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.capacity import FIRST_LIMIT
from unisono.core.choice import Choice, Look, choose
from unisono.core.commands import ReleaseReason
from unisono.core.costs import CostMeter
from unisono.core.lanes import Lanes
from unisono.core.prefixes import common_bytes
from unisono.core.report import IdleReason
from unisono.core.suspects import Suspects
from unisono.core.waiting import WaitingRoom
from unisono.core.window import Window

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from unisono.core.capacity import Capacity
    from unisono.core.lanes import Lane
    from unisono.core.prefixes import Prefix
    from unisono.core.waiting import Waiting
    from unisono.core.window import WindowSettings


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


class Schedule:
    """The lanes of one runner and what waits for them."""

    def __init__(self, capacity: Capacity, window: WindowSettings) -> None:
        self.room = WaitingRoom()
        self.meter = CostMeter()
        self.suspects = Suspects()
        # Why lanes are idle that have no seat decided; as the last plan saw it.
        self.idle_reason = IdleReason.NO_ITEMS
        # The most tokens of prompts and answers, by estimate, that may be at the backend together; None: any number.
        self.token_limit: float | None = None
        self._capacity = capacity
        self._window = Window(window)
        self._lanes = Lanes()
        # By ticket: who sits, who stands at the door, and what was decided and has not gone.
        self._seated: dict[int, tuple[Waiting, Lane]] = {}
        self._door: dict[int, Waiting] = {}
        self._decided: dict[int, Seat] = {}
        # Of those who sit: whose prompts are being computed.
        self._prefilling: set[int] = set()
        # Whether something has happened since the last plan.
        self._is_stale = True
        # When the limits of some batch let it go on; None: none of them waits for the time.
        self._due_s: float | None = None

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def has_waiting(self) -> bool:
        """Whether anything waits that may go, now or soon."""
        if len(self._window) or self._decided:
            return True
        return any(batch.waiting and not batch.is_parked for batch in self.room.batches.values())

    @property
    def flying(self) -> int:
        """Items at the backend."""
        return len(self._seated) + len(self._door)

    @property
    def lanes(self) -> int:
        """How many lanes there are at this moment."""
        return len(self._lanes.all)

    @property
    def most(self) -> int:
        """The most that may be at the backend at this moment: one in each lane, and who may stand at the door."""
        near = sum(1 for item, _ in self._seated.values() if item.is_near_end)
        door = 0 if self._capacity.slots.count == 0 else max(near, 1)
        return max(self._capacity.limit, len(self._lanes.all)) + door

    @property
    def idle(self) -> dict[IdleReason, int]:
        """Lanes in which nobody sits, by reason."""
        free = [lane for lane in self._lanes.all if lane.ticket is None]
        decided = sum(1 for lane in free if lane.successor is not None)
        found = {IdleReason.REFILL: decided} if decided else {}
        if len(free) > decided:
            found[self.idle_reason] = len(free) - decided
        return found

    def is_decided(self, ticket: int) -> bool:
        """Whether it has a seat that it has not taken yet."""
        return ticket in self._decided

    def next_moment(self) -> float | None:
        """When it must be looked at again, though nothing happens."""
        moments = [self._due_s] if self._due_s is not None else []
        if self._window.closes_s is not None:
            moments.append(self._window.closes_s)
        if self.suspects.wake is not None:
            moments.append(self.suspects.wake.until_s)
        return min(moments, default=None)

    # -- Coming and going --------------------------------------------------------------------------------------

    def add(self, item: Waiting, *, is_single: bool, now: float) -> None:
        """An item wants to be run."""
        self._is_stale = True
        if is_single and self._window.is_on and (self.flying or self.has_waiting):
            self._window.add(item, now)
        else:
            self.room.put(item)

    def come_back(self, item: Waiting) -> None:
        """It takes its old place again: its request was closed, or it is to be tried again."""
        self._is_stale = True
        item.tokens, item.is_near_end = 0, False
        self.room.put(item)

    def drop(self, ticket: int, now: float) -> None:
        """It does not wait, sit or stand here any more."""
        self._is_stale = True
        gathered = self._window.drop(ticket)
        if gathered is not None:
            self.room.forget(self.room.batch(gathered.batch, gathered.terms))
        seat = self._decided.get(ticket)
        if seat is not None:
            self._undecide(seat)
        item = self.room.get(ticket)
        if item is not None:
            self.room.take(item)
            return
        stood = self._door.pop(ticket, None)
        if stood is not None:
            self.meter.left(ticket)
            self._count_out(stood)
        if ticket in self._seated:
            self._stand_up(ticket, now)

    def spoke(self, ticket: int, now: float) -> bool:
        """It got a token. Answers whether that may decide something."""
        is_first = ticket in self._prefilling
        if is_first:
            self._prefilling.discard(ticket)
            self.meter.prompt_done(now)
        self.meter.spoke(ticket, now)
        if self.idle_reason is IdleReason.PREFIX_PRICE:
            self._is_stale = True
            return True
        return False

    def park(self, batch: int, *, is_parked: bool) -> None:
        """Nothing of this batch is decided any more; or it is again."""
        self._is_stale = True
        parked = self.room.batch(batch)
        parked.is_parked = is_parked
        if is_parked:
            self.reconsider()
        else:
            self.room.forget(parked)

    def forget_caches(self) -> None:
        """The runner was loaded anew."""
        self._is_stale = True
        self._lanes.forget()

    # -- Who is next -------------------------------------------------------------------------------------------

    def gather(self, now: float) -> None:
        """Those who were gathered may go, if there are enough of them or it was long enough."""
        for item in self._window.close(now, self._capacity.limit):
            self._is_stale = True
            self.room.put(item)

    def plan(self, now: float) -> list[Seat]:
        """Decides for every lane that is free, and answers with all that has been decided for such.

        Who was to follow, in whatever lane, is decided anew when one falls free: one of these may be the right one
        for it, and need not wait for another.
        """
        is_due = self._due_s is not None and now >= self._due_s
        limit = self._limit
        is_same = limit == len(self._lanes.all) and not self._is_apart
        if is_same and not self._is_stale and not is_due:
            return self._to_go()
        self._is_stale, self._due_s = False, None
        self._lanes.resize(limit)
        for seat in self._to_reconsider():
            self._undecide(seat)
        # Lanes that somebody was to have can go only now; then all who were to follow change places.
        before = len(self._lanes.all)
        self._lanes.resize(limit)
        if len(self._lanes.all) < before:
            for seat in [seat for seat in self._decided.values() if not seat.counts]:
                self._undecide(seat)
        self.idle_reason = IdleReason.WINDOW if len(self._window) else IdleReason.NO_ITEMS
        if self._is_apart:
            self.idle_reason = IdleReason.SUSPECTS
            return self._suspects(now)
        together: int | None = None
        free = self._lanes.open()
        # A lane that holds what somebody waits for is filled before another could take that away.
        free.sort(key=lambda lane: lane.holds is None or lane.holds.key not in self.room.families)
        place = 0
        while place < len(free):
            # Who is about to go is as good as gone: a wave has all lanes to itself.
            flying = self.flying + sum(1 for seat in self._decided.values() if seat.counts)
            allowed = self.room.allowed(now, flying, together=together)
            if isinstance(allowed, IdleReason):
                if allowed is not IdleReason.NO_ITEMS:
                    self.idle_reason = allowed
                    self._due_s = self.room.next_moment(now)
                break
            if allowed[0].terms.is_together:
                together = allowed[0].number
            choice = self._decide(Look(free[place], self._lanes, self.room, allowed, self.meter, self._left))
            if isinstance(choice, IdleReason):
                self.idle_reason = choice
                place += 1
                continue
            if not self._has_room_for(choice.item):
                self.idle_reason = IdleReason.MEMORY
                break
            lane = self._lanes.choose(choice.item.prefix, choice.item.prompt_bytes, free)
            _ = self._take(choice.item, lane, choice.reason, now)
            free.remove(lane)
            # The others may be worth another look.
            place = 0
        return self._to_go()

    def ahead(self, now: float) -> list[Seat]:
        """Decides who follows in lanes that are taken, so that it can be made ready."""
        if self._is_apart or not len(self.room):
            return []
        seats: list[Seat] = []
        for lane in self._lanes.all:
            if lane.ticket is None or lane.successor is not None:
                continue
            allowed = self.room.allowed(now, 0, is_ahead=True)
            if isinstance(allowed, IdleReason):
                break
            choice = choose(Look(lane, self._lanes, self.room, allowed, self.meter, self._left))
            if isinstance(choice, IdleReason):
                continue
            self.room.take(choice.item)
            lane.successor = choice.item.ticket
            self._decided[choice.item.ticket] = Seat(choice.item, lane, choice.reason)
            seats.append(self._decided[choice.item.ticket])
        return seats

    def reconsider(self) -> None:
        """Somebody new has come, or nobody may go any more: nothing is decided."""
        self._is_stale, self._due_s = True, None
        for seat in list(self._decided.values()):
            self._undecide(seat)

    def door(self, now: float, ready: Container[int]) -> list[Seat]:
        """Who may stand at the door now, of those that are ready.

        Where it does not matter who gets which slot: one, or as many as are about to end.
        """
        if self._is_apart or self._capacity.slots.count == 0:
            return []
        if any(lane.ticket is None for lane in self._lanes.all):
            return []
        if not self._does_any_do:
            # Whoever stands at the door gets the first slot that falls free, whatever that slot holds.
            return []
        near = sum(1 for item, _ in self._seated.values() if item.is_near_end)
        count = max(near, 1) - len(self._door)
        decided = [self._decided[lane.successor] for lane in self._lanes.all if lane.successor is not None]
        decided.sort(key=self._turn)
        seats: list[Seat] = []
        chosen: Counter[int] = Counter()
        for seat in decided:
            if len(seats) >= count:
                break
            batch = self.room.batch(seat.item.batch, seat.item.terms)
            is_free = not batch.terms.is_together and self.room.is_free(batch, now, more=chosen[batch.number])
            if is_free and seat.item.ticket in ready and self._has_room_for(seat.item, seats):
                seats.append(seat)
                chosen[batch.number] += 1
        return seats

    def go(self, seat: Seat, now: float) -> int | None:
        """It is released: it sits, or stands at the door. Answers with the bytes of it that its lane holds."""
        item, lane = seat.item, seat.lane
        del self._decided[item.ticket]
        self.room.served(self.room.batch(item.batch, item.terms), item.length)
        item.tokens, item.is_near_end, item.is_gathered = 0, False, False
        lane.successor = None
        if seat.counts:
            held, lane.before = lane.before, None
            return self._sit(item, lane, held, now)
        self._count_in(item, now)
        self._door[item.ticket] = item
        return None

    # -- Inside ------------------------------------------------------------------------------------------------

    @property
    def _is_apart(self) -> bool:
        """Whether only suspects may go, or nobody until it is known who fell."""
        wake = self.suspects.wake
        return self.suspects.is_active or (wake is not None and wake.is_grave)

    @property
    def _limit(self) -> int:
        """How many lanes there may be.

        Where it matters which item gets which slot, no more are tried than were seen: with more lanes than slots
        nobody could say what each slot holds.
        """
        limit, capacity = self._capacity.limit, self._capacity
        seen = max(FIRST_LIMIT, capacity.at_least)
        return limit if limit <= seen or capacity.slots.count or self._does_any_do else seen

    @property
    def _does_any_do(self) -> bool:
        """Whether it does not matter which item gets which slot: nobody waits for what only some slots hold."""
        if any(family.count > 1 and not self._lanes.is_held(family.prefix) for family in self.room.compared()):
            return False
        prefixes = [family.prefix for family in self.room.compared()]
        prefixes += [seat.item.prefix for seat in self._decided.values() if seat.item.prefix is not None]
        return not any(self._lanes.is_held(prefix) and not self._lanes.is_held_by_all(prefix) for prefix in prefixes)

    def _turn(self, seat: Seat) -> tuple[object, ...]:
        """Where it stands among those that are decided: by its batch's turn, then by its length."""
        batch = self.room.batch(seat.item.batch, seat.item.terms)
        return -batch.terms.priority, self.room.turn(batch), -seat.item.length, seat.item.rank

    def _to_reconsider(self) -> list[Seat]:
        """Decisions that another lane's falling free may change.

        Of those who were to follow in a lane: whose own lane is free by now; the longest, as many as lanes are free;
        who could go to a free lane that holds the prefix. While only suspects may go: all that were about to.
        """
        decided = self._decided.values()
        if self._is_apart:
            return [seat for seat in decided if seat.lane.ticket is None]
        following = {seat.item.ticket: seat for seat in decided if not seat.counts}
        going = {seat.lane.number for seat in decided if seat.counts}
        free = [lane for lane in self._lanes.all if lane.ticket is None and lane.number not in going]
        if not free or not following:
            return []
        found = heapq.nsmallest(len(free), following.values(), key=_rank)
        found += [seat for seat in following.values() if seat.lane.ticket is None]
        homes = {lane.holds.key for lane in free if lane.holds is not None}
        found += [seat for seat in following.values() if seat.item.family in homes]
        return list({seat.item.ticket: seat for seat in found}.values())

    def _to_go(self) -> list[Seat]:
        """What has been decided for lanes that are free."""
        return [seat for seat in self._decided.values() if seat.counts]

    def _has_room_for(self, item: Waiting, more: Iterable[Seat] = ()) -> bool:
        """Whether its tokens fit beside those at the backend, and some more; one by itself always may."""
        if self.token_limit is None:
            return True
        there = [other for other, _ in self._seated.values()]
        there += [*self._door.values(), *(seat.item for seat in self._decided.values() if seat.counts)]
        there += [seat.item for seat in more]
        tokens = sum(self.meter.tokens(other.prompt_bytes) + other.length for other in (*there, item))
        return not there or tokens <= self.token_limit

    def _left(self) -> dict[int, float]:
        """What each lane that is taken, or as good as, still has to do."""
        left = {lane.number: item.left for item, lane in self._seated.values()}
        left.update({seat.lane.number: seat.item.left for seat in self._decided.values() if seat.counts})
        return left

    def _decide(self, look: Look) -> Choice | IdleReason:
        """Who gets a free lane, or why nobody does."""
        if not look.allowed[0].terms.is_together:
            return choose(look)
        longest = self.room.longest(look.allowed)
        return Choice(longest, ReleaseReason.TOGETHER) if longest is not None else IdleReason.TOGETHER

    def _take(self, item: Waiting, lane: Lane, reason: ReleaseReason, now: float) -> Seat:
        """The item is about to sit in a lane that is free, and counts as if it did."""
        held = common_bytes(lane.holds, item.prefix)
        seat = Seat(item, lane, reason, counts=True, held_bytes=held, rate_s=self._count_in(item, now))
        self.room.take(item)
        lane.successor, lane.before = item.ticket, lane.holds
        self._lanes.hold(lane, item.prefix)
        self._decided[item.ticket] = seat
        return seat

    def _undecide(self, seat: Seat) -> None:
        """What has not gone waits again, in its old place."""
        item, lane = seat.item, seat.lane
        del self._decided[item.ticket]
        lane.successor = None
        if seat.counts:
            self._lanes.hold(lane, lane.before)
            lane.before = None
        self.room.put(item)
        if seat.counts:
            batch = self.room.batch(item.batch, item.terms)
            batch.terms.next_release_s = seat.rate_s
            self._count_out(item)

    def _count_in(self, item: Waiting, now: float) -> float:
        """It is at the backend, or as good as. Answers with what its batch's rate was before."""
        batch = self.room.batch(item.batch, item.terms)
        terms = batch.terms
        batch.seated += 1
        terms.in_flight += 1
        before = terms.next_release_s
        if terms.items_per_second is not None:
            terms.next_release_s = max(now, before) + 1 / terms.items_per_second
        return before

    def _count_out(self, item: Waiting) -> None:
        """It is not at the backend any more."""
        batch = self.room.batch(item.batch, item.terms)
        batch.seated -= 1
        batch.terms.in_flight -= 1
        self.room.forget(batch)

    def _sit(self, item: Waiting, lane: Lane, held: Prefix | None, now: float) -> int:
        known_bytes = self._lanes.sit(lane, item.ticket, item.prefix, held)
        self._seated[item.ticket] = (item, lane)
        self._prefilling.add(item.ticket)
        self.meter.prompt_begun(max(0, item.prompt_bytes - known_bytes), now)
        return known_bytes

    def _stand_up(self, ticket: int, now: float) -> None:
        """It does not sit any more; who stands at the door takes its lane."""
        item, lane = self._seated.pop(ticket)
        self._lanes.stand_up(lane)
        if ticket in self._prefilling:
            self._prefilling.discard(ticket)
            self.meter.prompt_lost()
        self.meter.left(ticket)
        self._count_out(item)
        if self._door:
            follower = self._door.pop(next(iter(self._door)))
            self._sit(follower, lane, lane.holds, now)

    def _suspects(self, now: float) -> list[Seat]:
        """Those on trial, once everybody else has ended."""
        wake = self.suspects.wake
        on_trial = self.suspects.on_trial
        if (wake is not None and wake.is_grave) or any(
            ticket not in on_trial for ticket in (*self._seated, *self._door)
        ):
            return []
        seats: list[Seat] = []
        for ticket in sorted(on_trial):
            item, free = self.room.get(ticket), self._lanes.open()
            if item is not None and free:
                lane = self._lanes.choose(item.prefix, item.prompt_bytes, free)
                seats.append(self._take(item, lane, ReleaseReason.SUSPECT, now))
        return seats


def _rank(seat: Seat) -> tuple[float, int]:
    """The order in which items of one line go."""
    return -seat.item.length, seat.item.rank
