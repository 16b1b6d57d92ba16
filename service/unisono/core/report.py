"""Figures of a batch: each measured, or derived as its comment says; None where it is neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.idle import IdleReason, slot_seconds
from unisono.core.memory import MemoryEstimate
from unisono.core.model import RunnerSpec, Slots, SlotState
from unisono.core.passes import PassCount

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.core.idle import Span

# Less idle time is what sums of floating-point numbers leave.
_LEAST_IDLE_S = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlanned:
    """Items of the batch were assigned to a runner; said again, with the new count, when more join."""

    # The group's number within the batch, from 0.
    group: int
    runner: RunnerSpec
    # Items of the batch in it so far.
    item_count: int
    # Whether the runner was loaded already.
    is_loaded: bool
    slots: Slots = field(default_factory=Slots)
    # What else is known of them.
    state: SlotState = field(default_factory=SlotState)
    # Why it has the context that it has, for people.
    context_reason: str = ""
    # What it takes in memory, where that can be derived; and what the backend says it takes, 0: not known.
    memory: MemoryEstimate | None = None
    measured_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the batch is: items by state, tokens and passes so far."""

    accepted: int = 0
    queued: int = 0
    in_flight: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    completion_tokens: int = 0
    passes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveReport:
    """How closely together the requests of a wave went out, and how closely they began to be answered."""

    item_count: int
    # From the first to the last final byte, at our sockets.
    release_spread_s: float
    # From the first to the last first token, by the backend's clock; None where fewer than two spoke.
    first_token_spread_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What things cost on a runner, in seconds, as measured so far.

    Time is about passes × pass + tokens × token + prompt tokens computed × prompt token.
    """

    pass_s: float
    token_s: float
    # None until a prefill was measured.
    prompt_token_s: float | None = None
    # Pass intervals that this rests on.
    passes_measured: int = 0
    # A token while nothing shared its passes; None until measured.
    single_stream_token_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerFigures:
    """What was seen of a runner since it first had work."""

    # Slots × seconds that were not used, by reason.
    idle_s: Mapping[IdleReason, float] = field(default_factory=dict)
    # What is to be added to these as soon as the number of slots is known; see `idle.py`.
    idle_open: Mapping[Span, float] = field(default_factory=dict)
    # Times that it ended while it answered.
    deaths: int = 0
    costs: Costs | None = None
    # The same where what a pass and a token cost cannot be told apart: only the costs of single items count of these.
    timed: Costs | None = None
    # Bytes of prompts a token.
    bytes_per_token: float = 4.0

    def idle_since(self, before: RunnerFigures, slots: int) -> dict[IdleReason, float]:
        """Slots × seconds not used since `before`; none where the number of slots is not known (0)."""
        if not slots:
            return {}
        # What was open then has been counted since.
        earlier = slot_seconds(before.idle_open, slots)
        found = {
            reason: seconds - before.idle_s.get(reason, 0.0) - earlier.get(reason, 0.0)
            for reason, seconds in self.idle_s.items()
        }
        return {reason: seconds for reason, seconds in found.items() if seconds > _LEAST_IDLE_S}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReport:
    """Items whose prompts begin alike."""

    # Tokens that they have in common, estimated.
    prefix_tokens: int
    item_count: int
    # Times that one was released to a slot that did not hold the prefix, as far as the schedule could tell.
    computed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """The figures of a group."""

    group: GroupPlanned
    passes: PassCount
    # See `fewest_passes`; None while the slots, or an item's passes, are not known.
    fewest_passes: int | None
    # Releases, each of one request or more.
    waves: int
    first_wave: WaveReport | None
    loads: int
    load_s: float
    # From the first release to the last end; None where nothing was released.
    duration_s: float | None
    prompt_tokens: int
    completion_tokens: int
    # How often an item took part in a pass, those that were not answered and earlier attempts included.
    participations: int = 0
    # Of the prompt tokens, those found in a cache; None where the backend does not say.
    cached_prompt_tokens: int | None = None
    # Slots × seconds that were not used between its first release and its last end, by reason; the runner's. Empty
    # while the number of slots is not known.
    idle_s: tuple[tuple[IdleReason, float], ...] = ()
    costs: Costs | None = None
    # How long the same items would have taken one at a time, from the measured single-stream costs; None: unknown.
    one_at_a_time_s: float | None = None
    # The largest families, at most 100.
    families: tuple[FamilyReport, ...] = ()
    # The largest share of slots × context that items in flight used at one time; None: unknown.
    context_used: float | None = None
    # Times that the runner ended while it answered items of this group.
    runner_deaths: int = 0

    @property
    def gain(self) -> float | None:
        """One at a time ÷ what it took; None where either is not known."""
        return self.one_at_a_time_s / self.duration_s if self.one_at_a_time_s and self.duration_s else None

    @property
    def items_per_pass(self) -> float | None:
        """Items that took part in a pass, on average; None where there was no pass."""
        return self.participations / self.passes.count if self.passes.count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of a batch."""

    batch_id: str
    # From acceptance to the end.
    duration_s: float
    counts: Progress = field(default_factory=Progress)
    groups: tuple[GroupReport, ...] = ()
    prompt_tokens: int = 0
    # None where no backend says.
    cached_prompt_tokens: int | None = None
    completion_tokens: int = 0
    # Attempts beyond each item's first.
    retries: int = 0
    journal_bytes: int = 0
    # Figures of groups, and passes, are of what happened from then on, since the batch was taken over from another
    # process; nanoseconds since 1970. None: of the whole batch, as all others always are.
    counted_since_ns: int | None = None


def fewest_passes(passes_by_item: list[int], slots: int) -> int | None:
    """The fewest forward passes that these items need on so many slots.

    `passes_by_item`: what each takes part in, which is as many as it has tokens unless a model drafts; of one that
    broke off, as far as it came. A pass has room for `slots` items: so never fewer than one item's, nor than all
    items' ÷ slots, rounded up. None where the slots are not known (0).
    """
    if slots <= 0:
        return None
    return max(max(passes_by_item, default=0), -(-sum(passes_by_item) // slots))
