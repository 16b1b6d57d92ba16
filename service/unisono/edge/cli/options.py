"""What the commands share of how options are read, and of how a command ends."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

import typer

from unisono.core.durations import parse_duration
from unisono.edge.cli.terminal import Terminal

# Runs a command to its end and ends the process as it says.
Finish = Callable[[Callable[[Terminal], Coroutine[object, object, int]]], None]


def seconds(text: str) -> float:
    """A duration as people write it, "90s" or "1h30m". Raises typer.BadParameter."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
