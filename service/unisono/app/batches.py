"""All batches of this process: opened, found, planned without being run, and forgotten in the end."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from unisono.app import intake
from unisono.app.coalesce import Company
from unisono.app.run_batch import RunningBatch
from unisono.core.batch import BadItem, CoScheduling
from unisono.core.errors import (
    BackendUnavailableError,
    BatchNotFoundError,
    LimitExceededError,
    RequestIdReusedError,
    ShuttingDownError,
    UnisonoError,
)
from unisono.core.limits import Limits
from unisono.core.memory import MemoryBounds
from unisono.core.model import Slots, SlotSource, SlotState
from unisono.core.plan import Warned, plan, warn_of_slots
from unisono.core.required import contradictions, lacks_room
from unisono.core.window import WindowSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from unisono.app.driver import BackendDriver
    from unisono.app.ports import Backend, Clock, Journal, Listener, Relay
    from unisono.app.resolve import Resolver
    from unisono.core.batch import BatchConfig
    from unisono.core.durable import StoredBatch
    from unisono.core.errors import NotEnoughSlotsError
    from unisono.core.model import Item
    from unisono.core.plan import Group, Plan

# An ended batch that is still being read when its time is over is looked at again after so long.
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchesSettings:
    """How long batches are kept, and what they get where they say nothing."""

    # After its end, a batch can be attached to for so long.
    keep_ended_s: float = 15 * 60.0
    # All ended batches together are charged for at most so many bytes; beyond, the oldest go first.
    max_ended_bytes: int = 512 * 1024 * 1024
    # The silence that an item is allowed after its first token.
    item_timeout_s: float = 120.0
    # How long the backend keeps a model after a batch.
    keep_alive_s: float = 300.0
    # The model of batches that name none; empty: the backend's only one.
    default_model: str = ""
    # How long a batch that detaches goes on without a reader.
    detach_grace_s: float = 15 * 60.0
    memory: MemoryBounds = field(default_factory=MemoryBounds)
    # How embeddings of single callers are gathered.
    window: WindowSettings = field(default_factory=WindowSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """What a batch would do."""

    groups: tuple[tuple[Group, SlotState], ...]
    refused: tuple[tuple[str, int, UnisonoError], ...]
    warnings: tuple[Warned, ...]


class Batches:
    """The batches of this process."""

    def __init__(
        self,
        *,
        drivers: Mapping[str, BackendDriver],
        resolver: Resolver,
        journal: Journal,
        listener: Listener,
        clock: Clock,
        report_defect: Callable[[str, BaseException], None],
        limits: Limits | None = None,
        settings: BatchesSettings | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.settings = settings or BatchesSettings()
        self._drivers = drivers
        self._resolver = resolver
        self._journal = journal
        self._listener = listener
        self._clock = clock
        self._company = Company(self.settings.window)
        self._report_defect = report_defect
        self._batches: dict[str, RunningBatch] = {}
        # Ended ones, the oldest first: the bytes that each is charged for, and their sum.
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._ended_bytes = 0
        # request_id → the fingerprint of its content, and its batch.
        self._requests: dict[str, tuple[bytes, str]] = {}
        # Those that are kept, which have limits of their own.
        self._kept: set[str] = set()
        # How many have ended since the start, those included that are kept, and those that are forgotten.
        self.processed = 0
        # Those of forwarded requests, which nobody asks for by name.
        self._forwarded: set[str] = set()
        self._is_closing = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @property
    def running(self) -> int:
        """Batches that have not ended, but for those that are kept, and of forwarded requests."""
        return len(self._batches) - len(self._ended) - len(self._kept) - len(self._forwarded)

    @property
    def backends(self) -> dict[str, Backend]:
        """The backends by name, in the order of the configuration."""
        return {name: driver.backend for name, driver in self._drivers.items()}

    async def backend_of(self, model: str, among: Collection[str]) -> str | None:
        """Which of these backends has a model, as far as they say so at once; None: none does."""
        found = (await self._resolver.among(among).resolve([model], patience_s=0.0)).models[model]
        return None if isinstance(found, UnisonoError) else found.backend

    @property
    def unplanned(self) -> int:
        """Items that were released and wait for their model to be found: many, while a backend is away."""
        return sum(batch.unplanned for batch in self._batches.values() if not batch.is_over)

    async def check(
        self, items: Sequence[Item | BadItem], config: BatchConfig, *, path: str = "items[{}]"
    ) -> list[intake.Checked]:
        """The items that a request's become, and what is wrong with each.

        Raises InvalidRequestError where the request cannot be run as it is: no items or too many, or terms that
        contradict each other; under STRICT also anything that is wrong with one, whose path begins with `path`.
        Raises NotEnoughSlotsError where all must run at one time and cannot, and BackendUnavailableError where nobody
        knows.
        """
        intake.refuse_count(len(items), self.limits)
        checked = await intake.examine(items, self._complete(config), self.limits)
        if config.is_strict:
            intake.refuse_wrong(checked, path)
        # A batch that is only joined again was checked before.
        if config.co_scheduling is CoScheduling.REQUIRED and config.request_id not in self._requests:
            await self._require_room(checked, config)
        return checked

    def examination(self, config: BatchConfig) -> intake.Examination:
        """For items that come page by page; see `check`."""
        return intake.Examination(self._complete(config), self.limits)

    def open(
        self,
        config: BatchConfig,
        *,
        method: str,
        carrier: Mapping[str, str],
        fingerprint: bytes = b"",
        item_count: int = 0,
        relay: Relay | None = None,
        among: Collection[str] = (),
    ) -> tuple[RunningBatch, bool]:
        """A new batch, or the one that the same request opened before; whether it is new.

        `method` and `carrier` are for the trace; see Listener. `fingerprint` stands for the request's content, and is
        compared where it names a `request_id`. `relay`: see RunningBatch; such a batch is forgotten when it has
        ended, and counts for no limit here. `among`: the backends that may run it; none named: all.

        Raises RequestIdReusedError, LimitExceededError, ShuttingDownError.
        """
        known = self._requests.get(config.request_id) if config.request_id else None
        if known is not None:
            if known[0] != fingerprint:
                raise RequestIdReusedError(
                    f"request_id {config.request_id!r} was used for batch {known[1]}, with other content",
                    metadata={"batch_id": known[1]},
                )
            return self.get(known[1]), False
        if self._is_closing:
            raise ShuttingDownError("the service is being stopped; send this again to its successor")
        if relay is None and self.running >= self.limits.max_batches:
            raise LimitExceededError(
                f"{self.running} batches are running; at most {self.limits.max_batches} may",
                metadata={"limit": "max_batches"},
                retry_after_s=5.0,
            )
        batch_id = new_id()
        batch = self._build(
            batch_id,
            self._complete(config),
            journal=self._journal,
            item_count=item_count,
            on_end=self._on_end if relay is None else self._on_forwarded,
            method=method,
            carrier=carrier,
            relay=relay,
            resolver=self._resolver.among(among) if among else None,
        )
        self._batches[batch_id] = batch
        if relay is not None:
            self._forwarded.add(batch_id)
        self._all_ended.clear()
        if config.request_id:
            self._requests[config.request_id] = (fingerprint, batch_id)
        return batch, True

    def run_stored(
        self, stored: StoredBatch, journal: Journal, *, on_end: Callable[[RunningBatch], None]
    ) -> RunningBatch:
        """Makes a kept batch one of this process's; its items are still to be given to it. It counts as running.

        `on_end` is told when it has ended, or was left; then `forget` may be called.
        """
        batch = self._batches[stored.batch_id] = self._build(
            stored.batch_id,
            self._complete(stored.config),
            journal=journal,
            item_count=stored.tally.items,
            on_end=on_end,
            method=stored.method,
            carrier=stored.carrier,
            stored=stored,
        )
        self._kept.add(stored.batch_id)
        return batch

    def find(self, batch_id: str) -> RunningBatch | None:
        """A batch that is running, or ended a while ago; None: there is none here."""
        return self._batches.get(batch_id)

    def get(self, batch_id: str) -> RunningBatch:
        """A batch that is running, or ended a while ago; raises BatchNotFoundError."""
        batch = self._batches.get(batch_id)
        if batch is None:
            raise BatchNotFoundError(
                f"there is no batch {batch_id!r}. Ended ones stay for {self.settings.keep_ended_s / 60:g} minutes",
                metadata={"batch_id": batch_id},
            )
        return batch

    def forget(self, batch: RunningBatch) -> None:
        """Nobody will ask for this batch, which has ended."""
        self._forget(batch.batch_id)

    async def plan(self, items: Sequence[Item | BadItem], config: BatchConfig) -> PlanView:
        """What a batch of these items would do; nothing is run or loaded.

        Raises InvalidRequestError for no items, and for terms that contradict each other.
        """
        intake.refuse_count(len(items), self.limits)
        good: list[Item] = []
        refused: list[tuple[str, int, UnisonoError]] = []
        for one in await intake.examine(items, self._complete(config), self.limits):
            if isinstance(one.item, BadItem) or one.wrong:
                refused.append((one.item.item_id, one.place, intake.error_of(one.wrong)))
            else:
                # Here, an index is the place in the request.
                good.append(replace(one.item, index=one.place))
        _refuse_contradictions(config, len(good))
        planned = await self._plan(good, config)
        refused += [(item.item_id, item.index, error) for item, error in planned.refused]
        groups = tuple((group, self._slots(group)) for group in planned.groups)
        warnings = [
            warning
            for group, state in groups
            if (warning := warn_of_slots(group, state.slots, kind=self._drivers[group.runner.backend].backend.kind))
        ]
        if config.co_scheduling is CoScheduling.REQUIRED and (lack := self._lacks_room(groups)) is not None:
            message = f"RunBatch refuses this batch: {lack.message}"
            warnings.insert(0, Warned(item_id="", field="", reason=lack.reason, message=message))
        return PlanView(
            groups=groups,
            refused=tuple(sorted(refused, key=lambda each: each[1])),
            warnings=(*warnings, *planned.warnings),
        )

    async def close(self, *, drain_s: float) -> None:
        """Takes no more batches, lets the running ones end for so long, and cancels the rest."""
        self._is_closing = True
        try:
            async with asyncio.timeout(drain_s):
                await self._all_ended.wait()
        except TimeoutError:
            stopped = ShuttingDownError("the service was stopped before the batch had ended")
            for batch in [one for name, one in self._batches.items() if name not in self._kept]:
                _ = batch.cancel(error=stopped)

    async def _plan(self, items: Sequence[Item], config: BatchConfig) -> Plan:
        """Where items would go at this moment; a backend that is away is not waited for."""
        found = await self._resolver.resolve((item.model for item in items), patience_s=0.0)
        return plan(
            items,
            found.models,
            found.loaded,
            policy=config.context_policy,
            memory_limit_bytes=self.settings.memory.limit_bytes,
            standing={backend: self._drivers[backend].standing for backend in found.loaded},
            slots_of=lambda runner: self._drivers[runner.backend].slot_state(runner).fewest,
        )

    async def _require_room(self, checked: Sequence[intake.Checked], config: BatchConfig) -> None:
        """Raises NotEnoughSlotsError unless all items that can run at all can do so at one time."""
        good = [one.item for one in checked if not isinstance(one.item, BadItem) and not one.wrong]
        _refuse_contradictions(config, len(good))
        planned = await self._plan(good, config)
        for _, error in planned.refused:
            if isinstance(error, BackendUnavailableError):
                raise error
        lack = self._lacks_room([(group, self._slots(group)) for group in planned.groups])
        if lack is not None:
            raise lack

    def _lacks_room(self, groups: Sequence[tuple[Group, SlotState]]) -> NotEnoughSlotsError | None:
        return lacks_room(
            groups,
            self.settings.memory,
            bytes_per_token=lambda runner: self._drivers[runner.backend].figures(runner).bytes_per_token,
        )

    def _slots(self, group: Group) -> SlotState:
        state = self._drivers[group.runner.backend].slot_state(group.runner, group.model)
        if state.slots.count == 0 and group.told_slots is not None:
            return replace(state, slots=Slots(count=group.told_slots, source=SlotSource.TOLD), limit=group.told_slots)
        return state

    def _complete(self, config: BatchConfig) -> BatchConfig:
        return intake.with_defaults(
            config,
            item_timeout_s=self.settings.item_timeout_s,
            keep_alive_s=self.settings.keep_alive_s,
            detach_grace_s=self.settings.detach_grace_s,
            model=self.settings.default_model,
        )

    def _on_end(self, batch: RunningBatch) -> None:
        self._ended[batch.batch_id] = batch.size_bytes
        self._ended_bytes += batch.size_bytes
        self._forget_later(batch.batch_id, self.settings.keep_ended_s)
        for batch_id in list(self._ended)[:-1] if self._ended_bytes > self.settings.max_ended_bytes else ():
            if self._ended_bytes <= self.settings.max_ended_bytes:
                break
            if not self._batches[batch_id].journal.has_readers:
                self._forget(batch_id)
        self._see_end()

    def _on_forwarded(self, batch: RunningBatch) -> None:
        """It is forgotten as soon as it has said its last word."""
        self._forwarded.discard(batch.batch_id)
        self._ended[batch.batch_id] = 0
        self._see_end()
        _ = asyncio.get_running_loop().call_soon(self._forget, batch.batch_id)

    def _see_end(self) -> None:
        if not self.running and not self._forwarded:
            self._all_ended.set()

    def _forget_later(self, batch_id: str, delay_s: float) -> None:
        """Keeps a batch for so long, and then as long as anybody still reads it.

        The timer knows its name alone: one that is forgotten before must not stay in memory for it.
        """

        def forget() -> None:
            batch = self._batches.get(batch_id)
            if batch is not None and batch.journal.has_readers:
                self._forget_later(batch_id, _LOOK_AGAIN_S)
            else:
                self._forget(batch_id)

        _ = asyncio.get_running_loop().call_later(delay_s, forget)

    def _build(
        self,
        batch_id: str,
        config: BatchConfig,
        *,
        journal: Journal,
        item_count: int,
        on_end: Callable[[RunningBatch], None],
        method: str,
        carrier: Mapping[str, str],
        stored: StoredBatch | None = None,
        relay: Relay | None = None,
        resolver: Resolver | None = None,
    ) -> RunningBatch:
        def ended(batch: RunningBatch) -> None:
            self.processed += not batch.is_left
            on_end(batch)

        return RunningBatch(
            batch_id,
            config,
            item_count=item_count,
            drivers=self._drivers,
            company=self._company,
            resolver=resolver or self._resolver,
            journal=journal,
            clock=self._clock,
            limits=self.limits,
            watch=self._listener.batch_accepted(
                batch_id=batch_id, method=method, carrier=carrier, at_ns=self._clock.time_ns()
            ),
            on_end=ended,
            report_defect=self._report_defect,
            memory_limit_bytes=self.settings.memory.limit_bytes,
            stored=stored,
            relay=relay,
        )

    def _forget(self, batch_id: str) -> None:
        batch = self._batches.pop(batch_id, None)
        self._ended_bytes -= self._ended.pop(batch_id, 0)
        if batch_id not in self._kept:
            self._journal.forget(batch_id)
            if batch is not None and batch.config.request_id:
                self._requests.pop(batch.config.request_id, None)
        self._kept.discard(batch_id)
        if batch is not None:
            batch.let_go()


def new_id() -> str:
    """A name for a batch, that nobody guesses."""
    return f"batch_{secrets.token_hex(12)}"


def _refuse_contradictions(config: BatchConfig, item_count: int) -> None:
    """Raises InvalidRequestError where so many items must run at one time, and the batch's own terms forbid that."""
    if config.co_scheduling is CoScheduling.REQUIRED and (wrong := contradictions(config, item_count)):
        raise intake.error_of(wrong)
