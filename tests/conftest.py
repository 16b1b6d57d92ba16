"""What every test shares: hypothesis profiles, and a count of what was skipped and why."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.engine import embedded_backend

# One engine for the whole run: every folder of tests can ask for it.
__all__ = ["embedded_backend"]

# No test writes into the home of whoever runs it; those of such folders say where they are.
os.environ["UNISONO_STATE_DIR"] = os.environ["UNISONO_DATA_DIR"] = "none"

# CI repeats the same examples and does not judge by the clock; at the desk each run tries new ones.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("desk", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Ends the run's summary with one line that says how many tests were skipped, for each reason."""
    yield
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(reason_of(report) for report in reports)
    if reasons:
        counts = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped {reasons.total()}: {counts}")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason that the test gave, without pytest's own prefix."""
    where = report.longrepr
    text = where[2] if isinstance(where, tuple) else str(where)
    return text.removeprefix("Skipped: ")


def pytest_configure() -> None:
    """Children are interrupted by Ctrl-C's signal, also where this run itself is not: in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        _ = signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def heeds_hangup() -> Iterator[None]:
    """Children are told of a hang-up, also where this run itself is not to be (nohup)."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        _ = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    _ = signal.signal(signal.SIGHUP, before)
