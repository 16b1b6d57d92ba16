"""Where results go: lines of JSON, or answers for a reader; as they finish, or in the order of the file."""

from __future__ import annotations

import tempfile
from typing import BinaryIO, Protocol

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.edge.cli.errors import problem_of_status
from unisono.edge.cli.lines_in import Origin
from unisono.edge.cli.lines_out import STATES, Ended, to_line
from unisono.edge.cli.terminal import can_write, emit, printable

# Results that wait for their turn stay in memory up to here; then they wait in a temporary file.
_HELD_IN_MEMORY_BYTES = 16 * 1024 * 1024
# Longer lines are tiring to read.
_ANSWER_WIDTH = 100


class Outlet(Protocol):
    """Takes each result once."""

    def put(self, ended: Ended) -> None:
        """Writes a result. Raises OSError, BrokenPipeError among them."""
        ...

    def close(self) -> None:
        """Writes what is still held back."""
        ...


class JsonLines:
    """A line of JSON a result, written through at once, so that a reader of the pipe sees it."""

    def __init__(self, stream: BinaryIO, *, replaces: bool = False) -> None:
        """`replaces`: what the file held is kept until the first result takes its place."""
        self._stream = stream
        self._replaces = replaces

    def put(self, ended: Ended) -> None:
        """Writes the result's line."""
        if self._replaces:
            self._stream.truncate(0)
            self._replaces = False
        self._stream.write(to_line(ended))
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class Answers:
    """Answers for a reader: the id, what was said, how much of it, and errors in red."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._dot = "●" if can_write(console, "●") else "*"

    def put(self, ended: Ended) -> None:
        """Writes the answer."""
        result = ended.result
        is_done = result.HasField("completion")
        head = Text(f"{self._dot} ", style="green" if is_done else "red")
        head.append(printable(ended.origin.item_id, one_line=True), style="bold")
        body = Text()
        if is_done:
            head.append(f"  {_figures(result)}", style="dim")
            _append_answer(body, result.completion)
        else:
            problem = problem_of_status(result.error)
            head.append(f"  {STATES.get(result.state, 'failed')}: {problem.reason}", style="red")
            body.append(printable(problem.text), style="red")
        width = min(self._console.width, _ANSWER_WIDTH)
        emit(self._console, head, width=width)
        emit(self._console, Padding(body, (0, 0, 1, 2)), width=width)

    def close(self) -> None:
        """Nothing is held back."""


def _figures(result: event_pb2.Result) -> str:
    if result.completion.embeddings:
        return f"{result.usage.prompt_tokens} tokens read"
    figures = f"{result.usage.completion_tokens} tokens"
    if result.shared_with:
        figures += f", passes shared with {result.shared_with}"
    return figures


def _append_answer(body: Text, completion: item_pb2.Completion) -> None:
    if completion.thinking:
        body.append(printable(completion.thinking).strip() + "\n", style="dim italic")
    if completion.embeddings:
        count, length = len(completion.embeddings), len(completion.embeddings[0].values)
        body.append(f"{count} vector{'s' if count > 1 else ''} of {length} numbers")
    body.append(printable(completion.content).strip())
    for call in completion.tool_calls:
        body.append(
            f"{chr(10) if body else ''}{printable(call.name)}({printable(call.arguments_json)})", style="cyan"
        )
    if completion.finish_reason == item_pb2.FINISH_REASON_LENGTH:
        body.append(" … (cut off: it reached its limit of tokens)", style="dim")


class InOrder:
    """Holds results back until those before them in the file have come.

    What waits is kept as bytes in a file that stays in memory while it is small, so that a slow first item does
    not make the memory grow with all that overtakes it.
    """

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._next = 0
        # Where each waiting result is: its origin, place in the spool, length, and the rest of `Ended`.
        self._held: dict[int, tuple[Origin, int, int, str, int]] = {}
        # Places further on of which no result comes.
        self._passed_over: set[int] = set()
        self._spool = tempfile.SpooledTemporaryFile(max_size=_HELD_IN_MEMORY_BYTES)  # noqa: SIM115 - `close` ends it

    def put(self, ended: Ended) -> None:
        """Writes the result, and those that waited for it; or keeps it."""
        if ended.origin.position == self._next:
            self._outlet.put(ended)
            self._next += 1
            self._go_on()
            return
        data = ended.result.SerializeToString()
        if not self._held:
            self._spool.seek(0)
            self._spool.truncate()
        place = self._spool.seek(0, 2)
        self._spool.write(data)
        self._held[ended.origin.position] = (ended.origin, place, len(data), ended.batch_id, ended.time_s)

    def pass_over(self, position: int) -> None:
        """No result of this place will come: those behind it do not wait for one. Raises what `put` does."""
        self._passed_over.add(position)
        self._go_on()

    def _go_on(self) -> None:
        """Writes those whose turn it is."""
        while True:
            if self._next in self._held:
                self._outlet.put(self._take(self._next))
            elif self._next in self._passed_over:
                self._passed_over.remove(self._next)
            else:
                return
            self._next += 1

    def close(self) -> None:
        """Writes what waits for results that will not come any more."""
        for position in sorted(self._held):
            self._outlet.put(self._take(position))
        self._spool.close()
        self._outlet.close()

    def _take(self, position: int) -> Ended:
        origin, place, length, batch_id, time_s = self._held.pop(position)
        self._spool.seek(place)
        result = event_pb2.Result.FromString(self._spool.read(length))
        return Ended(origin=origin, result=result, batch_id=batch_id, time_s=time_s)
