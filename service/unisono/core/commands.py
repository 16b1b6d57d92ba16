"""What a conductor is told of an item, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.core.errors import UnisonoError
    from unisono.core.model import ItemState
    from unisono.core.prefixes import Prefix


class Priority(IntEnum):
    """Which batches go first whenever a slot falls free."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class ReleaseReason(Enum):
    """Why an item was the next to go."""

    LONGEST = "longest"
    TAIL = "tail"
    PREFIX_HELD = "prefix_held"
    NEW_FAMILY = "new_family"
    JOINS_FAMILY = "joins_family"
    TOGETHER = "together"
    SUSPECT = "suspect"


@dataclass(slots=True, eq=False)
class Terms:
    """What a batch's caller allows and asks for; one object for all its items, on all runners.

    The conductors of a process count in it what they release, so that the limits hold for the batch as a whole.
    """

    priority: Priority = Priority.NORMAL
    # Share of the slots beside other batches of the same priority.
    weight: int = 1
    # Items at the backends at one time; None: no limit.
    max_concurrency: int | None = None
    items_per_second: float | None = None
    # Its items go in waves that have all slots to themselves.
    is_together: bool = False
    # At the backends now.
    in_flight: int = 0
    # By items_per_second, the next one goes no earlier.
    next_release_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the conductor knows of an item; never its content."""

    # Its name within this process; never used twice.
    ticket: int
    # Whose it is: batches take turns.
    batch: int
    # It must have spoken by then; None: no limit. By the clock of `now`, in seconds.
    speak_by_s: float | None = None
    # It must have ended by then (the batch's deadline).
    end_by_s: float | None = None
    # The longest silence after the first token, in seconds.
    silence_s: float | None = None
    max_attempts: int = 3
    # The most tokens of its answer, where it is bounded.
    num_predict: int | None = None
    # What its batch allows and asks for; None: nothing.
    terms: Terms | None = None
    # What its prompt has in common with others of its family; None: nothing worth it.
    prefix: Prefix | None = None
    # Bytes of text of its prompt.
    prompt_bytes: int = 0
    # A lone request, which is gathered with others' into a wave.
    is_single: bool = False
    # Its caller alone decides how long it is waited for: that nothing is heard of it is no reason to give it up.
    is_patient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Open a connection, and send all of the request but its last byte."""

    ticket: int
    # Names this staging; comes back with all news of it.
    serial: int
    # The attempt that this is, from 1.
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Send the last byte of all these, in one go."""

    tickets: tuple[int, ...]
    # The release's number on this runner, from 0.
    wave: int
    # For each ticket: why it was the next, and the lane (our name for a slot, from 0) that it is meant for; None: it
    # waits at the backend for whichever slot falls free.
    reasons: tuple[ReleaseReason, ...] = ()
    lanes: tuple[int | None, ...] = ()
    # Bytes of its prompt's beginning that the lane holds already; None without a lane.
    held_bytes: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Close the connection of this staging."""

    ticket: int
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Nothing to do: word that the attempt failed and another follows."""

    ticket: int
    attempt: int
    error: UnisonoError
    again_in_s: float
    # Another item's attempt ended the runner, as far as is known: this one is not charged.
    is_free: bool = False
    # How long ago its connection broke: who fell is judged when it is known who else did.
    ago_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The item ended; the only one for it, and the last command that names it."""

    ticket: int
    state: ItemState
    # Times that it was released, but for those that another item's attempt ended.
    attempts: int
    # None for COMPLETED.
    error: UnisonoError | None = None
    # Times that it was broken off because another item's attempt ended the runner.
    disturbed: int = 0


Command = Stage | Release | Abort | Retry | End
