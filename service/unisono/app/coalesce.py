"""Embedding items as one request: to the driver a bundle is one item; its members are told what happens to it.

Theory of operation. Items that are submitted together are put into bundles (`core/bundles.py`), each with a ticket of
its own. What the driver says of that ticket goes on to each member that has not ended: headers come from the first,
the answer is dealt out, and an end ends all of them, unless one text may be at fault: then the halves are submitted
anew. A member that is cancelled, or whose queue_timeout is over, ends here and is told nothing more; the request is
broken off when none is left.

Prices of this:

1. Bundles are made when items are submitted. A stream that releases few at a time sends small ones, and what waits in
   the queue is not put together later.
2. A member that ends in the queue leaves its texts in the request.
3. To the schedule a bundle is one item: max_concurrency, the shares between batches, and `others` of a wave count it
   once. Only items_per_second does not allow it: such a batch's items go one by one.
4. Halves go behind what waits already.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from unisono.app.sink import Sink
from unisono.app.timers import Timers
from unisono.core.bundles import MOST_TEXTS, Standing, bundled, dealt, merged
from unisono.core.commands import End, Retry
from unisono.core.errors import QueueTimeoutError
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from unisono.app.driver import BackendDriver
    from unisono.app.ports import Clock, LoadOutcome, ReleaseTimes
    from unisono.app.sink import Departure
    from unisono.core.commands import Work
    from unisono.core.errors import UnisonoError
    from unisono.core.model import Finished, Item, RunnerSpec, Spoke

# A timer a hair too early must not spin the loop.
_SHORTEST_S = 0.001


class Members(Sink, Protocol):
    """Whoever is told what happens to the members."""

    def item_bundled(self, ticket: int, size: int) -> None:
        """From now on its request holds so many items, itself included."""
        ...


@dataclass(slots=True, eq=False)
class _Bundle:
    """Items in one request, from their submission until it has ended."""

    ticket: int
    # In the order of their texts in the request, those that have ended since included.
    works: Sequence[tuple[Work, Item]]
    standing: Standing
    # Members that have not ended, in their order.
    alive: dict[int, None] = field(default_factory=dict)
    # Times that the members were released, in this bundle or earlier ones; of these, broken off for another's sake.
    releases: int = 0
    disturbed: int = 0
    is_flying: bool = False
    # Its members are being ended from outside: it is not divided any more.
    is_stopped: bool = False

    def work(self) -> Work:
        """What the conductor is told. Limits of the members that are not all alike are kept here, not there."""
        first, _ = self.works[0]
        return replace(
            first,
            ticket=self.ticket,
            speak_by_s=None,
            max_attempts=self.standing.attempts_left(len(self.works)),
            prompt_bytes=sum(work.prompt_bytes for work, _ in self.works),
        )


class Coalescer:
    """The way of one group's items to the driver, as bundles. It is a `sink.Sink`."""

    def __init__(
        self,
        members: Members,
        *,
        driver: BackendDriver,
        runner: RunnerSpec,
        clock: Clock,
        tickets: Iterator[int],
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        """`tickets`: names at the driver that nobody else has."""
        self._members = members
        self._driver = driver
        self._runner = runner
        self._clock = clock
        self._tickets = tickets
        self._report_defect = report_defect
        self._keep_alive_s: float | None = None
        # By their own tickets; and by those of the members that have not ended.
        self._bundles: dict[int, _Bundle] = {}
        self._bundle_of: dict[int, _Bundle] = {}
        # (when its queue_timeout is over, member); those that have ended are passed over.
        self._limits: list[tuple[float, int]] = []
        self._timers = Timers()

    # -- For the batch -------------------------------------------------------------------------------------

    def submit(
        self,
        works: Sequence[tuple[Work, Item]],
        *,
        is_loaded: bool,
        keep_alive_s: float | None,
        context_tokens: int,
    ) -> None:
        """Items want to be run."""
        self._keep_alive_s = keep_alive_s
        for work, _ in works:
            if work.speak_by_s is not None:
                heapq.heappush(self._limits, (work.speak_by_s, work.ticket))
        # A rate is asked for so that the backend is not given more at a time.
        has_rate = any(work.terms is not None and work.terms.items_per_second is not None for work, _ in works)
        places = bundled([item for _, item in works], most_texts=1 if has_rate else MOST_TEXTS)
        bundles = [[works[place] for place in theirs] for theirs in places]
        standings = [Standing(max_attempts=theirs[0][0].max_attempts) for theirs in bundles]
        self._send(
            [
                _Bundle(next(self._tickets), theirs, standing)
                for theirs, standing in zip(bundles, standings, strict=True)
            ],
            is_loaded=is_loaded,
            context_tokens=context_tokens,
        )
        self._set_timer()

    def end(self, tickets: Iterable[int], state: ItemState, error: UnisonoError) -> list[int]:
        """These members end now; answers with what the driver must end for that: bundles of which nobody is left."""
        by_bundle: dict[_Bundle, list[int]] = {}
        for ticket in tickets:
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

    def item_staging(self, ticket: int, attempt: int) -> Mapping[str, str]:
        """See Sink. The request is part of the first member's trace; the others' say that they were bundled."""
        bundle = self._bundles[ticket]
        attempt = bundle.releases + 1
        headers = [self._members.item_staging(member, attempt) for member in bundle.alive]
        return headers[0] if headers else {}

    def item_staged(self, ticket: int) -> None:
        """See Sink."""
        for member in self._bundles[ticket].alive:
            self._members.item_staged(member)

    def item_released(self, ticket: int, departure: Departure) -> None:
        """See Sink."""
        bundle = self._bundles[ticket]
        bundle.releases += 1
        bundle.is_flying = True
        for member in bundle.alive:
            self._members.item_released(member, departure)

    def wave_released(self, tickets: Sequence[int], others: int, times: ReleaseTimes, wave_key: int) -> None:
        """See Sink."""
        members = [member for ticket in tickets for member in self._bundles[ticket].alive]
        self._members.wave_released(members, others, times, wave_key)

    def item_spoke(self, ticket: int, piece: Spoke) -> None:
        """See Sink: an embedding says nothing before it is whole."""

    def item_finished(self, ticket: int, answer: Finished) -> None:
        """See Sink."""
        bundle = self._bundles[ticket]
        answers = dealt(answer, [item for _, item in bundle.works])
        for (work, _), own in zip(bundle.works, answers, strict=True):
            if work.ticket in bundle.alive:
                self._members.item_finished(work.ticket, own)

    def item_retried(self, word: Retry) -> None:
        """See Sink."""
        bundle = self._bundles[word.ticket]
        bundle.is_flying = False
        if word.is_free:
            bundle.disturbed += 1
        else:
            bundle.standing = replace(bundle.standing, charged=bundle.standing.charged + 1)
        for member in bundle.alive:
            self._members.item_retried(replace(word, ticket=member, attempt=max(1, bundle.releases)))

    def item_ended(self, end: End) -> None:
        """See Sink.

        1. It failed, and that may be one text's doing: it is divided. Where it was refused before it was sent, it is
           not: by then nobody has looked at the texts.
        2. Otherwise what is left of it ends as it did.
        """
        bundle = self._bundles.pop(end.ticket)
        may_be_one = end.state is ItemState.FAILED and bundle.is_flying and not bundle.is_stopped
        # Also where one is left: it may have been the text of another, which has ended since.
        if may_be_one and end.error is not None and len(bundle.works) > 1:
            standing = bundle.standing.after(end.error)
            if standing is not None:
                self._divide(bundle, standing, end.error)
                return
        for member in list(bundle.alive):
            self._end(bundle, member, end.state, end.error)

    def runner_loading(self) -> None:
        """See Sink."""
        self._members.runner_loading()

    def runner_loaded(self, started_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None) -> None:
        """See Sink."""
        self._members.runner_loaded(started_ns, outcome, error)

    # -- Steps ---------------------------------------------------------------------------------------------

    def _send(self, bundles: Sequence[_Bundle], *, is_loaded: bool, context_tokens: int = 0) -> None:
        sent: list[tuple[Work, Item]] = []
        for bundle in bundles:
            bundle.alive = {work.ticket: None for work, _ in bundle.works}
            self._bundles[bundle.ticket] = bundle
            for work, _ in bundle.works:
                self._bundle_of[work.ticket] = bundle
                self._members.item_bundled(work.ticket, len(bundle.works))
            sent.append((bundle.work(), merged([item for _, item in bundle.works])))
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
        for member in bundle.alive:
            self._members.item_retried(
                Retry(ticket=member, attempt=bundle.releases, error=error, again_in_s=0.0, is_free=True)
            )
        left = [(work, item) for work, item in bundle.works if work.ticket in bundle.alive]
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
        del bundle.alive[ticket], self._bundle_of[ticket]
        if not self._bundle_of:
            self._limits.clear()
            self._timers.stop_all()
        end = End(
            ticket=ticket,
            state=state,
            attempts=bundle.releases - bundle.disturbed,
            error=error,
            disturbed=bundle.disturbed,
        )
        try:
            self._members.item_ended(end)
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
