"""What a conductor is told of an item, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.core.errors import UnisonoError
    from unisono.core.model import ItemState


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


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The item ended; the only one for it, and the last command that names it."""

    ticket: int
    state: ItemState
    # Times that it was released.
    attempts: int
    # None for COMPLETED.
    error: UnisonoError | None = None


Command = Stage | Release | Abort | Retry | End
