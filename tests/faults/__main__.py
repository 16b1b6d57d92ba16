"""The whole rig, one part after the other: `make faults`.

    python -m tests.faults [--part NAME …] [--few] [--seed N] [--random N] [--each N] [--errors N] [--items N]

Prints how far it is, and all figures at the end. Exits with 1 where a promise was broken: with which, and the command
that shows it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from tests.faults import answers, cuts, disk, kills, links, outages
from tests.faults.table import Part, load, print_table, run_part, tell

PARTS = ("kills", "outages", "links", "cuts", "disk", "answers")


def parts(given: argparse.Namespace) -> dict[str, Callable[[], Part]]:
    """What each part runs with; `--few`: a tenth of everything, and short outages."""
    few = bool(given.few)
    planned = kills.plan(
        random_kills=given.random if given.random is not None else 10 if few else 100,
        each=given.each if given.each is not None else 1 if few else 10,
        errors=given.errors if given.errors is not None else 1 if few else 10,
        seed=given.seed,
    )
    away, patience = ((0.0, 0.5, 3.0), (60.0, 1.0)) if few else ((0.0, 5.0, 60.0), (120.0, 20.0))
    return {
        "answers": lambda: run_part(
            "answers", lambda tell: answers.run(step=10 if few else 1, tell=tell), answers.figures
        ),
        "cuts": lambda: run_part(
            "cuts", lambda tell: cuts.run(positions=20 if few else 200, tell=tell), cuts.figures
        ),
        "links": lambda: run_part(
            "links", lambda tell: links.run(cuts=2 if few else 20, seed=given.seed, tell=tell), links.figures
        ),
        "disk": lambda: run_part("disk", lambda tell: disk.run(times=2 if few else 20, tell=tell), disk.figures),
        "outages": lambda: run_part(
            "outages",
            lambda tell: outages.run(kills=6 if few else 30, away=away, patience=patience, tell=tell),
            outages.figures,
        ),
        "kills": lambda: run_part(
            "kills", lambda tell: kills.run(planned, items=given.items, tell=tell), kills.figures
        ),
    }


def main() -> int:
    """Runs the parts and prints what they found."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given several times")
    parser.add_argument("--few", action="store_true", help="a tenth of everything, and short outages")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other instants (default 1)")
    parser.add_argument("--random", type=int, help="kills of the service at random instants (default 100)")
    parser.add_argument("--each", type=int, help="kills at each failpoint (default 10)")
    parser.add_argument("--errors", type=int, help="kills after writes that failed (default 10)")
    parser.add_argument("--items", type=int, default=300, help="items of the killed service's batches (default 300)")
    given = parser.parse_args()
    began = time.monotonic()
    runs = parts(given)
    found: list[Part] = []
    for name in given.part or PARTS:
        tell(f"{name}: begins, after {time.monotonic() - began:.0f} s")
        found.append(runs[name]())
    for part in found:
        print_table(part.name, part.figures)
    broken = [part.name for part in found if part.is_broken]
    print(f"\n{len(found)} parts in {time.monotonic() - began:.0f} s, {load()}")
    print(f"broken: {', '.join(broken)}" if broken else "every promise was kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
