"""One group of a batch on its way: the sink of its items at the driver; in the end its figures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from unisono.core.events import Loading, LoadState, Released
from unisono.core.model import RunnerOptions, SlotSource
from unisono.core.passes import PassCounter
from unisono.core.report import GroupPlanned, GroupReport, WaveReport, fewest_passes
from unisono.core.tally import ContextTally, FamilyTally, RunnerTally, one_at_a_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from unisono.app.batch_journal import BatchJournal
    from unisono.app.driver import BackendDriver
    from unisono.app.item_run import ItemRun
    from unisono.app.ports import BatchWatch, Clock, LoadOutcome, Relay, ReleaseTimes
    from unisono.app.sink import Departure
    from unisono.core.commands import End, Retry, Work
    from unisono.core.errors import UnisonoError
    from unisono.core.events import Result
    from unisono.core.model import Finished, Item, Spoke
    from unisono.core.plan import Group
    from unisono.core.prefixes import Prefix


class GroupRun:
    """A group of a running batch. It is a `sink.Sink`: what the driver tells of its items goes through here."""

    def __init__(
        self,
        number: int,
        first: Group,
        *,
        driver: BackendDriver,
        journal: BatchJournal,
        watch: BatchWatch,
        clock: Clock,
        on_result: Callable[[Result], None],
        on_load: Callable[[], None],
        relay: Relay | None = None,
    ) -> None:
        """`first`: the group as it was planned; items that are added later join it. `relay`: see RunningBatch."""
        self.number = number
        self.runner = runner = first.runner
        self.driver = driver
        self.item_count = 0
        self.counter = PassCounter(driver.backend.pass_method, drafted=first.model.drafted_with(runner.options))
        self.retries = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        # None until the backend says.
        self.cached_prompt_tokens: int | None = None
        # Arrivals, those of unfinished items included.
        self.spoken_tokens = 0
        self._first = replace(first, items=(), prefixes=())
        self._journal = journal
        self._watch = watch
        self._clock = clock
        self._on_result = on_result
        self._on_load = on_load
        self._relay = relay
        self._runs: dict[int, ItemRun] = {}
        # Those that are being taken back, by ticket; and that have been.
        self._leaving: set[int] = set()
        self._left: list[ItemRun] = []
        self._waves = 0
        self._loads = 0
        self._load_s = 0.0
        self._families = FamilyTally()
        self._context = ContextTally()
        self._seen = RunnerTally()
        # Passes that each item took part in for certain, in its last attempt that spoke, for the fewest that could
        # have done; None: not known.
        self._passes: list[int | None] = []
        # The first wave: how close together it went out, its size, who still is in it and when these spoke.
        self._first_spread_s = 0.0
        self._first_count = 0
        self._first_members: set[int] = set()
        self._first_tokens: dict[int, int] = {}

    def take(self, ticket: int, run: ItemRun, prefix: Prefix | None) -> None:
        """An item is about to be submitted under this ticket."""
        run.ticket, run.group, run.prefix = ticket, self.number, prefix
        self._families.joined(prefix)
        self._runs[ticket] = run

    def join(self, group: Group) -> None:
        """Items that were planned now belong to it. Where all others have left, it is planned anew."""
        if self.item_count == 0:
            self._first = replace(group, items=(), prefixes=())
        self.item_count += len(group.items)

    @property
    def waiting(self) -> list[ItemRun]:
        """Items that are not at the backend."""
        return [run for run in self._runs.values() if run.released_ns is None]

    def let_go(self, runs: Iterable[ItemRun]) -> None:
        """These items are about to be ended at the driver, and do not end with that: `take_left` has them then."""
        self._leaving.update(run.ticket for run in runs if run.ticket is not None)

    def take_left(self) -> list[ItemRun]:
        """Those that were let go; they are of no group now."""
        left, self._left = self._left, []
        return left

    @property
    def planned(self) -> GroupPlanned:
        """What it is at this moment."""
        state = self.driver.slot_state(self.runner, self._first.model)
        return GroupPlanned(
            group=self.number,
            runner=self.runner,
            item_count=self.item_count,
            # Nothing is said of the runner where all its items went on elsewhere.
            is_loaded=self._first.is_loaded and self.item_count > 0,
            slots=state.slots,
            state=state,
            context_reason=self._first.context_reason,
            memory=self._first.memory_with(state.fewest),
            measured_bytes=self._first.measured_bytes,
        )

    def submit(
        self,
        works: Sequence[tuple[Work, Item]],
        *,
        is_loaded: bool,
        keep_alive_s: float | None,
        context_tokens: int,
    ) -> None:
        """Sends items that were taken to the driver, one by one."""
        # What was seen in memory is told by its context alone. A request that goes as it came would load it itself.
        is_plain = self.runner.shift is None and replace(self.runner.options, num_ctx=None) == RunnerOptions()
        self.driver.submit(
            self.runner,
            works,
            self,
            is_loaded=is_loaded,
            keep_alive_s=keep_alive_s,
            context_tokens=context_tokens,
            is_sure=is_loaded and is_plain and self._relay is not None,
        )

    def item_bundled(self, ticket: int, size: int) -> None:
        """See coalesce.Members."""
        self._runs[ticket].bundle_size = size

    # -- What the driver tells (Sink) ----------------------------------------------------------------------

    def relay_of(self, ticket: int) -> Relay | None:
        """See Sink."""
        del ticket
        return self._relay

    def item_staging(self, ticket: int, attempt: int) -> Mapping[str, str]:
        """See Sink."""
        run = self._runs[ticket]
        run.start(run.earlier + attempt)
        self._first_members.discard(run.item.index)
        now_ns = self._clock.time_ns()
        return self._watch.item_staging(item=run.item, group=self.number, attempt=run.attempt, at_ns=now_ns)

    def item_staged(self, ticket: int) -> None:
        """See Sink."""
        self._watch.item_staged(index=self._runs[ticket].item.index, at_ns=self._clock.time_ns())

    def item_released(self, ticket: int, departure: Departure) -> None:
        """See Sink."""
        run = self._runs[ticket]
        run.released_ns, run.release_reason = departure.at_ns, departure.reason
        self._families.released(run.prefix, departure.held_bytes)
        self._watch.item_released(
            index=run.item.index,
            # The group's own number, which `wave_released` gives it in a moment.
            wave=self._waves,
            wave_key=departure.wave_key,
            at_ns=departure.at_ns,
            reason=departure.reason,
            lane=departure.lane,
        )

    def wave_released(self, tickets: Sequence[int], others: int, times: ReleaseTimes, wave_key: int) -> None:
        """See Sink. Refills of a single item are counted, but are no event of their own."""
        wave = self._waves
        self._waves += 1
        slots = self.driver.slots(self.runner)
        # A configured number may be smaller than the backend's own, and a remembered one an old one.
        is_sure = slots.source in (SlotSource.TOLD, SlotSource.LEARNED)
        self.counter.slots = slots.count if is_sure else 0
        self._seen.released(self.driver.figures(self.runner), times.first_ns)
        if wave == 0:
            self._first_spread_s = times.spread_s
            self._first_count = len(tickets)
            self._first_members = {self._runs[ticket].item.index for ticket in tickets}
        if wave > 0 and len(tickets) + others == 1:
            return
        self._watch.wave_released(
            group=self.number, wave=wave, wave_key=wave_key, item_count=len(tickets), others=others, times=times
        )
        event = Released(
            group=self.number, wave=wave, item_count=len(tickets), others=others, spread_s=times.spread_s
        )
        self._journal.write(event)

    def item_spoke(self, ticket: int, piece: Spoke) -> bool:
        """See Sink."""
        run = self._runs[ticket]
        index = run.item.index
        if run.first_token_ns is None:
            run.first_token_ns = self._clock.time_ns()
            self._watch.item_first_token(index=index, at_ns=run.first_token_ns)
            if index in self._first_members:
                self._first_tokens.setdefault(index, piece.at_ns)
        run.hear(piece)
        self.spoken_tokens += 1
        run.heard_ns = piece.at_ns
        is_drafted = self.counter.spoke(index, piece.at_ns, is_drafted=piece.is_drafted)
        self._journal.spoke(index)
        return is_drafted

    def item_finished(self, ticket: int, answer: Finished) -> None:
        """See Sink."""
        run = self._runs[ticket]
        run.answer = answer
        tokens, cached = answer.usage.completion_tokens, answer.usage.cached_prompt_tokens
        self.completion_tokens += tokens
        self.prompt_tokens += answer.usage.prompt_tokens
        if run.released_ns is not None:
            self._context.answered(run.released_ns, self._clock.time_ns(), answer.usage.prompt_tokens + tokens)
        if cached is not None:
            self.cached_prompt_tokens = (self.cached_prompt_tokens or 0) + cached
        run.part = self.counter.ended(
            run.item.index,
            answer.at_ns,
            tokens=tokens,
            has_end_token=answer.finish_reason_raw == "stop",
            eval_s=answer.durations.eval_s,
        )
        self._passes.append(run.part.at_least)

    def item_retried(self, word: Retry) -> None:
        """See Sink."""
        run = self._runs[word.ticket]
        self._break_off(run)
        run.released_ns = None
        self._watch.item_retried(
            index=run.item.index,
            attempt=run.earlier + word.attempt,
            error=word.error,
            again_in_s=word.again_in_s,
            is_free=word.is_free,
            at_ns=self._clock.time_ns() - round(word.ago_s * 1e9),
        )

    def item_ended(self, end: End) -> None:
        """See Sink."""
        run = self._runs.pop(end.ticket)
        if end.ticket in self._leaving:
            self._leave(run, end)
            return
        self.retries += max(0, end.attempts - 1)
        now_ns = self._clock.time_ns()
        if run.answer is None:
            self._break_off(run)
            if run.part is not None:
                self._passes.append(run.part.at_least)
        if not self._runs:
            self._seen.ended(self.driver.figures(self.runner), now_ns)
        self._on_result(
            run.result(end.state, error=end.error, attempts=end.attempts, disturbed=end.disturbed, at_ns=now_ns)
        )

    def _leave(self, run: ItemRun, end: End) -> None:
        """It goes on in another group."""
        self._leaving.discard(end.ticket)
        # Whatever follows is another attempt.
        self.retries += end.attempts
        self._break_off(run)
        if not self._runs:
            self._seen.left(self.driver.figures(self.runner), self._clock.time_ns())
        self._families.left(run.prefix)
        self.item_count -= 1
        run.leave(attempts=end.attempts, disturbed=end.disturbed)
        self._left.append(run)

    def _break_off(self, run: ItemRun) -> None:
        """Its answer is over without an end: by the backend's clock, when it last spoke."""
        if run.heard_ns is not None:
            run.part = self.counter.ended(run.item.index, run.heard_ns, tokens=None, has_end_token=False)
            run.heard_ns = None

    def runner_loading(self) -> None:
        """See Sink. That a runner in memory is asked whether it is there is no event."""
        if not self._first.is_loaded:
            self._journal.write(Loading(group=self.number, state=LoadState.STARTED))

    def runner_loaded(self, started_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None) -> None:
        """See Sink."""
        now_ns = self._clock.time_ns()
        self._on_load()
        self._watch.group_loaded(
            group=self.number, started_ns=started_ns, ended_ns=now_ns, outcome=outcome, error=error
        )
        duration_s = (now_ns - started_ns) / 1e9
        if outcome is None:
            event = Loading(group=self.number, state=LoadState.FAILED, duration_s=duration_s, error=error)
            self._journal.write(event)
            return
        if outcome.context_tokens:
            # Where no item asks for a context, only the backend knows what it gave.
            self._first = replace(self._first, context_tokens=outcome.context_tokens)
        if not outcome.was_loaded:
            self._loads += 1
            self._load_s += outcome.duration_s
        if not (outcome.was_loaded and self._first.is_loaded):
            self._journal.write(Loading(group=self.number, state=LoadState.LOADED, duration_s=duration_s))

    # -- In the end ----------------------------------------------------------------------------------------

    def report(self) -> GroupReport:
        """Its figures, when all its items have ended."""
        self.counter.settle()
        firsts = self._first_tokens.values()
        first_wave = WaveReport(
            item_count=self._first_count,
            release_spread_s=self._first_spread_s,
            first_token_spread_s=(max(firsts) - min(firsts)) / 1e9 if len(firsts) > 1 else None,
        )
        slots = self.driver.slots(self.runner)
        after = self._seen.last
        reusable = self._families.reusable_tokens(after.bytes_per_token)
        # The texts of a request go through a slot one after the other, and nothing of them stays there.
        room = 0 if self.runner.is_embedding else slots.count * (self._first.context_tokens or 0)
        most_context = self._context.most
        return GroupReport(
            group=self.planned,
            passes=self.counter.count,
            fewest_passes=self._fewest_passes(slots.count),
            waves=self._waves,
            first_wave=first_wave if self._waves else None,
            loads=self._loads,
            load_s=self._load_s,
            duration_s=self._seen.duration_s,
            participations=self.counter.participations,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            idle_s=tuple(self._seen.idle_s(slots.count).items()),
            costs=after.costs,
            one_at_a_time_s=one_at_a_time_s(
                after.timed,
                # On one slot, each family's beginning would be computed once.
                prompt_tokens=max(0, self.prompt_tokens - round(max(reusable, self.cached_prompt_tokens or 0))),
                completion_tokens=self.completion_tokens,
            ),
            families=self._families.report(after.bytes_per_token),
            context_used=most_context / room if room and most_context else None,
            runner_deaths=self._seen.deaths,
        )

    def _fewest_passes(self, slots: int) -> int | None:
        known = [passes for passes in self._passes if passes is not None]
        return fewest_passes(known, slots) if any(known) and len(known) == len(self._passes) else None
