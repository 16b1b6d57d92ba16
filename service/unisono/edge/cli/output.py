"""Where a command's results and progress go, so that the two do not meet."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from unisono.edge.cli.errors import ExitCode, StopError
from unisono.edge.cli.outlets import Answers, JsonLines, Outlet
from unisono.edge.cli.progress import Bar, Display, Lines, Meter
from unisono.edge.cli.terminal import Terminal, is_animated


def open_output(
    output: str | None, terminal: Terminal, stack: ExitStack, *, source: str = "", appends: bool = False
) -> tuple[Outlet, Display, Meter]:
    """Where results go, and where progress is shown. Raises StopError.

    `output`: a path, "-" for lines on standard output, None for lines there too, or answers where it is a terminal.
    `source`: the file that is read, which may not be written to. `appends`: what the file holds stays.

    1. Answers on a terminal: the bar moves below them, on the same console, which keeps them apart.
    2. Lines that go to a terminal: nothing may move among them, so progress is lines too.
    3. Lines that go elsewhere: the bar has standard error for itself.
    """
    meter = Meter()
    shows_answers = output is None and terminal.out.is_terminal
    outlet: Outlet
    if shows_answers:
        outlet = Answers(terminal.out)
    elif output is None or output == "-":
        if sys.stdout is None:
            what = "Standard output is closed: name a file for the results with --output."
            raise StopError(what, code=ExitCode.USAGE)
        outlet = JsonLines(sys.stdout.buffer)
        stack.callback(drop_output)
    else:
        outlet = JsonLines(stack.enter_context(_create(output, source)), replaces=not appends)
    console = terminal.out if shows_answers else terminal.err
    is_still = output == "-" and terminal.out.is_terminal
    display: Display = Lines(meter, terminal.err)
    if terminal.err.is_terminal and is_animated(console) and not is_still:
        display = Bar(meter, console)
    return outlet, display, meter


def empty_output(output: str | None) -> None:
    """Nothing was to be written: what an output file held is of another time. Raises StopError."""
    if output is None or output == "-":
        return
    try:
        os.truncate(output, 0)
    except OSError as error:
        raise StopError(f"{output} cannot be written: {error.strerror}", code=ExitCode.USAGE) from error


def refuse_source(output: str, source: str) -> None:
    """Raises StopError where the output is the file that is read."""
    path = Path(output)
    with suppress(OSError):
        if source and path.samefile(source):
            raise StopError(f"{path} is the file that is read; name another for the results.", code=ExitCode.USAGE)


def _create(output: str, source: str) -> BinaryIO:
    """The output file, as it is; never the input. It is emptied when there is a result to write, and not before."""
    refuse_source(output, source)
    path = Path(output)
    try:
        return path.open("ab")
    except OSError as error:
        raise StopError(f"{path} cannot be written: {error.strerror}", code=ExitCode.USAGE) from error


def drop_output() -> None:
    """Writes what standard output still holds; where that cannot be, keeps Python from complaining at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        # Whoever wrote has been told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
