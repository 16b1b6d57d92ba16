"""Signals that end a command: as Ctrl-C does, so that a terminal is left as it was, and what goes on is told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine

# A shell's name for a program that a signal has ended.
_SIGNALLED = 128


def ending_signals() -> list[signal.Signals]:
    """Those beside Ctrl-C's; not the hang-up where it is to be outlived, as nohup wants it."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def exit_code_of(number: int) -> int:
    """How a command ends that a signal has ended."""
    return _SIGNALLED + number


async def until_signalled(work: Coroutine[object, object, int]) -> int:
    """The exit code of some work, which a signal cancels; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    numbers = ending_signals()
    task = asyncio.ensure_future(work)
    came: list[int] = []

    def leave_alone() -> None:
        for number in numbers:
            _ = loop.remove_signal_handler(number)

    def stop(number: int) -> None:
        came.append(number)
        leave_alone()
        _ = task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not came:
            raise
        return exit_code_of(came[0])
    finally:
        leave_alone()
