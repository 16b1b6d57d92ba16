"""How many passes a family's items take on so many lanes, if each goes to the lane that falls free first.

Theory of operation. Lanes that share work evenly would all end at one *level*: what they have to do anyway, and the
work poured over it like water. Work comes in pieces, though, and the last piece of a lane sticks out: 16 answers of
24 tokens take 48 passes on eight lanes, but 72 on seven, as on six. So a lane more may save nothing, where two more
save a round; only whoever counts in pieces sees that. Answers of different lengths fill each other's gaps, the more
so the more they differ: then the level itself is near the truth.
"""

from __future__ import annotations

from itertools import pairwise
from math import floor

# Pieces smaller than this part of the mean answer are as good as water.
_FINE = 0.125


def grain(mean: float, deviation: float) -> float:
    """The size of the pieces in which work comes, in tokens; 0: it fills all gaps.

    `mean`, `deviation`: of the answers' lengths.
    """
    size = mean - 2 * deviation
    return size if size > _FINE * mean else 0.0


def passes(work: float, longest: float, grain: float, busy: list[float]) -> float:
    """Passes until the last of a family's items has ended.

    `work`: tokens of all its answers; `longest`: of the longest; `grain`: of the pieces, 0 for none. `busy`: for each
    lane that takes them, the passes for which it has other work.
    """
    if work <= 0:
        return 0.0
    level = _level(work, busy)
    return max(_in_pieces(work, grain, busy, level) if grain else level, min(busy) + longest)


def _level(work: float, busy: list[float]) -> float:
    """Where the water stands, over lanes of different depths."""
    depths = sorted(busy)
    volume = work
    for count, (depth, above) in enumerate(pairwise(depths), start=1):
        if (above - depth) * count >= volume:
            return depth + volume / count
        volume -= (above - depth) * count
    return depths[-1] + volume / len(depths)


def _in_pieces(work: float, grain: float, busy: list[float], level: float) -> float:
    """When the last piece ends: whole pieces below the level, and the others where they stick out least."""
    count = max(1, round(work / grain))
    whole = [max(0, floor((level - depth) / grain + 1e-6)) for depth in busy]
    rest = count - sum(whole)
    ends = [depth + number * grain for depth, number in zip(busy, whole, strict=True) if number]
    more = sorted(depth + (number + 1) * grain for depth, number in zip(busy, whole, strict=True))
    return more[min(rest, len(more)) - 1] if rest > 0 else max(ends)
