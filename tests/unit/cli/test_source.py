"""Lines are read as they come, in bounded memory, and a read that waits can be given up."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.edge.cli import source as module
from unisono.edge.cli.source import Line, LineSource


def read_all(source: LineSource) -> list[tuple[int, bytes | None]]:
    """Every line to the end."""
    lines: list[Line] = []
    while (some := source.read_some()) is not None:
        lines += some
    return [(line.number, line.text) for line in lines]


@pytest.fixture
def pipe() -> Iterator[tuple[LineSource, int]]:
    """A source on a pipe, and where to write."""
    reading, writing = os.pipe()
    source = LineSource(reading)
    yield source, writing
    source.close()


@given(st.lists(st.binary().filter(lambda text: b"\n" not in text)), st.booleans())
def test_every_line_is_read_once(texts: list[bytes], ends_with_break: bool) -> None:  # noqa: FBT001
    """Whatever stands in a file, its lines are its lines."""
    whole = b"\n".join(texts) + (b"\n" if ends_with_break and texts else b"")
    expected = whole.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    if expected:
        expected[0] = expected[0].removeprefix(b"\xef\xbb\xbf")
    reading, writing = os.pipe()
    os.write(writing, whole[:60_000])
    os.close(writing)
    source = LineSource(reading)
    assert read_all(source) == list(enumerate(expected, 1))
    source.close()


def test_a_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are put together across reads."""
    monkeypatch.setattr(module, "_READ_BYTES", 7)
    path = tmp_path / "lines"
    path.write_bytes(b"\xef\xbb\xbffirst line\r\nsecond, longer line\n\nlast")
    source = LineSource.open(str(path))
    assert read_all(source) == [(1, b"first line\r"), (2, b"second, longer line"), (3, b""), (4, b"last")]
    assert source.is_ended
    source.close()


def test_a_line_that_is_too_long_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as a line without a text, wherever it ends, and the next one is whole."""
    monkeypatch.setattr(module, "_READ_BYTES", 16)
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 40)
    path = tmp_path / "lines"
    path.write_bytes(b"a" * 1000 + b"\nshort\n" + b"b" * 41 + b"\nc\n" + b"d" * 500)
    source = LineSource.open(str(path))
    assert read_all(source) == [(1, None), (2, b"short"), (3, None), (4, b"c"), (5, None)]
    source.close()


def test_lines_are_given_on_while_more_is_awaited(pipe: tuple[LineSource, int]) -> None:
    """A slow writer's lines do not wait for its next ones."""
    source, writing = pipe
    os.write(writing, b"one\ntw")
    assert source.read_some() == [Line(number=1, text=b"one")]
    os.write(writing, b"o\nthree")
    assert source.read_some() == [Line(number=2, text=b"two")]
    os.close(writing)
    assert source.read_some() == [Line(number=3, text=b"three")]
    assert source.read_some() is None


def test_closing_ends_a_read_that_waits(pipe: tuple[LineSource, int]) -> None:
    """A terminal that says nothing does not keep the program."""
    source, writing = pipe
    found: list[object] = ["nothing yet"]
    reader = threading.Thread(target=lambda: found.append(source.read_some()))
    reader.start()
    source.close()
    source.close()
    reader.join(10)
    assert found[1:] == [None]
    assert source.read_some() is None
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")  # the descriptors were given back
    os.close(writing)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """It is refused when opened, not when read."""
    with pytest.raises(IsADirectoryError):
        LineSource.open(str(tmp_path))
