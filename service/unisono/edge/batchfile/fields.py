"""JSON read with care: each field is taken by name and type, and what nobody took is refused by name.

Theory of operation: `Fields` wraps one object and knows its path in the line. Each method takes a field out and
gives its value, or None where it is absent or null; a wrong one raises `FieldError` with the field's path.
`end` refuses what is left. So a field that a reader forgets cannot be passed over in silence.
"""

from __future__ import annotations

import difflib
import json
import math
from typing import NoReturn

# What JSON calls the types that Python's reader makes of it. The order matters: a bool is an int.
_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a truth value"),
    (str, "text"),
    (int, "a whole number"),
    (float, "a number"),
    (dict, "an object"),
    (list, "a list"),
)

# The largest number that a 32-bit float holds.
_FLOAT_MAX = 3.4028234e38


class FieldError(ValueError):
    """A field is wrong: `path` says which, `problem` what is wrong and what would be right."""

    def __init__(self, path: str, problem: str, *, is_unknown: bool = False) -> None:
        """`is_unknown`: there is no such field."""
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem
        self.is_unknown = is_unknown


def parse_json(text: str) -> object:
    """A JSON value; NaN and Infinity, which are none, are refused. Raises FieldError."""
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise FieldError("", f"not JSON: {error.msg} (column {error.colno})") from None
    except FieldError:
        raise
    except RecursionError:
        raise FieldError("", "not readable: nested too deeply") from None
    except ValueError:  # a whole number of more than 4,300 digits
        raise FieldError("", "not readable: a number has too many digits") from None
    return value


def to_json(value: object, path: str) -> str:
    """A value as JSON text: keys in their order, numbers as they were read."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise FieldError(path, "nested too deeply") from None
    return check_text(text, path)


def check_text(text: str, path: str) -> str:
    r"""The text, if it can be written as UTF-8; half of a pair such as "\ud83d" cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FieldError(path, "holds half of a surrogate pair, which is not Unicode text") from None
    return text


def name_of(value: object) -> str:
    """What a value is, in words: "a list"."""
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "null")


def quote(value: object) -> str:
    """A value for an error message: at most 40 characters, no control characters."""
    text = json.dumps(value) if isinstance(value, str | int | float | bool) else name_of(value)
    return text if len(text) <= 40 else text[:39] + "…"


class Fields:
    """The fields of one JSON object; see the module."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise FieldError(path, f"must be an object, not {name_of(value)}")
        self.path = path
        # Null says nothing, so it is as good as absent, also where the name is unknown.
        self._left: dict[str, object] = {name: field for name, field in value.items() if field is not None}
        self._known: set[str] = set()

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether the field is there and nobody took it yet."""
        self._known.add(name)
        return name in self._left

    def wrong(self, name: str, problem: str) -> FieldError:
        """The error that refuses a field."""
        return FieldError(self.at(name), problem)

    def value(self, name: str) -> object:
        """Whatever is there."""
        self._known.add(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A text, which may be empty."""
        value = self.value(name)
        if value is None or isinstance(value, str):
            return value if value is None else check_text(value, self.at(name))
        raise self.wrong(name, f"must be text, not {name_of(value)}")

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(name, f"must be true or false, not {quote(value)}")

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from low to high; 8.0 is one, 8.5 is not."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, f"must be a whole number, not {quote(value)}")
        if not low <= value <= high:
            raise self.wrong(name, f"must be from {low:,} to {high:,}, not {quote(value)}")
        return value

    def number(self, name: str) -> float | None:
        """A number that a 32-bit float can hold."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, f"must be a number, not {quote(value)}")
        # 1e999 is read as infinity; comparing first spares turning a whole number of 400 digits into a float.
        if not -_FLOAT_MAX <= value <= _FLOAT_MAX or math.isnan(value):
            raise self.wrong(name, f"is too large: {quote(value)}")
        return float(value)

    def many(self, name: str) -> list[object] | None:
        """A list of anything."""
        value = self.value(name)
        if value is None or isinstance(value, list):
            return value
        raise self.wrong(name, f"must be a list, not {name_of(value)}")

    def texts(self, name: str, *, or_one: bool = False) -> list[str] | None:
        """A list of texts; with `or_one`, one text also stands for a list of it."""
        value = self.value(name)
        if value is None:
            return None
        if or_one and isinstance(value, str):
            return [check_text(value, self.at(name))]
        if not isinstance(value, list):
            raise self.wrong(name, f"must be {'text or ' if or_one else ''}a list of texts, not {name_of(value)}")
        texts: list[str] = []
        for number, text in enumerate(value):
            path = f"{self.at(name)}[{number}]"
            if not isinstance(text, str):
                raise FieldError(path, f"must be text, not {name_of(text)}")
            texts.append(check_text(text, path))
        return texts

    def child(self, name: str) -> Fields | None:
        """An object."""
        value = self.value(name)
        return None if value is None else Fields(value, self.at(name))

    def children(self, name: str) -> list[Fields] | None:
        """A list of objects."""
        values = self.many(name)
        if values is None:
            return None
        return [Fields(value, f"{self.at(name)}[{number}]") for number, value in enumerate(values)]

    def skip(self, *names: str) -> None:
        """These fields may be there, and say nothing that matters here."""
        for name in names:
            _ = self._left.pop(name, None)

    def end(self) -> None:
        """Refuses the fields that nobody took: the first by name, with the known one that looks most like it."""
        for name in self._left:
            likely = difflib.get_close_matches(name, sorted(self._known), n=1, cutoff=0.75)
            path = self.at(name if len(name) <= 60 else name[:59] + "…")
            hint = f"; did you mean {likely[0]}?" if likely else ""
            raise FieldError(path.encode(errors="replace").decode(), f"not known here{hint}", is_unknown=True)


def _refuse_constant(name: str) -> NoReturn:
    raise FieldError("", f"not JSON: {name} is no JSON number")
