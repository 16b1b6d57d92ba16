"""Failpoints: named places where a test makes this process fail. Nothing happens unless UNISONO_FAILPOINTS says so.

    UNISONO_FAILPOINTS="events.before_commit=kill@17,call.after_commit=error"

At its place, a rule acts at the time that `@` names, counted from 1; without one, every time. The actions:

- kill: the process ends at once, as by `kill -9`.
- error: SQLite reports that its disk cannot be written to, whether what was to be written is there or not.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from collections import Counter
from typing import Final

from sqlalchemy.exc import OperationalError

# On both sides of each commit: of what callers wait for, and of events.
PLACES: Final = ("call.before_commit", "call.after_commit", "events.before_commit", "events.after_commit")
ACTIONS: Final = ("kill", "error")
_RULE: Final = re.compile(r"([a-z_.]+)=([a-z]+)(?:@([1-9][0-9]*))?", re.ASCII)


class Failpoints:
    """What to do at which place."""

    def __init__(self, text: str) -> None:
        """Reads rules, with commas between them; raises ValueError."""
        self._rules: dict[str, list[tuple[str, int | None]]] = {}
        self._passed: Counter[str] = Counter()
        for rule in filter(None, (part.strip() for part in text.split(","))):
            written = _RULE.fullmatch(rule)
            if written is None or written[1] not in PLACES or written[2] not in ACTIONS:
                raise ValueError(
                    f"{rule!r} is not PLACE=ACTION or PLACE=ACTION@N, with one of {', '.join(PLACES)} and one of "
                    f"{', '.join(ACTIONS)}"
                )
            at = int(written[3]) if written[3] else None
            self._rules.setdefault(written[1], []).append((written[2], at))

    def __call__(self, place: str) -> None:
        """The process is at a place; raises OperationalError where a rule says so."""
        self._passed[place] += 1
        for action, at in self._rules.get(place, ()):
            if at is not None and at != self._passed[place]:
                continue
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise failure(place)


def failure(place: str) -> OperationalError:
    """What SQLite would report."""
    return OperationalError(place, None, sqlite3.OperationalError(f"disk I/O error at failpoint {place}"))
