"""Runs a part of the rig, tells how far it is, and prints what it found as a table."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.faults.validators import BrokenPromiseError

T = TypeVar("T")
# What was measured, and its figure.
Figures = Sequence[tuple[str, str]]
Tell = Callable[[str], None]


class SkippedError(Exception):
    """This machine cannot show it; the message says why."""


@dataclass(frozen=True)
class Part:
    """What came of a part."""

    name: str
    figures: Figures
    is_broken: bool = False


def tell(line: str) -> None:
    """Says how far a run is."""
    print(line, file=sys.stderr, flush=True)


def run_part(name: str, run: Callable[[Tell], Awaitable[T]], figures: Callable[[T], Figures]) -> Part:
    """Runs a part to its end, whatever that is."""
    began = time.monotonic()

    async def go() -> T:
        return await run(lambda line: tell(f"{name}: {line}"))

    try:
        found = asyncio.run(go())
    except SkippedError as skipped:
        return Part(name, [("skipped", str(skipped))])
    except Exception as error:  # noqa: BLE001 - a part that fails costs no other one
        if not isinstance(error, BrokenPromiseError):
            traceback.print_exception(error)
        again = f"python -m {name_of_run()} {' '.join(sys.argv[1:])}".rstrip()
        return Part(name, [("broken", str(error) or repr(error)), ("again", again)], is_broken=True)
    took = f"{time.monotonic() - began:.0f} s; {load()}"
    return Part(name, [*figures(found), ("took", took)])


def name_of_run() -> str:
    """The module that was started."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else sys.argv[0]


def report(name: str, run: Callable[[Tell], Awaitable[T]], figures: Callable[[T], Figures]) -> int:
    """Runs a part, and prints what it found; 1 where a promise is broken."""
    part = run_part(name, run, figures)
    print_table(part.name, part.figures)
    return 1 if part.is_broken else 0


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
