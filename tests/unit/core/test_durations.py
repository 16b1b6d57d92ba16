"""Spans of time as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("30", 30),
        ("1.5", 1.5),
        ("500ms", 0.5),
        ("250us", 250e-6),
        ("250µs", 250e-6),
        ("250μs", 250e-6),  # the Greek letter
        ("10ns", 10e-9),
        ("30s", 30),
        ("2m", 120),
        ("2min", 120),
        ("1h30m", 5400),
        ("1 h 30 min", 5400),
        (" 1.5h ", 5400),
        ("1d", 86400),
        (".5s", 0.5),
        ("5.s", 5),
    ],
)
def test_reads_what_people_write(text: str, seconds: float) -> None:
    """Units, their sums, and bare numbers as seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "s",
        "-5s",
        "+5s",
        "5x",
        "5 seconds",
        "1h-30m",
        "nan",
        "inf",
        "1e3s",
        "5s!",
        "1,5s",
        "٣s",
        "200000000000",
    ],
)
def test_refuses_everything_else(text: str) -> None:
    """And says what it would take."""
    with pytest.raises(ValueError, match=r"not a duration|century"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (5e-9, "5 ns"),
        (84e-6, "84 µs"),
        (1.21e-6, "1.2 µs"),
        (999.6e-6, "1.0 ms"),
        (0.0123, "12 ms"),
        (0.9996, "1.0 s"),
        (8.44, "8.4 s"),
        (59.96, "1 min"),
        (125, "2 min 5 s"),
        (3599.6, "1 h"),
        (3725, "1 h 2 min"),
        (90000, "1 d 1 h"),
        (172800, "2 d"),
        (-0.5, "−500 ms"),
    ],
)
def test_writes_what_people_read(seconds: float, text: str) -> None:
    """Two or three figures, in units that fit."""
    assert format_duration(seconds) == text


@given(st.floats(0, 1e9))
def test_what_is_written_can_be_read(seconds: float) -> None:
    """A written span means what it was, within its rounding."""
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=0.06, abs=1e-9)


@given(st.text())
def test_no_text_is_a_defect(text: str) -> None:
    """Any text is a span, or refused."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        return
    assert seconds >= 0
