"""Runs a part of the rig, tells how far it is, and prints what it found as a table."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tests.faults.validators import BrokenPromiseError

T = TypeVar("T")
# What was measured, and its figure.
Figures = Sequence[tuple[str, str]]
Tell = Callable[[str], None]


def tell(line: str) -> None:
    """Says how far a run is."""
    print(line, file=sys.stderr, flush=True)


def report(name: str, run: Callable[[Tell], Awaitable[T]], figures: Callable[[T], Figures]) -> int:
    """Runs a part, and prints what it found; 1 where a promise is broken."""
    try:
        found, took_s = _timed(run, name)
    except BrokenPromiseError as error:
        print(f"{name}: broken: {error}\nagain: python -m tests.faults.{name} {' '.join(sys.argv[1:])}".rstrip())
        return 1
    print_table(name, [*figures(found), ("took", f"{took_s:.0f} s; {load()}")])
    return 0


def _timed(run: Callable[[Tell], Awaitable[T]], name: str) -> tuple[T, float]:
    began = time.monotonic()

    async def go() -> T:
        return await run(lambda line: tell(f"{name}: {line}"))

    return asyncio.run(go()), time.monotonic() - began


def print_table(name: str, figures: Figures) -> None:
    """A line for each figure, under the part's name."""
    width = max(len(what) for what, _ in figures)
    print(f"\n{name}")
    for what, figure in figures:
        print(f"  {what:<{width}}  {figure}", flush=True)


def load() -> str:
    """How busy the machine is: its processors, and how many want one."""
    one, five, fifteen = os.getloadavg()
    return f"{os.cpu_count()} processors, load {one:.1f} {five:.1f} {fifteen:.1f}"
