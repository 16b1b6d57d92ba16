"""How long, and in which steps, a lost connection is tried again: growing pauses, scattered by chance.

A connection that was lost is known to be good again when the service says something new on it. Only what is safe is
tried again: opening a batch under its `request_id`, reopening it after an event, following it from there on. Each of
these does nothing twice.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from typing import Final, TypeVar

import grpc.aio

from unisono_client.errors import BatchLostError, RefusedError, UnisonoError, UnreachableError, refused
from unisono_client.ledger import ProtocolError

_T = TypeVar("_T")
# A service says every 15 s that it lives, where it has nothing else to say. One that misses three of these hangs, or
# something between keeps a connection that leads nowhere; gRPC's own pings might still be answered.
SILENT_S: Final = 45.0
# The first pause is up to this long, and each doubles, up to the longest.
_FIRST_S = 0.05
_LONGEST_S = 5.0
# What it means that the service does not know the batch, or some of its events, any more.
_LOST = {
    "BATCH_NOT_FOUND": "the service does not know the batch any more: was it started anew?",
    "SEQUENCE_OUT_OF_RANGE": "the service does not have all of its events any more",
}
# Where the service says itself that trying again helps, if no batch was accepted yet.
_LATER = frozenset({"LIMIT_EXCEEDED", "SHUTTING_DOWN"})


class EndedEarlyError(Exception):
    """A stream ended in order, but not with the end of its batch: somebody between has closed it."""


class SilentError(EndedEarlyError):
    """A stream on which nothing was heard for so long that it must be taken for lost."""


async def in_time(message: Awaitable[_T]) -> _T:
    """The next message of a stream; raises SilentError where it does not come in time."""
    try:
        async with asyncio.timeout(SILENT_S):
            return await message
    except TimeoutError:
        raise SilentError(f"nothing was heard for {SILENT_S:g} s, not even a heartbeat") from None


class Patience:
    """One call's."""

    def __init__(self, target: str, give_up_after_s: float, *, is_secure: bool) -> None:
        """`is_secure`: whether the connection is one with TLS."""
        self._is_secure = is_secure
        self._target = target
        self._give_up_after_s = give_up_after_s
        self._lost_at: float | None = None
        self._pause_s = 0.0
        # Whether a stream of ours may still be on its way that was sent before the connection was lost.
        self._has_ghost = False

    def regained(self) -> None:
        """The service has said something new."""
        self._lost_at = None
        self._pause_s = 0.0

    async def lost(self, error: Exception, *, batch_id: str, after_sequence: int) -> None:
        """Returns when it is time to try again. Raises what the caller is to know where that is of no use."""
        now = time.monotonic()
        again_in_s = self._judge(error, batch_id)
        if self._lost_at is None:
            self._lost_at = now
        elif now - self._lost_at >= self._give_up_after_s:
            raise self._unreachable(error, batch_id, after_sequence) from error
        if again_in_s is None:
            # The first try follows almost at once; those of many clients are scattered.
            self._pause_s = min(_LONGEST_S, self._pause_s * 2 or _FIRST_S)
            again_in_s = self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311  # scatters, and keeps no secret
        left_s = self._lost_at + self._give_up_after_s - now
        await asyncio.sleep(max(0.0, min(again_in_s, left_s)))

    def _judge(self, error: Exception, batch_id: str) -> float | None:
        """Seconds after which the service wants to be asked again; raises where it does not want to be."""
        if isinstance(error, EndedEarlyError | ProtocolError):
            return None
        if not isinstance(error, grpc.aio.AioRpcError):
            raise error
        told = refused(error)
        if told is None:
            self._has_ghost = True
            return None
        if told.reason == "STREAM_REPLACED" and self._has_ghost:
            # Replaced by our own stream before, which came late. Another client's would do it a second time.
            self._has_ghost = False
            return None
        if not batch_id and told.reason in _LATER and told.retry_after_s is not None:
            return told.retry_after_s
        if batch_id and told.reason in _LOST:
            raise BatchLostError(
                f"{batch_id} at {self._target}: {_LOST[told.reason]} Results that came are good; send what has none"
                " again, as a new batch",
                reason=told.reason,
                code=told.code,
                batch_id=batch_id,
            ) from error
        raise told from error

    def _unreachable(self, error: Exception, batch_id: str, after_sequence: int) -> UnisonoError:
        told = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        what = f"{self._target} could not be reached for {self._give_up_after_s:g} s ({told})."
        if isinstance(error, grpc.aio.AioRpcError) and (why := refused(error)) is not None:
            return RefusedError(
                f"{self._target} refused for {self._give_up_after_s:g} s: {why.message}",
                reason=why.reason,
                code=why.code,
                metadata=why.metadata,
                retry_after_s=why.retry_after_s,
            )
        if batch_id:
            todo = f" Batch {batch_id} may still be there: attach({batch_id!r}, after_sequence={after_sequence})"
        else:
            todo = " Is the service running there (`unisono serve`), and is the address HOST:PORT right?"
            if self._is_secure:
                todo += " It was asked with TLS, by `credentials`: does it, or what stands before it, speak that?"
            else:
                todo += " If it is behind TLS: Client(…, credentials=grpc.ssl_channel_credentials())"
        return UnreachableError(what + todo, batch_id=batch_id, after_sequence=after_sequence)
