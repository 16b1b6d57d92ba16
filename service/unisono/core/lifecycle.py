"""Which phases an item passes through, and which steps lead from one to the next.

Theory of operation: everything that may happen to an item is a row of `_STEPS`. The conductor moves items only
by `after`, so a step that is not in the table is a defect that shows at once instead of a lost item.

            stage          staged          release          spoke
    QUEUED ───────▶ STAGING ───────▶ STAGED ───────▶ RELEASED ───────▶ SPEAKING
      ▲                 │               │                │                │
      └──── requeue ────┴───────────────┴────────────────┴────────────────┤
      └──── requeue ──── WAITING ◀──────────── back_off ──────────────────┘
    and from every phase: end ▶ ENDED, from which nothing leads away.
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where an item is."""

    # In our queue.
    QUEUED = "queued"
    # A connection is being opened for it.
    STAGING = "staging"
    # All but its last byte is sent.
    STAGED = "staged"
    # Sent; the backend has not answered yet.
    RELEASED = "released"
    # It is being answered.
    SPEAKING = "speaking"
    # It failed, and waits until it is tried again.
    WAITING = "waiting"
    # It has its outcome.
    ENDED = "ended"


class Step(Enum):
    """What happens to an item."""

    STAGE = "stage"
    STAGED = "staged"
    RELEASE = "release"
    SPEAK = "speak"
    # Back into the queue without cost: the backend was away, or a held connection closed.
    REQUEUE = "requeue"
    # Failed; again after a while.
    BACK_OFF = "back_off"
    END = "end"


_STEPS: dict[tuple[Phase, Step], Phase] = {
    (Phase.QUEUED, Step.STAGE): Phase.STAGING,
    (Phase.QUEUED, Step.END): Phase.ENDED,
    (Phase.STAGING, Step.STAGED): Phase.STAGED,
    (Phase.STAGING, Step.REQUEUE): Phase.QUEUED,
    (Phase.STAGING, Step.BACK_OFF): Phase.WAITING,
    (Phase.STAGING, Step.END): Phase.ENDED,
    (Phase.STAGED, Step.RELEASE): Phase.RELEASED,
    (Phase.STAGED, Step.REQUEUE): Phase.QUEUED,
    (Phase.STAGED, Step.BACK_OFF): Phase.WAITING,
    (Phase.STAGED, Step.END): Phase.ENDED,
    (Phase.RELEASED, Step.SPEAK): Phase.SPEAKING,
    (Phase.RELEASED, Step.REQUEUE): Phase.QUEUED,
    (Phase.RELEASED, Step.BACK_OFF): Phase.WAITING,
    (Phase.RELEASED, Step.END): Phase.ENDED,
    (Phase.SPEAKING, Step.REQUEUE): Phase.QUEUED,
    (Phase.SPEAKING, Step.BACK_OFF): Phase.WAITING,
    (Phase.SPEAKING, Step.END): Phase.ENDED,
    (Phase.WAITING, Step.REQUEUE): Phase.QUEUED,
    (Phase.WAITING, Step.END): Phase.ENDED,
}

# At the backend: what counts against a runner's limit.
IN_FLIGHT = frozenset({Phase.RELEASED, Phase.SPEAKING})


def after(phase: Phase, step: Step) -> Phase:
    """The phase that a step leads to; raises ValueError where the table has no such step."""
    try:
        return _STEPS[phase, step]
    except KeyError:
        raise ValueError(f"an item that is {phase.value} cannot {step.value}") from None
