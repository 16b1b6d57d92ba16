"""Whether a failed item is tried again, and when."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.core.errors import UnisonoError

# First pause, and the longest, in seconds; each is twice the one before.
_FIRST_S = 0.25
_LONGEST_S = 10.0
# A backend that asks for a longer pause than this (Retry-After) is asked again all the same.
LONGEST_ASKED_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Try again after a while."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The failure is final."""


def decide(error: UnisonoError, *, charged: int, max_attempts: int, key: str) -> Again | GiveUp:
    """What follows a failure.

    `charged` is the number of attempts that the item has used up, the failed one included. `key` names the item;
    it scatters the pauses (see `backoff_s`).

    1. The caller's mistake stays one, however often it is sent: give up, whatever the HTTP status was.
    2. The attempts are used up: give up.
    3. Otherwise: again, after the pause that the backend asked for (up to a minute), or after a growing one.
    """
    if not error.is_retryable:
        return GiveUp()
    if charged >= max_attempts:
        return GiveUp()
    asked_s = min(error.retry_after_s or 0.0, LONGEST_ASKED_S)
    return Again(after_s=asked_s or backoff_s(max(1, charged), key))


def backoff_s(failures: int, key: str) -> float:
    """The pause after so many failures in a row: doubling from 0.25 s to 10 s, of which half is scattered.

    Scattered by the key's checksum instead of by chance, so that the core stays a function of its input:
    items that failed together still do not come back together.
    """
    full = min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, 16))
    share: float = zlib.crc32(f"{key}/{failures}".encode()) / 2**32
    return full / 2 + full / 2 * share
