"""A batch that outlives its caller, as the journal's file knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.events import BatchState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.core.batch import BatchConfig
    from unisono.core.model import ItemState


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch that is to be kept."""

    batch_id: str
    config: BatchConfig
    # Stands for the request's content, where it has a request_id.
    fingerprint: bytes = b""
    # The batch whose failed items this one tries again; empty for none.
    parent_id: str = ""
    # The caller's own words, given back as they came.
    metadata: Mapping[str, str] = field(default_factory=dict)
    # The rpc that brought it, and the trace context that came with it; see Listener.
    method: str = ""
    carrier: Mapping[str, str] = field(default_factory=dict)
    # Nanoseconds since 1970. What has not ended at `deadline_ns` expires; None: no limit.
    created_ns: int
    deadline_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many items ended how, and their tokens."""

    items: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ended(self) -> int:
        """Items that have a result."""
        return self.completed + self.failed + self.cancelled + self.expired


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What the items of a kept batch took that had ended when a process took it over."""

    # From when on this process counts, nanoseconds since 1970.
    until_ns: int
    prompt_tokens: int = 0
    # None where no backend said.
    cached_prompt_tokens: int | None = None
    completion_tokens: int = 0
    # Attempts beyond each item's first.
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """How a kept batch stands. Moments are nanoseconds since 1970."""

    batch_id: str
    config: BatchConfig
    fingerprint: bytes
    parent_id: str
    metadata: Mapping[str, str]
    method: str
    carrier: Mapping[str, str]
    created_ns: int
    deadline_ns: int | None
    # When its first item could have gone; None: it waits for its turn.
    started_ns: int | None
    ended_ns: int | None
    # It is deleted then; None: it has not ended.
    keep_until_ns: int | None
    state: BatchState
    is_cancelling: bool
    is_input_closed: bool
    tally: Tally
    # Times that a process took it over after another.
    restarts: int
    last_sequence: int

    @property
    def is_over(self) -> bool:
        """Whether its summary is written."""
        return self.state is not BatchState.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptItem:
    """What is known of an item of a kept batch without what it asks."""

    index: int
    item_id: str
    # For one of several answers of an item: the item's own id.
    variant_of: str = ""
    # How it ended; None: it has no result.
    state: ItemState | None = None
    # What it takes in the store.
    size_bytes: int = 0
