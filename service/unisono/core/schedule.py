"""Who sits where, and who is next: the lanes of a runner, filled from what waits.

Theory of operation. Seats (`seats.py`) are decided for lanes that are free: they go as soon as they are staged. And
beforehand for lanes that are taken, so that the successor is staged when the lane falls free. A decision that has not
gone yet is taken back and made anew whenever something happens that may change it, since by then another item may be
the right one.

Where it does not matter which item gets which slot, one more than the slots may stand *at the door*: it sits down in
the moment in which a slot falls free. So may one for each item that is about to reach its num_predict.

Requests of single callers are *gathered* first: until there are as many as lanes, or for some milliseconds.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

from unisono.core.choice import Choice, Look, choose
from unisono.core.commands import ReleaseReason
from unisono.core.costs import CostMeter
from unisono.core.idle import IdleReason
from unisono.core.lanes import Lanes
from unisono.core.returns import Returns
from unisono.core.seats import Seats
from unisono.core.suspects import Suspects
from unisono.core.waiting import WaitingRoom
from unisono.core.window import Window

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from unisono.core.capacity import Capacity
    from unisono.core.lanes import Lane
    from unisono.core.seats import Seat
    from unisono.core.waiting import Batch, Waiting
    from unisono.core.window import WindowSettings


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
        self._returns = Returns()
        self._seats = Seats(self.room, self._lanes, self.meter)
        # Whether something has happened since the last plan.
        self._is_stale = True
        # When the limits of some batch let it go on; None: none of them waits for the time.
        self._due_s: float | None = None

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def has_waiting(self) -> bool:
        """Whether anything waits that may go, now or soon."""
        if len(self._window) or self._seats.decided:
            return True
        return any(batch.waiting and not batch.is_parked for batch in self.room.batches.values())

    @property
    def flying(self) -> int:
        """Items at the backend."""
        return self._seats.flying

    @property
    def lanes(self) -> int:
        """How many lanes there are at this moment."""
        return len(self._lanes.all)

    @property
    def most(self) -> int:
        """The most that may be at the backend at this moment: one in each lane, and who may stand at the door."""
        door = 0 if self._capacity.slots.count == 0 else max(self._seats.near_end, 1)
        return max(self._capacity.limit, len(self._lanes.all)) + door

    @property
    def idle(self) -> dict[IdleReason, int]:
        """Lanes in which nobody sits, by reason."""
        if len(self._seats.seated) == len(self._lanes.all):
            return {}
        free = [lane for lane in self._lanes.all if lane.ticket is None]
        decided = sum(1 for lane in free if lane.successor is not None)
        found = {IdleReason.REFILL: decided} if decided else {}
        if len(free) > decided:
            found[self.idle_reason] = len(free) - decided
        return found

    def is_decided(self, ticket: int) -> bool:
        """Whether it has a seat that it has not taken yet."""
        return ticket in self._seats.decided

    def next_moment(self) -> float | None:
        """When it must be looked at again, though nothing happens."""
        moments = [self._due_s] if self._due_s is not None else []
        closes_s = self._window.closes_s(has_room=self._has_room)
        if closes_s is not None:
            moments.append(closes_s)
        if self.suspects.wake is not None:
            moments.append(self.suspects.wake.until_s)
        return min(moments, default=None)

    # -- Coming and going --------------------------------------------------------------------------------------

    def add(self, item: Waiting, *, is_single: bool, now: float) -> None:
        """An item wants to be run."""
        self._is_stale = True
        if item.family not in self.room.families and (step := self._lanes.held_step(item.prefix)) is not None:
            self._returns.came(step)
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
        seat = self._seats.decided.get(ticket)
        if seat is not None:
            self._seats.undecide(seat)
        item = self.room.get(ticket)
        if item is not None:
            self.room.take(item)
        else:
            is_lane_too_many = bool(self._seats.door) and len(self._lanes.all) > self._limit
            self._seats.leave(ticket, now, is_lane_too_many=is_lane_too_many)

    def spoke(self, item: Waiting, now: float, *, is_drafted: bool = False) -> bool:
        """It got a token; `is_drafted`: see Seats.spoke. Answers whether that may decide something."""
        self._seats.spoke(item.ticket, now, is_drafted=is_drafted)
        is_cleared = item.tokens > item.fell_at and self.suspects.clear(item.ticket)
        if is_cleared or self.idle_reason is IdleReason.PREFIX_PRICE:
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
        for item in self._window.close(now, self._capacity.limit, has_room=self._has_room):
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
            return self._seats.going()
        self._is_stale, self._due_s = False, None
        self._lanes.resize(limit)
        for seat in self._to_reconsider():
            self._seats.undecide(seat)
        # Lanes that somebody was to have can go only now; then all who were to follow change places.
        before = len(self._lanes.all)
        self._lanes.resize(limit)
        if len(self._lanes.all) < before:
            for seat in self._seats.following():
                self._seats.undecide(seat)
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
            flying = self.flying + len(self._seats.going())
            allowed = self.room.allowed(now, flying, together=together)
            if isinstance(allowed, IdleReason):
                if allowed is not IdleReason.NO_ITEMS:
                    self.idle_reason = allowed
                    self._due_s = self.room.next_moment(now)
                break
            if allowed[0].terms.is_together:
                together = allowed[0].number
                if self._is_wave_full:
                    self.idle_reason = IdleReason.TOGETHER
                    break
            choice = self._decide(self._look(free[place], allowed))
            if isinstance(choice, IdleReason):
                self.idle_reason = choice
                place += 1
                continue
            if not self._has_room_for(choice.item):
                self.idle_reason = IdleReason.MEMORY
                break
            lane = self._lanes.choose(choice.item.prefix, choice.item.prompt_bytes, free)
            _ = self._seats.take(choice.item, lane, choice.reason, now)
            free.remove(lane)
            # The others may be worth another look.
            place = 0
        return self._seats.going()

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
            choice = choose(self._look(lane, allowed))
            if isinstance(choice, IdleReason):
                continue
            seats.append(self._seats.follow(choice.item, lane, choice.reason))
        return seats

    def reconsider(self) -> None:
        """Somebody new has come, or nobody may go any more: nothing is decided."""
        self._is_stale, self._due_s = True, None
        for seat in list(self._seats.decided.values()):
            self._seats.undecide(seat)

    def door(self, now: float, ready: Container[int]) -> list[Seat]:
        """Who may stand at the door now, of those that are ready.

        Where it does not matter who gets which slot: one, or as many as are about to end. Whoever sits in a lane that
        is tried beside the slots stands there already. Nobody goes before who is next, and is still being made ready.
        """
        if self._is_apart or self._capacity.slots.count == 0:
            return []
        if len(self._seats.seated) < len(self._lanes.all):
            return []
        if not self._does_any_do:
            # Whoever stands at the door gets the first slot that falls free, whatever that slot holds.
            return []
        tried = max(0, len(self._lanes.all) - self._capacity.slots.count)
        count = max(self._seats.near_end, 1) - len(self._seats.door) - tried
        decided = sorted(self._seats.decided.values(), key=self._turn) if count > 0 else []
        seats: list[Seat] = []
        chosen: Counter[int] = Counter()
        for seat in decided:
            if len(seats) >= count:
                break
            batch = self.room.batch(seat.item.batch, seat.item.terms)
            is_free = not batch.terms.is_together and self.room.is_free(batch, now, more=chosen[batch.number])
            if is_free and not batch.seated and seat.item.ticket not in ready:
                break
            if is_free and seat.item.ticket in ready and self._has_room_for(seat.item, seats):
                seats.append(seat)
                chosen[batch.number] += 1
        return seats

    def go(self, seat: Seat, now: float) -> int | None:
        """It is released: it sits, or stands at the door. Answers with the bytes of it that its lane holds."""
        return self._seats.go(seat, now)

    # -- Inside ------------------------------------------------------------------------------------------------

    @property
    def _is_apart(self) -> bool:
        """Whether only suspects may go, or nobody until it is known who fell."""
        wake = self.suspects.wake
        return self.suspects.is_active or (wake is not None and wake.is_grave)

    @property
    def _limit(self) -> int:
        """How many lanes there may be.

        Where it matters which item gets which slot, no more are tried than are known: with more lanes than slots
        each item would take the slot of another's prefix, and nobody could say what each slot holds.
        """
        return self._capacity.limit if self._does_any_do else self._capacity.known

    @property
    def _has_room(self) -> bool:
        """Whether a slot is free, and nobody is about to take it."""
        return self.flying + len(self._seats.going()) < self._capacity.limit

    @property
    def _is_wave_full(self) -> bool:
        """Whether a wave, which has all lanes to itself, has as many items as there are slots.

        Where that is known, a lane more is not tried with it: one of its items would not be in its first pass.
        """
        slots = self._capacity.slots.count
        return 0 < slots <= len(self._seats.going())

    @property
    def _does_any_do(self) -> bool:
        """Whether it does not matter which item gets which slot: nobody waits for what only some slots hold.

        Of these, as many as are known: a lane that is tried beside them holds nothing yet.
        """
        if any(family.count > 1 and not self._lanes.is_held(family.prefix) for family in self.room.compared()):
            return False
        prefixes = {family.key: family.prefix for family in self.room.compared()}
        prefixes.update((seat.item.family, seat.item.prefix) for seat in self._seats.decided.values())
        known = self._capacity.known
        return not any(self._lanes.is_held_by_few(prefix, known) for prefix in prefixes.values())

    def _turn(self, seat: Seat) -> tuple[object, ...]:
        """Where it stands among those that are decided: by its batch's turn, then by its length."""
        batch = self.room.batch(seat.item.batch, seat.item.terms)
        return -batch.terms.priority, self.room.turn(batch), -seat.item.length, seat.item.rank

    def _to_reconsider(self) -> list[Seat]:
        """Decisions that another lane's falling free may change.

        Of those who were to follow in a lane: whose own lane is free by now; the longest, and those whose turn it is,
        as many as lanes are free; of each family that free lanes hold, the longest, as many as these lanes. While
        only suspects may go: all that were about to.
        """
        if self._is_apart:
            return [seat for seat in self._seats.decided.values() if seat.lane.ticket is None]
        following = {seat.item.ticket: seat for seat in self._seats.following()}
        going = {seat.lane.number for seat in self._seats.going()}
        free = [lane for lane in self._lanes.all if lane.ticket is None and lane.number not in going]
        if not free or not following:
            return []
        found = heapq.nsmallest(len(free), following.values(), key=_rank)
        found += heapq.nsmallest(len(free), following.values(), key=self._turn)
        found += [seat for seat in following.values() if seat.lane.ticket is None]
        homes = Counter(lane.holds.key for lane in free if lane.holds is not None)
        for family, lanes in homes.items():
            found += heapq.nsmallest(lanes, (one for one in following.values() if one.item.family == family), _rank)
        return list({seat.item.ticket: seat for seat in found}.values())

    def _has_room_for(self, item: Waiting, more: Sequence[Seat] = ()) -> bool:
        """Whether its tokens fit beside those at the backend, and some more; one by itself always may."""
        if self.token_limit is None:
            return True
        is_alone = not (self.flying or self._seats.going() or more)
        return is_alone or self._seats.tokens((item, *(seat.item for seat in more))) <= self.token_limit

    def _look(self, lane: Lane, allowed: list[Batch]) -> Look:
        seats = self._seats
        return Look(lane, self._lanes, self.room, allowed, self.meter, seats.left, seats.spreading, self._returns)

    def _decide(self, look: Look) -> Choice | IdleReason:
        """Who gets a free lane, or why nobody does."""
        if not look.allowed[0].terms.is_together:
            return choose(look)
        longest = self.room.longest(look.allowed)
        return Choice(longest, ReleaseReason.TOGETHER) if longest is not None else IdleReason.TOGETHER

    def _suspects(self, now: float) -> list[Seat]:
        """Those on trial, once everybody else has ended or is cleared."""
        wake = self.suspects.wake
        on_trial, at_large = self.suspects.on_trial, self.suspects.at_large
        if (wake is not None and wake.is_grave) or any(
            ticket not in at_large for ticket in (*self._seats.seated, *self._seats.door)
        ):
            return []
        seats: list[Seat] = []
        for ticket in sorted(on_trial):
            item, free = self.room.get(ticket), self._lanes.open()
            if item is not None and free:
                lane = self._lanes.choose(item.prefix, item.prompt_bytes, free)
                seats.append(self._seats.take(item, lane, ReleaseReason.SUSPECT, now))
        return seats


def _rank(seat: Seat) -> tuple[float, int]:
    """The order in which items of one line go."""
    return -seat.item.length, seat.item.rank
