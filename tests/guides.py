"""The guides as tests read them: their sections, code blocks and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Every page that is written for people who use, run or change the service, as a path from the root.
GUIDES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(
        [
            ROOT / "README.md",
            ROOT / "service" / "DESIGN.md",
            *(ROOT / "deploy").glob("*.md"),
            *(ROOT / "clients").glob("*.md"),
            *(ROOT / "clients").glob("*/README.md"),
        ]
    )
]
_FENCED = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
# A bar that is no border of a cell stands in code between backticks.
_CELL = re.compile(r"((?:`[^`]*`|[^|`])*)\|")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced code block."""

    guide: str
    # Its line in the guide, from 1.
    line: int
    language: str
    text: str


def text_of(guide: str) -> str:
    """A guide, whole."""
    return (ROOT / guide).read_text()


def blocks(guide: str) -> list[Block]:
    """The code blocks of a guide, in their order."""
    text = text_of(guide)
    return [
        Block(
            guide=guide, line=text.count("\n", 0, found.start()) + 1, language=found["language"], text=found["text"]
        )
        for found in _FENCED.finditer(text)
    ]


def block(guide: str, words: str) -> str:
    """The text of the one block that holds these words."""
    (only,) = [each.text for each in blocks(guide) if words in each.text]
    return only


def prose(guide: str) -> str:
    """A guide without its code blocks."""
    return _FENCED.sub("", text_of(guide))


def section(guide: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    rank = heading.partition(" ")[0]
    _, found, rest = text_of(guide).partition(f"\n{heading}\n")
    assert found, f"{guide} has no heading {heading!r}"
    return re.split(rf"^{rank} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the one table whose head begins with this cell, each a list of its cells."""
    (start,) = [found.start() for found in re.finditer(rf"^\| *{re.escape(first)} *\|", text, re.MULTILINE)]
    lines = text[start:].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in _CELL.findall(line.removeprefix("|"))] for line in lines[2:] if line[:1] == "|"]


def code_in(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)
