"""What the commands share of how options are read, and of how a command ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Annotated

import typer

from unisono.core.durations import parse_duration
from unisono.edge.cli.connect import DEFAULT_SERVER
from unisono.edge.cli.terminal import Terminal

# Runs a command to its end and ends the process as it says.
Finish = Callable[[Callable[[Terminal], Coroutine[object, object, int]]], None]


class Togetherness(StrEnum):
    """How closely together items run. A file is read as it is sent, so nobody can promise one wave for all."""

    FASTEST = "fastest"
    TOGETHER = "together"


class Rank(StrEnum):
    """Which batches go first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


def seconds(text: str) -> float:
    """A duration as people write it, "90s" or "1h30m". Raises typer.BadParameter."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise typer.BadParameter(f"{text!r} is no number above 0")
    return rate


def _rows(text: str) -> str:
    if text != "all" and not (text.isascii() and text.isdigit() and int(text[:9]) > 0):
        raise typer.BadParameter(f"{text!r} is neither a number of rows nor the word all")
    return text


def rows_of(text: str) -> int | None:
    """The rows of `Passes`; None: all."""
    return None if text == "all" else int(text)


def within(name: str, value: int | None, bits: int) -> int | None:
    """A number that the contract's field can hold. Raises typer.BadParameter."""
    if value is not None and not -(2**bits) <= value < 2**bits:
        raise typer.BadParameter(f"{value} is too large for {name}")
    return value


# -- Which service -------------------------------------------------------------------------------------------------

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help=f"The service to use. [UNISONO_SERVER, or {DEFAULT_SERVER}]"),
]
Tls = Annotated[bool, typer.Option("--tls", help="Speak to the service over TLS.")]
Ca = Annotated[
    str | None,
    typer.Option("--ca", metavar="FILE", help="Over TLS, trusting the certificates (PEM) of this file."),
]
Ollama = Annotated[
    str | None,
    typer.Option("--ollama", metavar="URL", help="Start a service of one's own that uses this Ollama."),
]
Embedded = Annotated[
    bool, typer.Option("--embedded", help="Start a service of one's own that uses the embedded engine.")
]

# -- What applies to a whole batch ---------------------------------------------------------------------------------

Model = Annotated[str | None, typer.Option(help="The model of items that name none.")]
NumPredict = Annotated[int | None, typer.Option(help="The most tokens of an answer; -1: no limit.")]
Temperature = Annotated[float | None, typer.Option(help="Randomness; 0: always the likeliest token.")]
Seed = Annotated[int | None, typer.Option(help="The seed of items that name none.")]
BatchTimeout = Annotated[
    float | None,
    typer.Option("--timeout", parser=seconds, metavar="TIME", help="For the whole batch: 90s, 10m, 1h30m."),
]
ItemTimeout = Annotated[
    float | None,
    typer.Option(parser=seconds, metavar="TIME", help="For the silence of an item that has begun to speak."),
]
CoScheduling = Annotated[
    Togetherness | None,
    typer.Option(help="As fast as possible, or in waves that fill all slots at once. [fastest]"),
]
MaxConcurrency = Annotated[
    int | None, typer.Option(min=1, max=2**32 - 1, metavar="N", help="At most so many items at a time.")
]
ItemsPerSecond = Annotated[
    float | None,
    typer.Option(parser=_rate, metavar="N", help="At most so many items released in a second."),
]
Priority = Annotated[Rank | None, typer.Option(help="Which batches go first. [normal]")]
Weight = Annotated[
    int | None,
    typer.Option(min=1, max=100, metavar="N", help="The share beside other batches of the priority. [1]"),
]

# -- The pass map --------------------------------------------------------------------------------------------------

NoMap = Annotated[bool, typer.Option("--no-map", help="Draw no pass map.")]
Passes = Annotated[str, typer.Option(parser=_rows, metavar="N|all", help="Rows of the pass map in each group.")]
