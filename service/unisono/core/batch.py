"""What applies to a whole batch, and what becomes of items that are added to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from unisono.core.commands import Priority
from unisono.core.model import Message, Options

if TYPE_CHECKING:
    from unisono.core.errors import UnisonoError, Violation

# What a stream's items wait for by default: so many of them, or so long.
RELEASE_SIZE = 64
RELEASE_INTERVAL_S = 0.05
# A `keep_alive_s`: the backend is told none.
BACKENDS_OWN = -1.0


class CoScheduling(Enum):
    """How closely together the items of a batch run."""

    # As soon as possible: how many share each pass follows from measured costs.
    FASTEST = "fastest"
    # In waves that fill all slots at once.
    TOGETHER = "together"
    # All in one wave, or not at all.
    REQUIRED = "required"


class ContextPolicy(Enum):
    """What becomes of items of one model that ask for contexts of different sizes."""

    # One context serves them all.
    HARMONISE = "harmonise"
    # Each size is a runner of its own; each change of runner loads the model anew.
    SEPARATE = "separate"
    # They are refused.
    REJECT = "reject"
    # Each has what the backend makes of its request, which goes as it came.
    AS_SENT = "as_sent"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What applies to all items of a batch."""

    # The model of items that name none; and options beneath the items' own.
    model: str = ""
    options: Options = field(default_factory=Options)
    # How long the backend keeps the model afterwards; None: the service's setting; 0: unloaded at once; below zero
    # (BACKENDS_OWN): as long as the backend's own setting says.
    keep_alive_s: float | None = None
    # A malformed item refuses the batch (or the message that holds it) instead of failing alone.
    is_strict: bool = True
    # Limits in seconds; None: the service's setting for `item_timeout_s`, otherwise no limit.
    queue_timeout_s: float | None = None
    item_timeout_s: float | None = None
    deadline_s: float | None = None
    max_attempts: int = 3
    # The batch goes on when its caller is lost, so long without any reader; None: the service's setting.
    detaches: bool = False
    detach_grace_s: float | None = None
    # The caller's name for the request, which makes it safe to send again; empty for none.
    request_id: str = ""
    # When a stream's items go by themselves; an interval of 0 means never by time.
    release_size: int = RELEASE_SIZE
    release_interval_s: float = RELEASE_INTERVAL_S
    co_scheduling: CoScheduling = CoScheduling.FASTEST
    context_policy: ContextPolicy = ContextPolicy.HARMONISE
    # At the backends at one time, and released in a second; None: no limit of the batch's own.
    max_concurrency: int | None = None
    items_per_second: float | None = None
    priority: Priority = Priority.NORMAL
    weight: int = 1
    # In front of each conversation's own messages.
    shared_messages: tuple[Message, ...] = ()
    # A single request of a caller's (Infer): it is gathered with others' into waves.
    is_single: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSettings:
    """How often text is sent as it is generated."""

    # Flushed at least this often, in seconds,
    flush_interval_s: float = 0.1
    # and when about so many bytes have gathered.
    flush_bytes: int = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class BadItem:
    """An item that cannot be run as it came, and why."""

    # Empty where not even that could be read.
    item_id: str
    # Paths from the item on.
    violations: tuple[Violation, ...]
    # As of an Item.
    n: int = 1
    variant_of: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What became of an added item: it got a place, or it was refused and is no part of the batch.

    An item with several answers has as many places, and an Ack for each; it is refused as one.
    """

    item_id: str
    # Its place among those that were added together.
    place: int = 0
    index: int | None = None
    refusal: UnisonoError | None = None
