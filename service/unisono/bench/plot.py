"""The table as a picture: an SVG, written by hand, that a README can show in light and in dark.

A line for each figure, as a multiple of the best other side's, on a logarithmic scale. Our mark has a whisker from
the least to the most of all runs; the others' marks are their medians ÷ the best one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from xml.sax.saxutils import escape

from unisono.bench.measure import Row
from unisono.bench.sides import GATHER, OLLAMA_PACKAGE, ONE_AT_A_TIME, SEMAPHORE, UNISONO

_COLOURS = {
    ONE_AT_A_TIME: "#8a8f98",
    GATHER: "#c77d2e",
    SEMAPHORE: "#4f7fb8",
    OLLAMA_PACKAGE: "#8c5fa8",
    UNISONO: "#1a7f5a",
}
_WIDTH = 900
_LEFT, _RIGHT, _TOP, _BOTTOM = 330, 110, 96, 44
_LINE, _HEADING = 22, 20
_TICKS = tuple(2.0**power for power in range(-6, 7))
_FONT = "font-family='Helvetica, Arial, sans-serif'"


def draw_plot(rows: Sequence[Row], title: str, subtitle: str) -> str:
    """The picture, as the text of an SVG file; figures without a ratio are left out."""
    shown = [row for row in rows if row.ratio is not None and row.best and row.sides[row.best].median > 0]
    names = list(dict.fromkeys(row.name for row in shown))
    marks = [relative(row) for row in shown]
    low, high = _range([value for each in marks for value in each.values()] + _whiskers(shown))
    height = _TOP + _LINE * len(shown) + _HEADING * len(names) + _BOTTOM

    def x(value: float) -> float:
        # None at all, as of loads, has no logarithm: it stands at the edge.
        share = (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low))
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    sides = [side for side in _COLOURS if any(side in each for each in marks)]
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' role='img' {_FONT}>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(20, 28, title, size=17, weight="bold"),
        _text(20, 48, subtitle, size=12, fill="#57606a"),
        *_legend(sides),
        *_axis(x, low, high, height),
    ]
    y, name = float(_TOP), ""
    for row, each in zip(shown, marks, strict=True):
        if row.name != name:
            name = row.name
            y += _HEADING
            parts.append(_text(20, y - 2, f"{name}: {row.title}", size=12, weight="bold"))
        parts += _draw_row(row, each, x, y + _LINE / 2)
        y += _LINE
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def relative(row: Row) -> dict[str, float]:
    """Each side's figure as a multiple of the best other side's; ours as the median of the runs' own ratios."""
    best = row.sides[row.best].median
    found = {side: spread.median / best for side, spread in row.sides.items() if spread.median > 0}
    if row.ratio is not None:
        found[UNISONO] = row.ratio.median
    return found


def _whiskers(rows: Iterable[Row]) -> list[float]:
    return [end for row in rows if row.ratio for end in (row.ratio.low, row.ratio.high)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ticks that enclose all values; at least from a half to two."""
    shown = [value for value in values if value > 0]
    least, most = min([0.5, *shown]), max([2.0, *shown])
    low = max((tick for tick in _TICKS if tick <= least), default=least)
    high = min((tick for tick in _TICKS if tick >= most), default=most)
    return low, high


def _axis(place: Callable[[float], float], low: float, high: float, height: int) -> list[str]:
    bottom = height - _BOTTOM
    parts: list[str] = []
    for tick in (tick for tick in _TICKS if low <= tick <= high):
        at = place(tick)
        is_one = tick == 1
        colour, width = ("#57606a", 1.5) if is_one else ("#d8dee4", 1)
        parts.append(
            f"<line x1='{at:.1f}' y1='{_TOP}' x2='{at:.1f}' y2='{bottom}' stroke='{colour}' stroke-width='{width}'/>"
        )
        label = f"{tick:g}×" if tick >= 1 else f"1/{1 / tick:g}×"
        parts.append(_text(at, bottom + 16, label, size=11, anchor="middle", fill="#57606a"))
    note = "less is better; 1× is the best of the others"
    parts.append(_text(_LEFT, height - 10, note, size=11, fill="#57606a"))
    return parts


def _draw_row(row: Row, marks: Mapping[str, float], place: Callable[[float], float], y: float) -> list[str]:
    parts = [_text(32, y + 4, row.figure.value, size=12, fill="#57606a")]
    for side, value in marks.items():
        at = place(value)
        if side != UNISONO:
            parts.append(
                f"<circle cx='{at:.1f}' cy='{y:.1f}' r='4.5' fill='#ffffff' stroke='{_COLOURS[side]}' "
                f"stroke-width='2'>"
                f"<title>{escape(side)}: {value:.2f}×</title></circle>"
            )
    if row.ratio is not None:
        low, high, at = place(row.ratio.low), place(row.ratio.high), place(row.ratio.median)
        colour = _COLOURS[UNISONO]
        parts.append(
            f"<line x1='{low:.1f}' y1='{y:.1f}' x2='{high:.1f}' y2='{y:.1f}' stroke='{colour}' stroke-width='3' "
            "stroke-linecap='round'/>"
        )
        parts.append(
            f"<circle cx='{at:.1f}' cy='{y:.1f}' r='6' fill='{colour}'>"
            f"<title>unisono: {row.ratio.median:.2f}× ({row.ratio.low:.2f} to {row.ratio.high:.2f})</title></circle>"
        )
        parts.append(
            _text(_WIDTH - 20, y + 4, f"{row.ratio.median:.2f}×", size=13, anchor="end", weight="bold", fill=colour)
        )
    return parts


def _legend(sides: Sequence[str]) -> list[str]:
    parts: list[str] = []
    at = 20.0
    for side in sides:
        colour = _COLOURS[side]
        fill = colour if side == UNISONO else "#ffffff"
        parts.append(f"<circle cx='{at + 6:.1f}' cy='70' r='5' fill='{fill}' stroke='{colour}' stroke-width='2'/>")
        parts.append(_text(at + 17, 74, side, size=12))
        at += 32 + 6.6 * len(side)
    return parts


def _text(
    x: float, y: float, text: str, *, size: int, weight: str = "normal", fill: str = "#1f2328", anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{fill}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )
