"""How far a batch is: a bar on a terminal, a line now and then elsewhere; always on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.terminal import can_write, printable, write

# Lines come at most this often; and one that says the same as the last, so often.
_LINE_INTERVAL_S = 2.0
_SAME_INTERVAL_S = 10.0


class Meter:
    """The figures that a display shows, from what was sent and what came back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        # Items of the file so far, refused lines counted.
        self.total = 0
        self.completed = 0
        self.failed = 0
        # What is being waited for, before the first result: "loading …".
        self.phase = ""
        self._tokens_told = 0
        self._tokens_of_results = 0
        self._passes = 0
        self._started_at: float | None = None

    def began(self, ago_s: float) -> None:
        """The first release was so long ago."""
        self._started_at = self.clock() - ago_s

    @property
    def done(self) -> int:
        """Items that ended, however."""
        return self.completed + self.failed

    def count_result(self, result: event_pb2.Result) -> None:
        """An item ended."""
        if result.state == event_pb2.ITEM_STATE_COMPLETED:
            self.completed += 1
        else:
            self.failed += 1
        self._tokens_of_results += result.usage.completion_tokens
        self.phase = ""

    def note(self, event: event_pb2.BatchEvent) -> None:
        """Takes what an event says of the whole batch."""
        kind = event.WhichOneof("event")
        if kind == "released" and self._started_at is None:
            self._started_at = self.clock()
            self.phase = ""
        elif kind == "progress":
            self._tokens_told, self._passes = event.progress.completion_tokens, event.progress.passes
        elif kind == "summary":
            counts = event.summary.report.counts
            self._tokens_told, self._passes = counts.completion_tokens, counts.passes

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of answers since the first release, by the time since then; None before."""
        tokens = max(self._tokens_told, self._tokens_of_results)
        if self._started_at is None or not tokens:
            return None
        elapsed = self.clock() - self._started_at
        return tokens / elapsed if elapsed > 0 else None

    @property
    def items_per_pass(self) -> float | None:
        """How many items shared each forward pass so far; None while nothing was counted."""
        return self._tokens_told / self._passes if self._passes and self._tokens_told else None

    def figures(self) -> str:
        """Such as "118 tokens/s, 6.2 items per pass", as far as known."""
        parts = []
        if (speed := self.tokens_per_s) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if (shared := self.items_per_pass) is not None:
            parts.append(f"{shared:.1f} items per pass")
        return ", ".join(parts)

    def sentence(self) -> str:
        """All in one line."""
        parts = [f"{self.done:,} of {self.total:,} done"]
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if figures := self.figures():
            parts.append(figures)
        if self.phase:
            parts.append(self.phase)
        return ", ".join(parts)


class Display(Protocol):
    """Shows a meter."""

    def start(self) -> None:
        """Begins."""
        ...

    def refresh(self) -> None:
        """The meter has changed."""
        ...

    def say(self, text: str) -> None:
        """Tells something once."""
        ...

    def stop(self) -> None:
        """Ends; nothing is shown afterwards."""
        ...


class Lines:
    """A line at the start and at the end, and between them at most one every two seconds, where there is news."""

    def __init__(self, meter: Meter, console: Console) -> None:
        self._meter = meter
        self._console = console
        self._last_at = 0.0
        self._last = ""
        self._is_on = False

    def start(self) -> None:
        """Begins to count the time; there is nothing to tell yet."""
        self._last_at = self._meter.clock() - _LINE_INTERVAL_S
        self._is_on = True

    def refresh(self) -> None:
        """Writes a line if it is time."""
        now = self._meter.clock()
        if not self._is_on or not self._meter.total or now - self._last_at < _LINE_INTERVAL_S:
            return
        sentence = self._meter.sentence()
        if sentence != self._last or now - self._last_at >= _SAME_INTERVAL_S:
            self._last_at, self._last = now, sentence
            self.say(sentence)

    def say(self, text: str) -> None:
        """Writes a line at once."""
        write(self._console, f"unisono: {printable(text, one_line=True)}")

    def stop(self) -> None:
        """Writes the last line."""
        if self._is_on:
            self._is_on = False
            if (sentence := self._meter.sentence()) != self._last:
                self.say(sentence)


class _CountColumn(ProgressColumn):
    """Such as "17/24", and how many of them failed."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, _task: Task) -> Text:
        text = Text(f"{self._meter.done:,}/{self._meter.total:,}", style="bold")
        if self._meter.failed:
            text.append(f" {self._meter.failed:,} failed", style="red")
        return text


class _FiguresColumn(ProgressColumn):
    """Speed and sharing, or what is being waited for."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, _task: Task) -> Text:
        return Text(printable(self._meter.phase or self._meter.figures(), one_line=True), style="cyan")


class _BarBelow(Progress):
    """A bar, and what stands above it."""

    # Set before the bar is drawn for the first time.
    above: Callable[[], RenderableType | None] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None and (drawn := self.above()) is not None:
            yield drawn
        yield from super().get_renderables()


class Bar:
    """A moving bar at the terminal's last line."""

    def __init__(
        self, meter: Meter, console: Console, *, above: Callable[[], RenderableType | None] | None = None
    ) -> None:
        """`above` gives what is drawn above the bar, and with it goes away."""
        self._meter = meter
        self._console = console
        spinner = "dots" if can_write(console, "⠋") else "line"
        self._progress = _BarBelow(
            SpinnerColumn(spinner),
            TextColumn("items"),
            BarColumn(bar_width=30),
            _CountColumn(meter),
            _FiguresColumn(meter),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.above = above
        self._task: TaskID | None = None

    def start(self) -> None:
        """Draws the bar."""
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def refresh(self) -> None:
        """Moves the bar; it is drawn ten times a second."""
        if self._task is not None:
            self._progress.update(self._task, total=self._meter.total or None, completed=self._meter.done)

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        write(self._console, f"unisono: {printable(text, one_line=True)}", "dim")

    def stop(self) -> None:
        """Takes the bar away."""
        self._progress.stop()
        self._task = None
