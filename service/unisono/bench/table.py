"""What was measured, as lines of text: a block for each workload, a line for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unisono.bench.measure import Measured, Row
from unisono.bench.sides import GATHER, OLLAMA_PACKAGE, ONE_AT_A_TIME, SEMAPHORE, UNISONO
from unisono.bench.workloads import Figure
from unisono.core.benchmark import Spread

_ORDER = (ONE_AT_A_TIME, GATHER, SEMAPHORE, OLLAMA_PACKAGE, UNISONO)
_FIGURE_WIDTH = 30
_CELL_WIDTH = 14
_RATIO_WIDTH = 20


def draw_table(measured: Measured, facts: Mapping[str, object]) -> list[str]:
    """The table's lines: what it was measured on, the figures, and what there is to say about them."""
    sides = [side for side in _ORDER if any(side in row.sides for row in measured.rows)]
    lines = [", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, "")), ""]
    lines.append(_head(sides))
    name = ""
    for row in measured.rows:
        if row.name != name:
            name = row.name
            lines.append(f"{name}: {row.title}")
        lines.append(_line(row, sides))
    if measured.rows:
        lines += ["", *_EXPLANATION]
    lines += [f"  note: {note}" for note in measured.notes]
    return lines


_EXPLANATION = (
    "  Each cell is the median of the runs. The last column is unisono ÷ the best of the others in each run (one",
    "  at a time left out): its median, and from the least to the most. Below 1 unisono is better.",
)


def _head(sides: Sequence[str]) -> str:
    cells = "".join(f"{side:>{_CELL_WIDTH + 1}}" for side in sides)
    return f"{'':<{_FIGURE_WIDTH}}{cells}{'÷ best':>{_RATIO_WIDTH}}"


def _line(row: Row, sides: Sequence[str]) -> str:
    cells = "".join(f"{_cell(row.sides.get(side), row.figure):>{_CELL_WIDTH + 1}}" for side in sides)
    return f"  {row.figure.value:<{_FIGURE_WIDTH - 2}}{cells}{_ratio(row.ratio):>{_RATIO_WIDTH}}".rstrip()


def _cell(found: Spread | None, figure: Figure) -> str:
    if found is None:
        return "–"
    if figure in (Figure.LOST, Figure.LOADS):
        return f"{found.median:,.0f}"
    return number(found.median)


def _ratio(found: Spread | None) -> str:
    if found is None:
        return "–"
    if found.count == 1:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


def number(value: float) -> str:
    """Three figures that matter: 0.0123, 1.23, 12.3, 1,234."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.4f}"
