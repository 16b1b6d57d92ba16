"""Times and vectors are exact."""

from __future__ import annotations

from array import array

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from unisono._generated.unisono.v1 import item_pb2 as it
from unisono.edge.contract.wire import duration, embedding, timestamp


@given(st.integers(0, 2**62))
def test_times_of_day_are_exact(at_ns: int) -> None:
    """To the nanosecond."""
    assert timestamp(at_ns).ToNanoseconds() == at_ns


@given(st.integers(-(2**52), 2**52))
def test_spans_are_exact(span_ns: int) -> None:
    """What was measured in nanoseconds, and turned into seconds, is so many nanoseconds again (up to 52 days)."""
    made = duration(span_ns / 1e9)
    assert made.ToNanoseconds() == span_ns
    assert made.seconds * made.nanos >= 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, Duration()),
        (0.1 + 0.2, Duration(nanos=300_000_000)),
        (0.9999999999, Duration(seconds=1)),
        (-0.5, Duration(nanos=-500_000_000)),
        (-1.25, Duration(seconds=-1, nanos=-250_000_000)),
        (3_000_000_000.5, Duration(seconds=3_000_000_000, nanos=500_000_000)),
    ],
)
def test_spans_are_rounded_to_the_nearest_nanosecond(seconds: float, expected: Duration) -> None:
    """Also where a float is not quite what was meant."""
    assert duration(seconds) == expected


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=200))
def test_vectors_are_taken_over_bit_by_bit(numbers: list[float]) -> None:
    """As if each number had been set by itself."""
    assert embedding(array("f", numbers)) == it.Embedding(values=numbers)


@pytest.mark.parametrize("length", [31, 32, 4095, 4096, 600_000])
def test_vectors_of_any_length_are_taken_over(length: int) -> None:
    """The length is written in one byte, two, three or four."""
    assert list(embedding(array("f", [1.5]) * length).values) == [1.5] * length
