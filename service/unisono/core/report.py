"""Figures of a batch: each measured, or derived as its comment says; None where it is neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.model import Slots

if TYPE_CHECKING:
    from unisono.core.model import RunnerSpec
    from unisono.core.passes import PassCount


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
class GroupReport:
    """The figures of a group."""

    group: GroupPlanned
    passes: PassCount
    # The larger of the longest item's tokens and all tokens ÷ slots; None while the slots are not known.
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

    @property
    def items_per_pass(self) -> float | None:
        """Tokens of answers ÷ passes; None where there was no pass."""
        return self.completion_tokens / self.passes.count if self.passes.count else None


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


def fewest_passes(tokens_by_item: list[int], slots: int) -> int | None:
    """The fewest forward passes that these answers need on so many slots.

    An item gets one token a pass, and a pass has room for `slots` of them: so never fewer than the longest
    item's tokens, nor than all tokens ÷ slots, rounded up. None where the slots are not known (0).
    """
    if slots <= 0:
        return None
    return max(max(tokens_by_item, default=0), -(-sum(tokens_by_item) // slots))
