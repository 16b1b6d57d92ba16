"""Cuts each recorded answer of a real Ollama at every byte: never a success without `done: true`.

    python -m tests.faults.answers [--step N]

The answers are served on a socket and read by the whole adapter; each is cut in order, and by a reset. The test that
`make test` runs of it, and what is checked, are in tests/unit/adapters/test_ollama_wire.py.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable

from tests.faults.table import Figures, report
from tests.faults.validators import BrokenPromiseError
from tests.unit.adapters.raw_server import raw_server
from tests.unit.adapters.test_ollama_wire import TOLD, cut_everywhere

_GROUPS = ("chat_stream", "tool_call", "thinking", "embed")


async def run(*, step: int = 1, tell: Callable[[str], None] = lambda _: None) -> Counter[str]:
    """Cuts all of them; answers with how many cuts, by what was cut. Raises BrokenPromiseError."""
    found: Counter[str] = Counter()
    for name in TOLD:
        for then_reset in (False, True):
            async with raw_server() as server:
                try:
                    cuts = await cut_everywhere(server, name, then_reset=then_reset, step=step)
                except AssertionError as error:
                    raise BrokenPromiseError(f"whole: {name}, reset {then_reset}: {error}") from error
                # The server's last task is to end by itself.
                await asyncio.sleep(0.05)
            group = next((one for one in _GROUPS if one in name), "other answers")
            found[group] += cuts
        tell(f"{name}: {found.total():,} cuts")
    return found


def figures(found: Counter[str]) -> Figures:
    """What a run showed, for people."""
    return [
        *((f"cut: {name}", f"{count:,} cuts") for name, count in sorted(found.items())),
        ("in all", f"{found.total():,} cuts of {len(TOLD)} answers: never a success without done: true"),
    ]


def main() -> int:
    """Runs it and prints what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.answers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--step", type=int, default=1, help="cut at each Nth byte only (default 1)")
    given = parser.parse_args()
    return report("answers", lambda tell: run(step=given.step, tell=tell), figures)


if __name__ == "__main__":
    sys.exit(main())
