"""The arithmetic of measurements: spreads, ratios, what a model gains by sharing passes, and what to set.

Theory of operation. Batches of 1, 2, 4 … equal items are run in turn, several times. Each size is a *step*: how long
an answer took, how many tokens came a second, and how many times as many as with the first size. Where larger batches
bring less than a tenth more, the gain is flat: more slots than that only reserve memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

# A larger batch that brings less than this many times the tokens a second brings nothing worth having.
WORTH_HAVING = 1.1
# Where the last doubling brought so much, another one may bring something too.
STILL_GROWING = 1.2
# What to try where a backend answers one request at a time.
FIRST_SLOTS = 8
# Source: the 97.5 % point of the normal distribution, for intervals of 95 %.
_Z95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure, measured several times."""

    median: float
    # The smallest and the largest.
    low: float
    high: float
    # How often it was measured.
    count: int


def spread(values: Iterable[float]) -> Spread:
    """The median and the extremes of some values; ValueError where there are none."""
    found = sorted(values)
    if not found:
        raise ValueError("nothing was measured")
    return Spread(median=median(found), low=found[0], high=found[-1], count=len(found))


def ratios(ours: Mapping[int, float], others: Iterable[Mapping[int, float]]) -> list[float]:
    """Ours ÷ the smallest of the others, run by run; runs in which either is missing or 0 are left out.

    The best of the others is looked for in each run anew, so ours wins no run in which another way was better.
    """
    found: list[float] = []
    rivals = list(others)
    for run, value in sorted(ours.items()):
        theirs = [rival[run] for rival in rivals if run in rival]
        best = min(theirs, default=0.0)
        if best > 0:
            found.append(value / best)
    return found


def share_between(count: int, total: int) -> tuple[float, float]:
    """Between which shares the true one lies in 95 of 100 cases, where `count` of `total` were seen.

    Source: Wilson, 1927, the score interval; unlike the usual formula it is right near 0 and 1 and for few cases.
    """
    if not total:
        return 0.0, 1.0
    share = count / total
    square = _Z95**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    return max(0.0, middle - half), min(1.0, middle + half)


# -- What a model gains ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """One batch of equal items that was run to its end."""

    items: int
    # From the call to the last result.
    duration_s: float
    # How long each answer took, from its release to its end.
    latencies_s: tuple[float, ...]
    completion_tokens: int
    # Forward passes; None where nobody counted them.
    passes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What batches of one size gave."""

    items: int
    duration_s: Spread
    # Of the median answer of each batch.
    latency_s: Spread
    tokens_per_s: Spread
    # Tokens a second, as a multiple of the first step's.
    gain: float
    # Tokens ÷ passes; None where no passes were counted.
    items_per_pass: float | None


def steps_of(runs: Iterable[BatchRun]) -> tuple[Step, ...]:
    """The steps, by size; batches that gave no token or took no time count for nothing."""
    by_size: dict[int, list[BatchRun]] = {}
    for run in runs:
        if run.completion_tokens > 0 and run.duration_s > 0 and run.latencies_s:
            by_size.setdefault(run.items, []).append(run)
    steps: list[Step] = []
    for items, found in sorted(by_size.items()):
        speed = spread(run.completion_tokens / run.duration_s for run in found)
        shared = [run.completion_tokens / run.passes for run in found if run.passes]
        steps.append(
            Step(
                items=items,
                duration_s=spread(run.duration_s for run in found),
                latency_s=spread(median(run.latencies_s) for run in found),
                tokens_per_s=speed,
                gain=speed.median / steps[0].tokens_per_s.median if steps else 1.0,
                items_per_pass=median(shared) if shared else None,
            )
        )
    return tuple(steps)


def flattens_at(steps: Sequence[Step], worth_having: float = WORTH_HAVING) -> int | None:
    """The smallest size beyond which no larger one brings `worth_having` times as much; None: not seen.

    The largest size that was measured is never the answer: nobody knows what a larger one would have brought.
    """
    for place, step in enumerate(steps[:-1]):
        if all(later.gain < worth_having * step.gain for later in steps[place + 1 :]):
            return step.items
    return None


def best_size(steps: Sequence[Step]) -> int:
    """How many items at a time to send: where the gain is flat, else the most that were measured; 0 for no steps."""
    return flattens_at(steps) or (steps[-1].items if steps else 0)


class AdviceKind(Enum):
    """What to do about the number of slots."""

    # One request is answered at a time: start the backend with more slots.
    RAISE = "raise"
    # The last doubling still brought much: try more slots.
    TRY_MORE = "try_more"
    # Fewer slots than there are would do as well.
    FEWER_DO = "fewer_do"
    # As it should be.
    RIGHT = "right"
    # The number of slots is not known, only where the gain is flat.
    FLAT = "flat"
    # Neither is known.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to do, and the number that belongs to it: of slots to start the backend with."""

    kind: AdviceKind
    slots: int | None


def advise(steps: Sequence[Step], slots: int | None) -> Advice:
    """What the steps say about the number of slots; `slots`: how many there are, None where that is not known.

    1. Not known how many there are: as many as where the gain is flat.
    2. One: nothing can be shared.
    3. The gain is flat below what there is: fewer do.
    4. Batches of half as many items brought much less than batches that fill the slots: more may bring more.
    5. All is well.
    """
    flat = flattens_at(steps)
    if slots is None:
        return Advice(kind=AdviceKind.UNKNOWN if flat is None else AdviceKind.FLAT, slots=flat)
    if slots == 1:
        return Advice(kind=AdviceKind.RAISE, slots=FIRST_SLOTS)
    if flat is not None and flat < slots:
        return Advice(kind=AdviceKind.FEWER_DO, slots=flat)
    full = [step for step in steps if step.items <= slots]
    half = [step for step in steps if step.items <= slots // 2]
    if half and full[-1].gain >= STILL_GROWING * half[-1].gain:
        return Advice(kind=AdviceKind.TRY_MORE, slots=slots * 2)
    return Advice(kind=AdviceKind.RIGHT, slots=slots)


def describe_advice(advice: Advice, *, is_ollama: bool = True) -> str:
    """The advice as a sentence. What is not an Ollama is told of its number of slots alone."""
    number = advice.slots
    start = f"start Ollama with OLLAMA_NUM_PARALLEL={number}" if is_ollama else f"give the engine {number} slots"
    return {
        AdviceKind.RAISE: f"It answers one request at a time: {start}.",
        AdviceKind.TRY_MORE: f"The last slots still brought much: {start}, and measure again.",
        AdviceKind.FEWER_DO: f"Fewer slots do as well and need less memory: {start}.",
        AdviceKind.RIGHT: f"Its {number} slots are right: leave them as they are.",
        AdviceKind.FLAT: f"More than {number} at a time bring nothing: {start}.",
        AdviceKind.UNKNOWN: "None yet: measure larger batches, or say how many slots there are (UNISONO_SLOTS).",
    }[advice.kind]
