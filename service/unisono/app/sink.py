"""Whose items they are: what a driver tells of each item, from its first staging to its end.

Word of an item comes in the order in which it happened, and always on the event loop's thread. The driver goes on
with its other items when a sink returns, so a sink only notes what it hears, and passes it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unisono.app.ports import LoadOutcome, Relay, ReleaseTimes
    from unisono.core.commands import End, ReleaseReason, Retry
    from unisono.core.errors import UnisonoError
    from unisono.core.model import Finished, Spoke


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The release of one item."""

    # The release's name, the same for all whose items it held, and when it was.
    wave_key: int
    at_ns: int
    # Why it was the next, and the lane that it is meant for; None: it waits at the backend.
    reason: ReleaseReason
    lane: int | None
    # Bytes of its prompt's beginning that the lane holds already, as far as we know; None without a lane.
    held_bytes: int | None


class Sink(Protocol):
    """Whose items they are, all on one runner: told everything that happens to them. Must not raise or wait."""

    def relay_of(self, ticket: int) -> Relay | None:
        """Where its answer goes as it comes, for a request that is sent as it came; None: it is made of the item."""
        ...

    def item_staging(self, ticket: int, attempt: int) -> Mapping[str, str]:
        """An attempt begins; the answer is headers for its request."""
        ...

    def item_staged(self, ticket: int) -> None:
        """All but its last byte is sent."""
        ...

    def item_released(self, ticket: int, departure: Departure) -> None:
        """Its last byte is sent."""
        ...

    def wave_released(self, tickets: Sequence[int], others: int, times: ReleaseTimes, wave_key: int) -> None:
        """Items of this sink, and so many others, were released together. `wave_key`: that of their departures.

        Said after `item_released` of each; the sinks of one release are told one after the other, in one go.
        """
        ...

    def item_spoke(self, ticket: int, piece: Spoke) -> bool:
        """A piece of its answer arrived; answers whether the pass that gave its last one gave this, too."""
        ...

    def item_finished(self, ticket: int, answer: Finished) -> None:
        """Its answer is whole; `item_ended` follows."""
        ...

    def item_retried(self, word: Retry) -> None:
        """An attempt failed, and another follows."""
        ...

    def item_ended(self, end: End) -> None:
        """It ended; the last word on it."""
        ...

    def runner_loading(self) -> None:
        """The runner of these items is being made ready."""
        ...

    def runner_loaded(self, started_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None) -> None:
        """It is ready, or could not be made so."""
        ...
