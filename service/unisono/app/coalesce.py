"""Embedding items as one request: to the driver a bundle is one item; its members are told what happens to it.

Theory of operation. Items that are submitted together are put into bundles (`core/bundles.py`), each with a ticket of
its own. What the driver says of that ticket goes on to each member that has not ended: headers come from the first,
the answer is dealt out, and an end ends all of them, unless one text may be at fault: then the halves are submitted
anew. A member that is cancelled, or whose queue_timeout is over, ends here and is told nothing more; the request is
broken off when none is left.

Single callers (`Infer`) that ask a runner for the same share a coalescer, which outlives their batches: what they
submit is gathered first, until `core/window.py` lets it go. What concerns one of them, such as its cancel or its
deadline, ends its own item alone.

Prices of this:

1. A batch's bundles are made when its items are submitted. A stream that releases few at a time sends small ones, and
   what waits in the queue is not put together later.
2. A member that ends in the queue leaves its texts in the request.
3. To the schedule a bundle is one item: max_concurrency, the shares between batches, and `others` of a wave count it
   once. Only items_per_second does not allow it: such a batch's items go one by one.
4. Halves go behind what waits already.
5. A bundle of several callers goes on the first one's account, and in its trace.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from unisono.app.sink import Sink
from unisono.app.timers import Timers
from unisono.core.bundles import MOST_TEXTS, Standing, bundled, dealt, merged
from unisono.core.commands import End, Retry
from unisono.core.errors import QueueTimeoutError
from unisono.core.model import EmbedRequest, ItemState
from unisono.core.window import bundle_goes_s

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from unisono.app.driver import BackendDriver
    from unisono.app.ports import Clock, LoadOutcome, Relay, ReleaseTimes
    from unisono.app.sink import Departure
    from unisono.core.commands import Work
    from unisono.core.errors import UnisonoError
    from unisono.core.model import Finished, Item, RunnerSpec, Spoke
    from unisono.core.window import WindowSettings

# A timer a hair too early must not spin the loop.
_SHORTEST_S = 0.001


class Members(Sink, Protocol):
    """Whose items they are, all of one batch: told what happens to each."""

    def item_bundled(self, ticket: int, size: int) -> None:
        """From now on its request holds so many items, itself included."""
        ...


@dataclass(frozen=True, slots=True)
class _Member:
    """An item, and whom to tell of it."""

    work: Work
    item: Item
    teller: Members


@dataclass(slots=True, eq=False)
class _Bundle:
    """Items in one request, from their submission until it has ended."""

    ticket: int
    # In the order of their texts in the request, those that have ended since included.
    members: Sequence[_Member]
    standing: Standing
    # For those that have not ended, in their order, whom to tell.
    alive: dict[int, Members] = field(default_factory=dict)
    # Times that the members were released, in this bundle or earlier ones; of these, broken off for another's sake.
    releases: int = 0
    disturbed: int = 0
    is_flying: bool = False
    # Its members are being ended from outside: it is not divided any more.
    is_stopped: bool = False

    def work(self) -> Work:
        """What the conductor is told. Limits of the members that are not all alike are kept here, not there."""
        first = self.members[0].work
        return replace(
            first,
            ticket=self.ticket,
            speak_by_s=None,
            # A single caller's batch sees to its deadline itself, and its company was waited for here.
            end_by_s=None if first.is_single else first.end_by_s,
            is_single=False,
            max_attempts=self.standing.attempts_left(len(self.members)),
            prompt_bytes=sum(member.work.prompt_bytes for member in self.members),
        )


class Coalescer:
    """The way of items to one runner, as bundles: those of one batch's group, or of single callers.

    It is a `sink.Sink`.
    """

    def __init__(
        self,
        *,
        driver: BackendDriver,
        runner: RunnerSpec,
        clock: Clock,
        tickets: Iterator[int],
        report_defect: Callable[[str, BaseException], None],
        window: WindowSettings | None = None,
        on_empty: Callable[[], object] = lambda: None,
    ) -> None:
        """`tickets`: names at the driver that nobody else has. `window`: how items are gathered; None: not at all.

        `on_empty` is called whenever all items have ended.
        """
        self._driver = driver
        self._runner = runner
        self._clock = clock
        self._tickets = tickets
        self._report_defect = report_defect
        self._window = window
        self._on_empty = on_empty
        self._keep_alive_s: float | None = None
        # Those that are being gathered, by ticket; since when, and as what they were planned.
        self._gathered: dict[int, _Member] = {}
        self._since_s = 0.0
        self._is_loaded = True
        self._context_tokens = 0
        # By their own tickets; and by those of the members that have not ended.
        self._bundles: dict[int, _Bundle] = {}
        self._bundle_of: dict[int, _Bundle] = {}
        # (when its queue_timeout is over, member); those that have ended are passed over.
        self._limits: list[tuple[float, int]] = []
        self._timers = Timers()

    # -- For the batch -------------------------------------------------------------------------------------

    def submit(
        self,
        teller: Members,
        works: Sequence[tuple[Work, Item]],
        *,
        is_loaded: bool,
        keep_alive_s: float | None,
        context_tokens: int,
    ) -> None:
        """Items want to be run; `teller` is told of them."""
        self._keep_alive_s = keep_alive_s
        for work, _ in works:
            if work.speak_by_s is not None:
                heapq.heappush(self._limits, (work.speak_by_s, work.ticket))
        members = [_Member(work, item, teller) for work, item in works]
        if self._window is None:
            self._send_bundled(members, is_loaded=is_loaded, context_tokens=context_tokens)
        else:
            if not self._gathered:
                self._since_s, self._is_loaded, self._context_tokens = self._clock.monotonic_s(), True, 0
            self._gathered |= {member.work.ticket: member for member in members}
            self._is_loaded &= is_loaded
            self._context_tokens = max(self._context_tokens, context_tokens)
            self._close_window(self._window)
        self._set_timer()

    def end(self, tickets: Iterable[int], state: ItemState, error: UnisonoError) -> list[int]:
        """These members end now; answers with what the driver must end for that: bundles of which nobody is left."""
        by_bundle: dict[_Bundle, list[int]] = {}
        for ticket in tickets:
            gathered = self._gathered.pop(ticket, None)
            if gathered is not None:
                self._tell_end(gathered.teller, End(ticket=ticket, state=state, attempts=0, error=error))
            bundle = self._bundle_of.get(ticket)
            if bundle is not None:
                by_bundle.setdefault(bundle, []).append(ticket)
        at_driver: list[int] = []
        for bundle, theirs in by_bundle.items():
            if len(theirs) < len(bundle.alive):
                for ticket in theirs:
                    self._end(bundle, ticket, state, error)
                if bundle.alive:
                    continue
            # All that are left: the end of the bundle will be theirs.
            bundle.is_stopped = True
            at_driver.append(bundle.ticket)
        return at_driver

    # -- What the driver tells (Sink) ----------------------------------------------------------------------

    def relay_of(self, ticket: int) -> Relay | None:
        """See Sink: none of these is sent as it came."""
        del ticket
        return None

    def item_staging(self, ticket: int, attempt: int) -> Mapping[str, str]:
        """See Sink. The request is part of the first member's trace; the others' say that they were bundled."""
        bundle = self._bundles[ticket]
        attempt = bundle.releases + 1
        headers = [teller.item_staging(member, attempt) for member, teller in bundle.alive.items()]
        return headers[0] if headers else {}

    def item_staged(self, ticket: int) -> None:
        """See Sink."""
        for member, teller in self._bundles[ticket].alive.items():
            teller.item_staged(member)

    def item_released(self, ticket: int, departure: Departure) -> None:
        """See Sink."""
        bundle = self._bundles[ticket]
        bundle.releases += 1
        bundle.is_flying = True
        for member, teller in bundle.alive.items():
            teller.item_released(member, departure)

    def wave_released(self, tickets: Sequence[int], others: int, times: ReleaseTimes, wave_key: int) -> None:
        """See Sink."""
        by_teller: dict[Members, list[int]] = {}
        for ticket in tickets:
            for member, teller in self._bundles[ticket].alive.items():
                by_teller.setdefault(teller, []).append(member)
        total = sum(map(len, by_teller.values()))
        for teller, theirs in by_teller.items():
            teller.wave_released(theirs, others + total - len(theirs), times, wave_key)
        self._look()

    def item_spoke(self, ticket: int, piece: Spoke) -> bool:
        """See Sink: an embedding says nothing before it is whole."""
        del ticket, piece
        return False

    def item_finished(self, ticket: int, answer: Finished) -> None:
        """See Sink."""
        bundle = self._bundles[ticket]
        answers = dealt(answer, [member.item for member in bundle.members])
        for member, own in zip(bundle.members, answers, strict=True):
            if member.work.ticket in bundle.alive:
                member.teller.item_finished(member.work.ticket, own)

    def item_retried(self, word: Retry) -> None:
        """See Sink."""
        bundle = self._bundles[word.ticket]
        bundle.is_flying = False
        if word.is_free:
            bundle.disturbed += 1
        else:
            bundle.standing = replace(bundle.standing, charged=bundle.standing.charged + 1)
        for member, teller in bundle.alive.items():
            teller.item_retried(replace(word, ticket=member, attempt=max(1, bundle.releases)))

    def item_ended(self, end: End) -> None:
        """See Sink.

        1. It failed, and that may be one text's doing: it is divided. Where it was refused before it was sent, it is
           not: by then nobody has looked at the texts.
        2. Otherwise what is left of it ends as it did.
        """
        bundle = self._bundles.pop(end.ticket)
        may_be_one = end.state is ItemState.FAILED and bundle.is_flying and not bundle.is_stopped
        # Also where one is left: it may have been the text of another, which has ended since.
        if may_be_one and end.error is not None and len(bundle.members) > 1:
            standing = bundle.standing.after(end.error)
            if standing is not None:
                self._divide(bundle, standing, end.error)
                return
        for member in list(bundle.alive):
            self._end(bundle, member, end.state, end.error)
        self._look()

    def runner_loading(self) -> None:
        """See Sink."""
        for teller in self._tellers():
            teller.runner_loading()

    def runner_loaded(self, started_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None) -> None:
        """See Sink."""
        for teller in self._tellers():
            teller.runner_loaded(started_ns, outcome, error)

    # -- Steps ---------------------------------------------------------------------------------------------

    def _tellers(self) -> list[Members]:
        """All whose items have not ended."""
        found = [bundle.alive[ticket] for ticket, bundle in self._bundle_of.items()]
        return list(dict.fromkeys((*found, *(member.teller for member in self._gathered.values()))))

    def _look(self) -> None:
        """Those who are gathered may have waited for what just happened."""
        if self._window is not None:
            self._close_window(self._window)

    def _close_window(self, window: WindowSettings) -> None:
        """Sends those who were gathered, if they may go; else now or later they may."""
        self._timers.stop("window")
        if not self._gathered:
            return
        # One that is to be tried again holds nobody up.
        gone = [bundle.releases > 0 for bundle in self._bundles.values()]
        goes_s = bundle_goes_s(
            window,
            texts=sum(_texts(member.item) for member in self._gathered.values()),
            most_texts=MOST_TEXTS,
            since_s=self._since_s,
            has_waiting=not all(gone),
            has_flying=any(gone),
        )
        if goes_s is None:
            return
        left_s = goes_s - self._clock.monotonic_s()
        if left_s > 0:
            self._timers.start("window", max(_SHORTEST_S, left_s), self._look)
            return
        members, self._gathered = list(self._gathered.values()), {}
        self._send_bundled(members, is_loaded=self._is_loaded, context_tokens=self._context_tokens)

    def _send_bundled(self, members: Sequence[_Member], *, is_loaded: bool, context_tokens: int) -> None:
        # A rate is asked for so that the backend is not given more at a time.
        has_rate = any(one.work.terms is not None and one.work.terms.items_per_second is not None for one in members)
        places = bundled([one.item for one in members], most_texts=1 if has_rate else MOST_TEXTS)
        bundles = [[members[place] for place in theirs] for theirs in places]
        self._send(
            [
                _Bundle(next(self._tickets), theirs, Standing(max_attempts=theirs[0].work.max_attempts))
                for theirs in bundles
            ],
            is_loaded=is_loaded,
            context_tokens=context_tokens,
        )

    def _send(self, bundles: Sequence[_Bundle], *, is_loaded: bool, context_tokens: int = 0) -> None:
        sent: list[tuple[Work, Item]] = []
        for bundle in bundles:
            bundle.alive = {member.work.ticket: member.teller for member in bundle.members}
            self._bundles[bundle.ticket] = bundle
            for member in bundle.members:
                self._bundle_of[member.work.ticket] = bundle
                member.teller.item_bundled(member.work.ticket, len(bundle.members))
            sent.append((bundle.work(), merged([member.item for member in bundle.members])))
        self._driver.submit(
            self._runner,
            sent,
            self,
            is_loaded=is_loaded,
            keep_alive_s=self._keep_alive_s,
            context_tokens=context_tokens,
        )

    def _divide(self, bundle: _Bundle, standing: Standing, error: UnisonoError) -> None:
        """Sends each half of it as a bundle of its own; the attempt that failed is charged to nobody."""
        for ticket, teller in bundle.alive.items():
            teller.item_retried(
                Retry(ticket=ticket, attempt=bundle.releases, error=error, again_in_s=0.0, is_free=True)
            )
        left = [member for member in bundle.members if member.work.ticket in bundle.alive]
        middle = (len(left) + 1) // 2
        halves = [
            _Bundle(next(self._tickets), half, standing, releases=bundle.releases, disturbed=bundle.disturbed + 1)
            for half in (left[:middle], left[middle:])
            if half
        ]
        # Suspects may have ended the runner; a backend that refused them has it.
        self._send(halves, is_loaded=not standing.is_suspect)

    def _end(self, bundle: _Bundle, ticket: int, state: ItemState, error: UnisonoError | None) -> None:
        """A member ends, if it has not yet: the end of another can have ended it."""
        if ticket not in bundle.alive:
            return
        teller = bundle.alive.pop(ticket)
        del self._bundle_of[ticket]
        end = End(
            ticket=ticket,
            state=state,
            attempts=bundle.releases - bundle.disturbed,
            error=error,
            disturbed=bundle.disturbed,
        )
        self._tell_end(teller, end)

    def _tell_end(self, teller: Members, end: End) -> None:
        if not self._bundle_of and not self._gathered:
            self._limits.clear()
            self._timers.stop_all()
            self._on_empty()
        try:
            teller.item_ended(end)
        except Exception as defect:  # noqa: BLE001 - the members behind it would wait for their end for ever
            self._report_defect("the end of an item of a bundle", defect)

    # -- Limits of single members --------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._limits:
            delay_s = max(_SHORTEST_S, self._limits[0][0] - self._clock.monotonic_s())
            self._timers.start("queue", delay_s, self._expire)

    def _expire(self) -> None:
        """Ends whose queue_timeout is over. An embedding has said nothing until it has ended."""
        now, late = self._clock.monotonic_s(), []
        while self._limits and self._limits[0][0] <= now:
            late.append(heapq.heappop(self._limits)[1])
        error = QueueTimeoutError("had not been answered anything in time (queue_timeout)")
        self._driver.end(self.end(late, ItemState.EXPIRED, error), ItemState.EXPIRED, error)
        self._set_timer()


class Company:
    """The coalescers that single callers share."""

    def __init__(self, window: WindowSettings) -> None:
        self._window = window
        self._coalescers: dict[Hashable, Coalescer] = {}

    def of(self, alike: Hashable, make: Callable[..., Coalescer]) -> Coalescer:
        """The one of callers that are alike in this, made if need be; each his own where nobody is gathered."""
        if not self._window.window_s > 0:
            return make()
        found = self._coalescers.get(alike)
        if found is None:
            forget = partial(self._coalescers.pop, alike, None)
            found = self._coalescers[alike] = make(window=self._window, on_empty=forget)
        return found


def _texts(item: Item) -> int:
    return len(item.request.input) if isinstance(item.request, EmbedRequest) else 1
