"""What the stand-in saw: one record for each request, one for each forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple


class Outcome(StrEnum):
    """How a request ended."""

    PENDING = "pending"  # not ended yet
    COMPLETED = "completed"  # answered to the last byte, whatever the status
    CLIENT_GONE = "client_gone"  # the client closed or reset the connection first
    FAULTED = "faulted"  # a scripted fault broke the answer


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """One request. Times are nanoseconds of time.monotonic_ns(), None where it has not happened."""

    id: int  # 1 is the first request that the server ever saw
    connection: int  # 1 is the first connection
    method: str
    path: str  # without the query
    headers: Mapping[str, str]  # names in lower case
    body: Any  # the parsed JSON, or None
    body_bytes: int  # length of the body as received so far
    headers_ns: int  # the request's headers were complete
    last_byte_ns: int | None  # the last byte of the body came
    started_ns: int | None  # the handler began: with the last byte, or when the JSON value was whole
    slot_ns: int | None  # a slot was granted
    first_token_ns: int | None
    end_ns: int | None  # last byte of the answer handed to the socket, or the connection lost
    status: int | None  # HTTP status of the answer
    lines: int  # lines of the stream written so far
    outcome: Outcome
    model: str | None  # the name in the request
    slot: int | None  # number of the slot
    runner: int | None  # number of the runner (counts loads)
    prompt_tokens: int  # tokens of the prompt
    prompt_tokens_cached: int  # of these, found in the slot's prefix
    tokens: int  # tokens decoded, the end token included
    fault: str | None  # the kind of the fault that was applied

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context that came with the request."""
        return self.headers.get("traceparent")


class LiveRequest:
    """A request that is still being written down."""

    __slots__ = (*(f.name for f in fields(RequestRecord)), "_frozen")

    def __init__(self, number: int, connection: int, method: str, path: str, headers: Mapping[str, str]) -> None:
        self.id = number
        self.connection = connection
        self.method = method
        self.path = path
        self.headers = headers
        self.body: Any = None
        self.body_bytes = 0
        self.headers_ns = 0
        self.last_byte_ns: int | None = None
        self.started_ns: int | None = None
        self.slot_ns: int | None = None
        self.first_token_ns: int | None = None
        self.end_ns: int | None = None
        self.status: int | None = None
        self.lines = 0
        self.outcome = Outcome.PENDING
        self.model: str | None = None
        self.slot: int | None = None
        self.runner: int | None = None
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.tokens = 0
        self.fault: str | None = None
        self._frozen: RequestRecord | None = None

    def freeze(self) -> RequestRecord:
        """The record as it is now."""
        if self._frozen is not None:
            return self._frozen
        record = RequestRecord(**{name: getattr(self, name) for name in _FIELDS})
        if self.outcome is not Outcome.PENDING and self.last_byte_ns is not None:
            self._frozen = record
        return record


_FIELDS = tuple(f.name for f in fields(RequestRecord))


class PassRecord(NamedTuple):
    """One forward pass of a runner."""

    number: int  # 1 is the first pass of the server
    runner: int
    decoding: tuple[int, ...]  # ids of the requests that got a token in it by decoding
    prefilling: tuple[int, ...]  # ids of the requests whose prompt was computed in it (the last part: a token too)
    prompt_tokens: int  # prompt tokens computed
    started_ns: int
    ended_ns: int

    @property
    def requests(self) -> tuple[int, ...]:
        """All requests that took part."""
        return self.decoding + self.prefilling


class Changes:
    """Waiting for a condition, without polling: it is looked at whenever something has changed."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], object], asyncio.Future[None]]] = []

    def notify(self) -> None:
        """Something changed: wake everybody whose condition holds."""
        if not self._waiting:
            return
        still: list[tuple[Callable[[], object], asyncio.Future[None]]] = []
        for condition, future in self._waiting:
            if future.done():
                continue
            try:
                holds = condition()
            except Exception as error:  # noqa: BLE001  (a test's own mistake must reach the test)
                future.set_exception(error)
                continue
            if holds:
                future.set_result(None)
            else:
                still.append((condition, future))
        self._waiting = still

    async def wait_for(self, condition: Callable[[], object], timeout_s: float, describe: Callable[[], str]) -> None:
        """Return as soon as the condition holds; AssertionError with a description when it never does."""
        if condition():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((condition, future))
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise AssertionError(f"not seen within {timeout_s} s; {describe()}") from None
