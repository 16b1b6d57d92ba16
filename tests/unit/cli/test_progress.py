"""Progress tells how far the batch is, seldom enough to be read, and never on standard output."""

import io

import pytest
from google.protobuf import text_format
from rich.console import Console

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.progress import Bar, Lines, Meter


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """What it was set to."""
        return self.now


def event(text: str) -> event_pb2.BatchEvent:
    """An event in text format."""
    return text_format.Parse(text, event_pb2.BatchEvent())


def result(state: event_pb2.ItemState.ValueType, tokens: int = 0) -> event_pb2.Result:
    """A result of so many tokens."""
    made = event_pb2.Result(state=state)
    made.usage.completion_tokens = tokens
    return made


@pytest.fixture
def clock() -> Clock:
    """The meter's clock."""
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Meter:
    """A meter with nothing on it."""
    return Meter(clock)


def test_the_meter_knows_only_what_it_was_told(meter: Meter, clock: Clock) -> None:
    """No speed before the release, no sharing before the first count of passes."""
    meter.total = 24
    assert meter.sentence() == "0 of 24 done"
    meter.phase = "loading tiny"
    assert meter.sentence() == "0 of 24 done, loading tiny"
    meter.note(event("released { item_count: 8 }"))
    clock.now += 2
    meter.count_result(result(event_pb2.ITEM_STATE_COMPLETED, 30))
    assert meter.sentence() == "1 of 24 done, 15 tokens/s"
    meter.note(event("progress { completion_tokens: 0 passes: 1 }"))
    assert meter.sentence() == "1 of 24 done, 15 tokens/s"
    meter.note(event("progress { completion_tokens: 100 passes: 16 }"))
    meter.count_result(result(event_pb2.ITEM_STATE_FAILED))
    assert meter.sentence() == "2 of 24 done, 1 failed, 50 tokens/s, 6.2 items per pass"


def test_lines_come_at_most_every_two_seconds(meter: Meter, clock: Clock) -> None:
    """One at the start, one at the end."""
    stream = io.StringIO()
    lines = Lines(meter, Console(file=stream, width=20))
    lines.refresh()
    lines.start()
    meter.total = 1000
    for _ in range(64):
        meter.completed += 1
        lines.refresh()
        clock.now += 0.125
    lines.say("tiny is \x1b[1mloaded")
    lines.stop()
    lines.stop()
    lines.refresh()
    assert stream.getvalue().splitlines() == [
        "unisono: 1 of 1,000 done",
        "unisono: 17 of 1,000 done",
        "unisono: 33 of 1,000 done",
        "unisono: 49 of 1,000 done",
        "unisono: tiny is [1mloaded",
        "unisono: 64 of 1,000 done",
    ]


def test_lines_that_say_the_same_come_seldom(meter: Meter, clock: Clock) -> None:
    """While nothing changes, one in ten seconds shows that it goes on; the end does not repeat the last."""
    stream = io.StringIO()
    lines = Lines(meter, Console(file=stream, width=80))
    lines.start()
    meter.total, meter.phase = 3, "loading tiny"
    told_at: list[float] = []
    for _ in range(33):
        before = stream.tell()
        lines.refresh()
        if stream.tell() > before:
            told_at.append(clock.now - 100)
        clock.now += 1
    assert told_at == [0, 10, 20, 30]
    meter.completed = 1
    lines.refresh()
    lines.stop()
    assert stream.getvalue().splitlines() == ["unisono: 0 of 3 done, loading tiny"] * 4 + [
        "unisono: 1 of 3 done, loading tiny"
    ]


def test_the_bar_shows_items_speed_and_sharing(meter: Meter, clock: Clock) -> None:
    """On a terminal."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    bar = Bar(meter, console)
    bar.refresh()
    bar.start()
    meter.total = 24
    meter.note(event("released { item_count: 8 }"))
    clock.now += 1
    meter.count_result(result(event_pb2.ITEM_STATE_FAILED))
    meter.note(event("progress { completion_tokens: 118 passes: 20 }"))
    bar.refresh()
    bar.say("tiny is loaded")
    bar.stop()
    drawn = stream.getvalue()
    assert "1/24 1 failed" in drawn
    assert "118 tokens/s, 5.9 items per pass" in drawn
    assert "unisono: tiny is loaded" in drawn
