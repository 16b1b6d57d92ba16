"""The two streams of a command: results on standard output, all else on standard error."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.text import Text

# What does not go to a terminal is drawn this wide.
_FILE_WIDTH = 100


class OutputError(Exception):
    """What a command writes cannot be written; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """Where a command writes. Colour, and NO_COLOR and TERM=dumb against it, are rich's business."""

    out: Console
    err: Console

    @classmethod
    def standard(cls) -> Self:
        """The process's own streams, as they are now."""
        return cls(out=_console(is_error=False), err=_console(is_error=True))

    def say(self, lines: str | Iterable[str], style: str = "") -> None:
        """Writes lines to standard error as they are."""
        for line in (lines,) if isinstance(lines, str) else lines:
            write(self.err, line, style)


def _console(*, is_error: bool) -> Console:
    console = Console(stderr=is_error, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def emit(console: Console, what: RenderableType, **how: Any) -> None:
    """As `console.print`; raises OutputError where that fails. Without a reader, rich ends the command."""
    try:
        console.print(what, **how)
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from error


def write(console: Console, line: str, style: str = "") -> None:
    """Writes one line as it is: not wrapped, not cut, nothing in it read as markup. Raises OutputError."""
    if not can_write(console, line):
        line = line.encode(console.encoding, errors="replace").decode(console.encoding)
    emit(console, Text(line, style=style), soft_wrap=True)


def paint(console: Console, lines: Iterable[str]) -> None:
    """Writes a drawing or a report: headings bold, what stands right of a map's rule in colour."""
    for line in lines:
        if "│" in line:
            emit(console, painted(line), soft_wrap=True)
        else:
            write(console, line, _style_of(line))


def painted(line: str) -> Text:
    """A line of a drawing or a report in its colours."""
    name, rule, cells = line.partition("│")
    if not rule:
        return Text(line, style=_style_of(line))
    text = Text(name)
    text.append(rule, style="dim")
    text.append(cells, style="cyan")
    return text


def _style_of(line: str) -> str:
    """Bold for a heading, which does not begin with a space."""
    return "bold" if line and not line.startswith(" ") else ""


def can_write(console: Console, text: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def is_animated(console: Console) -> bool:
    """Whether a bar can move there."""
    return console.is_terminal and not console.is_dumb_terminal


def printable(text: str, *, one_line: bool = False) -> str:
    """Text without what a terminal would obey: control characters are left out, tabs and line breaks kept.

    With `one_line` those become spaces. Answers and messages come from elsewhere, and may hold anything.
    """
    if one_line:
        text = " ".join(text.split())
    return "".join(
        character
        for character in text.replace("\r\n", "\n")
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
    )
