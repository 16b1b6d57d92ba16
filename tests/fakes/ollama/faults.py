"""Scripted faults: what goes wrong, for which request, and when.

    fake.faults.add(Fault(FaultKind.RESET, path="/api/chat", nth=3, after_lines=2))

A fault waits for a request that it matches and is used up by it (`times`, default 1; None: for ever). The first
fault that matches is taken; a request has at most one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class FaultKind(StrEnum):
    """What a fault does. "Lines" are lines of a stream; in an answer that is not streamed, tokens."""

    ANSWER = "answer"  # answer with `status` and `body` at once; nothing is run
    DELAY = "delay"  # begin only after `delay_s`, and not before release() if `until_released`
    CLOSE = "close"  # close the connection without an answer, as soon as the request is there
    RESET = "reset"  # reset it (RST) after `after_bytes` of the answer, or `after_lines`; both 0: at once
    STALL = "stall"  # keep the slot and say nothing after `after_lines`, until release() or the client goes
    ERROR_LINE = "error_line"  # after `after_lines` a line {"error": `message`} ends the stream, with status 200
    NO_DONE = "no_done"  # the stream ends properly after `after_lines`, or (None) just before its done line
    KILL_RUNNER = "kill_runner"  # the runner dies after `after_lines`; 0: when the slot is granted
    BAD_LINE = "bad_line"  # after `after_lines` a line that is no JSON; the stream goes on
    SILENT_LOAD = "silent_load"  # the load that this request causes does not end before release()
    SLICE = "slice"  # write the answer in pieces of `piece_bytes`, each in a turn of the loop of its own


# The message of a line that a dying runner leaves in a stream (recorded: runner_killed_stream).
RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"


@dataclass(kw_only=True)
class Fault:
    """One fault. Only the fields that its kind names are heeded."""

    kind: FaultKind = field(kw_only=False)
    path: str | None = None  # only requests to this path
    when: Callable[[Any], bool] | None = None  # only requests whose parsed body satisfies this
    nth: int = 1  # begin with the nth request that matches; 1 is the next
    times: int | None = 1  # how many requests it hits, None: all
    status: int = 503
    body: bytes | Mapping[str, Any] = field(
        default_factory=lambda: {"error": "server busy, please try again.  maximum pending requests exceeded"}
    )
    headers: Mapping[str, str] = field(default_factory=dict)  # more headers of ANSWER
    after_lines: int | None = None  # None counts as 0, except for NO_DONE and for RESET with after_bytes
    after_bytes: int | None = None  # bytes of the whole response, its head included
    delay_s: float = 0.0
    until_released: bool = False
    message: str = RUNNER_DIED
    bad_line: bytes = b'{"model":"fake","created_at":"2026-'
    piece_bytes: int = 1
    hits: int = 0  # how many requests it has hit
    seen: int = 0  # how many requests it has matched
    released: asyncio.Event = field(default_factory=asyncio.Event)
    on_release: list[Callable[[], None]] = field(default_factory=list)

    def release(self) -> None:
        """Let everything go on that this fault holds, now and later."""
        self.released.set()
        for action in self.on_release:
            action()
        self.on_release.clear()

    def matches(self, path: str, body: Any) -> bool:
        """Whether a request has the path and body that this fault is for."""
        if self.path is not None and self.path != path:
            return False
        return self.when is None or bool(self.when(body))


class Faults:
    """The faults of a server."""

    def __init__(self) -> None:
        self.all: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Arm a fault; returns it, so that it can be released and asked for its hits."""
        self.all.append(fault)
        return fault

    def clear(self) -> None:
        """Disarm all faults and let go what they hold."""
        for fault in self.all:
            fault.release()
        self.all.clear()

    def take(self, path: str, body: Any) -> Fault | None:
        """The fault for a request, if there is one."""
        taken: Fault | None = None
        for fault in self.all:
            if not fault.matches(path, body):
                continue
            fault.seen += 1
            if taken is None and fault.seen >= fault.nth and (fault.times is None or fault.hits < fault.times):
                fault.hits += 1
                taken = fault
        return taken
