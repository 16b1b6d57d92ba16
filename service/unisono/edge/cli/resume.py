"""The output of a run that was broken off: which items it has an answer of, and where it can be gone on with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unisono.edge.cli.errors import ExitCode, StopError

# How each line of results begins: the second name tells it from a line that asks.
_BEGINNING = b'{"id":"'
_ID = re.compile(rb'\{"id":"(?:[^"\\]|\\.)*"')
_SECOND = (b',"index":', b',"custom_id":')


@dataclass(frozen=True, slots=True, kw_only=True)
class Former:
    """What an output file held."""

    # Ids of items that were answered.
    answered: frozenset[str]
    # Whether its last line was broken off, and is cut from it.
    was_torn: bool


class _Response(msgspec.Struct):
    status_code: int = 0


class _Line(msgspec.Struct):
    """What tells of a line of results how its item ended, in either form."""

    # None: it is not a plain one's.
    state: str | None = None
    id: str = ""
    custom_id: str | None = None
    # Not there at all: a line that asks.
    response: _Response | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def is_ours(self) -> bool:
        """Whether `run` has written it."""
        if self.custom_id is not None:
            return self.response is not msgspec.UNSET
        return self.state is not None and self.id != ""

    @property
    def answered(self) -> str | None:
        """The id of its item, where that was answered."""
        if self.custom_id is None:
            return self.id if self.state == "completed" else None
        return self.custom_id if isinstance(self.response, _Response) and self.response.status_code == 200 else None


def take_up(output: str) -> Former:
    """Reads the file, and makes it end with a whole line; where there is none, nothing was answered.

    Raises StopError where it cannot be read, or is no output of `run`: then it is left as it is.
    """
    path = Path(output)
    try:
        return _take_up(path)
    except FileNotFoundError:
        return Former(answered=frozenset(), was_torn=False)
    except OSError as error:
        raise StopError(f"{path} cannot be read: {error.strerror}", code=ExitCode.USAGE) from error


def _take_up(path: Path) -> Former:
    answered: set[str] = set()
    decoder = msgspec.json.Decoder(_Line)
    whole = 0
    text = b""
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            try:
                line = decoder.decode(text)
            except msgspec.MsgspecError:
                if text.endswith(b"\n") or not _may_be_torn(text):
                    raise _not_ours(path, number) from None
                break
            if not line.is_ours:
                raise _not_ours(path, number)
            whole += len(text)
            if line.answered is not None:
                answered.add(line.answered)
    is_torn = whole < path.stat().st_size
    if is_torn:
        os.truncate(path, whole)
    elif text and not text.endswith(b"\n"):
        with path.open("ab") as end:
            end.write(b"\n")
    return Former(answered=frozenset(answered), was_torn=is_torn)


def _may_be_torn(text: bytes) -> bool:
    """Whether a last line is the beginning of one of ours."""
    if (item_id := _ID.match(text)) is None:
        return text.startswith(_BEGINNING) or _BEGINNING.startswith(text)
    rest = text[item_id.end() :]
    return any(rest.startswith(second) or second.startswith(rest) for second in _SECOND)


def _not_ours(path: Path, number: int) -> StopError:
    return StopError(
        f"{path}, line {number}: no result of `unisono run`, so nothing is appended to it. Name the output of the "
        "run that was broken off.",
        code=ExitCode.USAGE,
    )
