"""Spans of time as people write and read them."""

from __future__ import annotations

import re

# Seconds in each unit, by every name that it may be given.
_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,  # U+00B5, the micro sign of keyboards
    "μs": 1e-6,  # U+03BC, the Greek letter that looks the same
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_PART = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zµμ]+)\s*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+", re.ASCII)

# The longest span that is taken: a century. Past it, a slip of the finger is likelier than a wish.
_LONGEST_S = 100 * 365.25 * 86400


def parse_duration(text: str) -> float:
    """The seconds in "500ms", "1.5s", "2m", "1h30m", "1 h 30 min"; a bare number means seconds.

    Raises ValueError, with a message for the reader, for anything else: no unit but those, nothing negative, and
    nothing longer than a century.
    """
    written = text.strip()
    if _NUMBER.fullmatch(written):
        seconds = float(written)
    else:
        seconds, at = 0.0, 0
        while part := _PART.match(written, at):
            if part[2] not in _UNITS:
                raise ValueError(f"{text!r} is not a duration: the units are ns, us, ms, s, m (or min), h, d")
            seconds += float(part[1]) * _UNITS[part[2]]
            at = part.end()
        if at == 0 or at < len(written):
            raise ValueError(f"{text!r} is not a duration: write it as 500ms, 30s, 10m or 1h30m")
    if seconds > _LONGEST_S:
        raise ValueError(f"{text!r} is longer than a century")
    return seconds


def format_duration(seconds: float) -> str:
    """A span for a reader, to two or three figures: "84 µs", "12 ms", "8.4 s", "2 min 5 s", "1 h 2 min"."""
    if seconds < 0:
        return "−" + format_duration(-seconds)
    if seconds < 1e-6:
        return f"{seconds * 1e9:.0f} ns" if seconds else "0 s"
    # 1. Below a minute: one unit. The bounds lie where rounding would give 1000 of the smaller one.
    for bound, unit, size in ((999.5e-6, "µs", 1e-6), (0.9995, "ms", 1e-3), (59.95, "s", 1.0)):
        if seconds < bound:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 9.95 or unit == "s" else f"{amount:.0f} {unit}"
    # 2. Below an hour, below a day, beyond: two units, the smaller left out where it is 0.
    whole = round(seconds)
    if whole < 3600:
        large, small = (whole // 60, "min"), (whole % 60, "s")
    elif whole < 86400:
        large, small = (whole // 3600, "h"), (whole % 3600 // 60, "min")
    else:
        large, small = (whole // 86400, "d"), (whole % 86400 // 3600, "h")
    return " ".join(f"{amount} {unit}" for amount, unit in (large, small) if amount)
