"""How long a lost connection is tried again: in growing pauses, until nothing new came for a minute."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc
import grpc.aio

from unisono.edge.cli.errors import is_of_service

# Without anything new for so long, there is nobody to wait for.
GIVE_UP_AFTER_S = 60.0
# So long the service keeps a batch without its reader: time to go on with it by other means.
DETACH_GRACE_S = 300.0
# The first pause is up to this long, and each doubles, up to the longest.
_FIRST_S = 0.1
_LONGEST_S = 5.0
# How calls end whose connection did; the first three where something between has cut it.
_LOST = frozenset({
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE,
})  # fmt: skip


class EndedEarlyError(Exception):
    """The stream ended before its batch: something between has closed it."""


def is_lost(error: grpc.aio.AioRpcError | EndedEarlyError) -> bool:
    """Whether the connection broke; else the service has said itself what is wrong, and will say it again."""
    return isinstance(error, EndedEarlyError) or (error.code() in _LOST and not is_of_service(error))


class Patience:
    """One batch's."""

    def __init__(self, give_up_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._give_up_after_s = give_up_after_s
        self._clock = clock
        self._lost_at: float | None = None
        self._pause_s = 0.0

    def lost(self) -> float | None:
        """The connection is lost, or was not regained: seconds until the next try; None: it is given up."""
        now = self._clock()
        if self._lost_at is None:
            self._lost_at = now
        left_s = self._lost_at + self._give_up_after_s - now
        if left_s <= 0:
            return None
        self._pause_s = min(_LONGEST_S, self._pause_s * 2 or _FIRST_S)
        # Scattered, since all callers of a service lose it in the same moment.
        return min(left_s, self._pause_s * random.uniform(0.5, 1.0))  # noqa: S311  # keeps no secret

    def regained(self) -> None:
        """The service has said something new."""
        self._lost_at = None
        self._pause_s = 0.0
