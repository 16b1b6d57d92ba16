"""The pass map: which item took part in which forward pass, drawn with characters.

A row an item, a column a pass; where there are more passes than columns, a column is a bin of passes and a cell
shows the share of them that the item took part in. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

DEFAULT_ROWS = 40
_NAME_WIDTH = 16
# Below this the names would leave nothing for the map.
_LEAST_COLUMNS = 10
# Rows stand under their heading.
_INDENT = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPass:
    """One forward pass."""

    # The group; passes of one runner.
    group: int
    # The items that took part, by index.
    items: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signs:
    """The characters of a drawing."""

    # Cells for a share of 1, of three quarters, a half, a quarter, and more than nothing.
    shades: tuple[str, str, str, str, str]
    left: str
    corner: str
    line: str
    cut: str


_UNICODE = _Signs(shades=("█", "▓", "▒", "░", "·"), left="│", corner="└", line="─", cut="…")
_ASCII = _Signs(shades=("#", "=", "+", "-", "."), left="|", corner="+", line="-", cut="~")
_SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass(slots=True)
class _Row:
    """One item's part in the bins of its group."""

    index: int
    first: int
    last: int
    # Passes of each bin that the item took part in.
    bins: list[int]


def draw_pass_map(
    passes: Iterable[MapPass],
    names: Mapping[int, str],
    width: int,
    *,
    unicode: bool = True,
    headings: Mapping[int, str] | None = None,
    rows: int | None = DEFAULT_ROWS,
) -> list[str]:
    """The map's lines, each at most `width` cells wide (and 40 at least); none where there was no pass.

    `passes` in the order of time within each group; `names` by index; drawn in ASCII unless in `unicode`; `headings`
    by group; `rows` at most in each group, None for all.
    """
    groups: dict[int, list[MapPass]] = {}
    for each in passes:
        groups.setdefault(each.group, []).append(each)
    signs = _UNICODE if unicode else _ASCII
    lines: list[str] = []
    is_binned = False
    for number, members in sorted(groups.items()):
        indexes = {index for each in members for index in each.items}
        name_width = min(_NAME_WIDTH, max([5, *(cell_len(_name(names, index)) for index in indexes)]))
        columns = max(_LEAST_COLUMNS, max(width, 40) - len(_INDENT) - name_width - 2)
        bins = min(len(members), columns)
        is_binned |= bins < len(members)
        heading = (headings or {}).get(number) or f"group {number}"
        lines += ["", *_draw_heading(heading, len(members), bins, max(width, 40), signs)]
        lines += _draw_group(members, names, name_width=name_width, bins=bins, limit=rows, signs=signs)
    if not lines:
        return []
    return [*lines[1:], "", _draw_legend(signs, is_binned=is_binned)]


def _draw_heading(heading: str, count: int, bins: int, width: int, signs: _Signs) -> list[str]:
    if bins == count:
        scale = f"{count} {'passes' if count > 1 else 'pass'}, a column each"
    else:
        scale = f"{count} passes in {bins} columns of about {count / bins:.1f}"
    if cell_len(heading) + cell_len(scale) + 2 <= width:
        return [f"{heading}: {scale}"]
    return [_fit(heading, width, signs).rstrip(), f"  {scale}"]


def _draw_group(
    members: list[MapPass],
    names: Mapping[int, str],
    *,
    name_width: int,
    bins: int,
    limit: int | None,
    signs: _Signs,
) -> list[str]:
    total = len(members)
    sizes = [_start(column + 1, total, bins) - _start(column, total, bins) for column in range(bins)]
    found: dict[int, _Row] = {}
    sums = [0] * bins
    column = 0
    for number, each in enumerate(members):
        while number >= _start(column + 1, total, bins):
            column += 1
        for index in each.items:
            row = found.get(index)
            if row is None:
                row = found[index] = _Row(index=index, first=number, last=number, bins=[0] * bins)
            row.last = number
            row.bins[column] += 1
        sums[column] += len(each.items)

    ordered = sorted(found.values(), key=lambda row: (row.first, row.last, row.index))
    shown = ordered if limit is None else ordered[:limit]
    lines = []
    for row in shown:
        name = _fit(_name(names, row.index), name_width, signs)
        lines.append(f"{_INDENT}{name} {signs.left}{_draw_cells(row.bins, sizes, signs)}".rstrip())
    if len(shown) < len(ordered):
        dots = _fit(signs.cut * 3 if signs.cut != "…" else "…", name_width, signs)
        lines.append(
            f"{_INDENT}{dots} {signs.left} {len(ordered) - len(shown)} more items (--passes all shows every one)"
        )
    lines.append(f"{_INDENT}{' ' * name_width} {signs.corner}{signs.line * bins}")
    lines += _draw_sums(sums, sizes, name_width)
    return lines


def _start(column: int, total: int, bins: int) -> int:
    """The first pass of a bin: bins of almost the same size."""
    return column * total // bins


def _draw_cells(counts: list[int], sizes: list[int], signs: _Signs) -> str:
    return "".join(_shade(count / size, signs) for count, size in zip(counts, sizes, strict=True))


def _shade(share: float, signs: _Signs) -> str:
    if share <= 0:
        return " "
    for least, sign in zip(_SHARES, signs.shades, strict=False):
        if share >= least:
            return sign
    return signs.shades[-1]


def _draw_sums(sums: list[int], sizes: list[int], name_width: int) -> list[str]:
    """How many items were in each column, on average for a bin; a number is read downwards."""
    means = [str(round(total / size)) for total, size in zip(sums, sizes, strict=True)]
    height = max(len(mean) for mean in means)
    lines = []
    for line in range(height):
        label = "items" if line == 0 else ""
        digits = "".join(mean.rjust(height)[line] for mean in means)
        lines.append(f"{_INDENT}{label.rjust(name_width)}  {digits}".rstrip())
    return lines


def _draw_legend(signs: _Signs, *, is_binned: bool) -> str:
    full, three, half, quarter, some = signs.shades
    if is_binned:
        key = f"{full} in every pass of the column, {three} in ¾, {half} ½, {quarter} ¼, {some} fewer"
        if signs is _ASCII:
            key = key.replace("¾", "3/4").replace("½", "1/2").replace("¼", "1/4")
    else:
        key = f"{full} the item took part in the pass"
    return f"{_INDENT}{key}; items: how many did (read downwards)."


def _name(names: Mapping[int, str], index: int) -> str:
    return names.get(index) or f"#{index}"


def _fit(text: str, width: int, signs: _Signs) -> str:
    """The text in exactly so many cells; what is cut shows that it is."""
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1).rstrip() + signs.cut
    return set_cell_size(text, width)
