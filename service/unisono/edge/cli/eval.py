"""`unisono eval`: a data set of questions with known answers in, a score out.

Each line is an item. Its answer is right where the last thing in it that the answer's expression finds equals what
the line expects. Numbers are compared as numbers: commas, a trailing dot and trailing zeros make no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import BinaryIO

import msgspec

from unisono._generated.unisono.v1 import item_pb2
from unisono.core.benchmark import share_between
from unisono.edge.batchfile.fields import FieldError, name_of
from unisono.edge.batchfile.line import Form, parse_object
from unisono.edge.cli.collector import Collector
from unisono.edge.cli.connect import Wish, connect
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_status
from unisono.edge.cli.feed import LineFeed
from unisono.edge.cli.lines_in import BadLine, GoodLine, LineReader, Origin
from unisono.edge.cli.lines_out import STATES, Ended
from unisono.edge.cli.ports import StartServer
from unisono.edge.cli.progress import Bar, Display, Lines, Meter
from unisono.edge.cli.run import Job, RunOptions
from unisono.edge.cli.source import Line, LineSource
from unisono.edge.cli.terminal import Terminal, is_animated, paint, write

# The last number of an answer, and what GSM8K writes before the right one.
ANSWER = r"(-?[\d,]*\.?\d+)"
EXPECTED = r"#### (.*)"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What `unisono eval` was asked for."""

    # A path, or "-" for standard input.
    file: str
    wish: Wish
    # Finds the answer in what was said, and what is right in the line's field.
    answer_regex: re.Pattern[str]
    expect_regex: re.Pattern[str] | None = None
    # The line's fields.
    field: str = "question"
    expect: str = "answer"
    # What every conversation begins with; "" for nothing.
    system: str = ""
    model: str | None = None
    # Only so many lines; None: all.
    limit: int | None = None
    num_predict: int | None = None
    # Where each line's verdict goes; None: nowhere.
    output: str | None = None


class QuestionReader(LineReader):
    """Turns lines of a data set into items, and remembers what each expects."""

    def __init__(self, options: EvalOptions) -> None:
        super().__init__()
        self._options = options
        self._count = 0
        # What is right, by item id.
        self.expected: dict[str, str] = {}

    def read(self, lines: Iterable[Line]) -> Iterator[GoodLine | BadLine]:
        """One for each line that is not blank, up to the limit."""
        limit = self._options.limit
        for line in lines:
            if line.text is not None and not line.text.strip():
                continue
            if limit is not None and self._count >= limit:
                return
            item_id = f"line-{line.number}"
            origin = Origin(item_id=item_id, position=self._count, line=line.number, form=Form.PLAIN)
            self.origins[item_id] = origin
            self._count += 1
            try:
                question, expected = self._parts(line)
            except FieldError as error:
                yield BadLine(origin=origin, message=f"line {line.number}: {error}")
                continue
            self.expected[item_id] = expected
            yield GoodLine(origin=origin, item=self._item(item_id, question))

    def _parts(self, line: Line) -> tuple[str, str]:
        options = self._options
        fields = parse_object(line.text)
        question = fields.get(options.field)
        if not isinstance(question, str) or not question:
            raise FieldError(options.field, f"must be text, not {name_of(question)}")
        right = fields.get(options.expect)
        if isinstance(right, bool) or not isinstance(right, (str, int, float)):
            raise FieldError(options.expect, f"must be text or a number, not {name_of(right)}")
        text = str(right)
        found = last_match(options.expect_regex or re.compile(EXPECTED), text)
        if found is None and options.expect_regex is not None:
            raise FieldError(options.expect, f"holds nothing that {options.expect_regex.pattern} finds")
        return question, text if found is None else found

    def _item(self, item_id: str, question: str) -> item_pb2.Item:
        messages = [item_pb2.Message(role=item_pb2.ROLE_USER, content=question)]
        if self._options.system:
            messages.insert(0, item_pb2.Message(role=item_pb2.ROLE_SYSTEM, content=self._options.system))
        return item_pb2.Item(item_id=item_id, chat=item_pb2.ChatRequest(messages=messages))


class Scorer:
    """An outlet that compares each answer with what its line expects."""

    def __init__(self, reader: QuestionReader, pattern: re.Pattern[str], stream: BinaryIO | None) -> None:
        self._reader = reader
        self._pattern = pattern
        self._stream = stream
        self.right = 0
        self.wrong = 0
        # Of those wrong, answers in which the expression found nothing.
        self.silent = 0
        # Lines without an answer, by reason.
        self.failures: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Lines with a verdict."""
        return self.right + self.wrong + sum(self.failures.values())

    def put(self, ended: Ended) -> None:
        """Judges a result."""
        origin, result = ended.origin, ended.result
        verdict: dict[str, object] = {
            "id": origin.item_id,
            "line": origin.line,
            "state": STATES.get(result.state, "failed"),
            "expected": self._reader.expected.get(origin.item_id),
            "is_right": False,
        }
        if result.HasField("completion"):
            content = result.completion.content
            found = last_match(self._pattern, content)
            is_right = found is not None and normal(found) == normal(self._reader.expected[origin.item_id])
            self.right += is_right
            self.wrong += not is_right
            self.silent += found is None
            verdict |= {"found": found, "is_right": is_right, "content": content, "passes": result.passes}
        else:
            problem = problem_of_status(result.error)
            self.failures[problem.reason] = self.failures.get(problem.reason, 0) + 1
            verdict["error"] = {"reason": problem.reason, "message": problem.text}
        if self._stream is not None:
            self._stream.write(msgspec.json.encode(verdict) + b"\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""

    def lines(self) -> list[str]:
        """The score, and what became of the rest."""
        total = self.total
        if not total:
            return ["Score", "  accuracy         none: no line was answered"]
        low, high = share_between(self.right, total)
        likely = f"95 times in 100 between {low:.1%} and {high:.1%}"
        lines = [
            "Score",
            f"  accuracy         {self.right / total:.1%} ({self.right:,} of {total:,} right; {likely})",
        ]
        if self.wrong:
            nothing = f", {self.silent:,} of them without anything that the expression finds" if self.silent else ""
            lines.append(f"  wrong            {self.wrong:,}{nothing}")
        for reason, count in sorted(self.failures.items(), key=lambda each: (-each[1], each[0])):
            lines.append(f"  no answer        {count:,} {reason}")
        return lines


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last thing that an expression finds: its first group, where it has one; what is empty does not count."""
    found: str | None = None
    for match in pattern.finditer(text):
        value = match.group(1) if pattern.groups else match.group()
        if value is not None and str(normal(value)):
            found = value
    return found


def normal(value: str) -> Decimal | str:
    """A value to compare: without commas and a trailing dot, and a number where it is one."""
    text = value.replace(",", "").strip().rstrip(".").strip()
    with suppress(InvalidOperation):
        number = Decimal(text)
        if number.is_finite():
            return number
    return text


async def evaluate(options: EvalOptions, start: StartServer, terminal: Terminal) -> int:
    """Runs the data set and shows its score; returns the exit code. Raises StopError where nothing could be run."""
    with ExitStack() as stack:
        try:
            source = LineSource.open(options.file)
        except OSError as error:
            what = f"{options.file} cannot be read: {error.strerror or error}"
            raise StopError(what, code=ExitCode.USAGE) from error
        stack.callback(source.close)
        stream = stack.enter_context(_create(options)) if options.output else None
        reader = QuestionReader(options)
        scorer = Scorer(reader, options.answer_regex, stream)
        meter = Meter()
        display: Display = Bar(meter, terminal.err) if is_animated(terminal.err) else Lines(meter, terminal.err)
        collector = Collector(reader=reader, outlet=scorer, meter=meter, display=display)
        feed = LineFeed(source, reader, on_bad_line=collector.on_bad_line, on_lines=collector.on_lines)
        if not await feed.look_ahead():
            _tell_failures(collector, terminal)
            raise StopError(f"{options.file} holds no question.", code=ExitCode.USAGE)
        async with connect(options.wish, start, display.say) as connection:
            run_options = RunOptions(
                file=options.file,
                wish=options.wish,
                model=options.model,
                num_predict=options.num_predict,
                temperature=0,
                draw_map=False,
            )
            job = Job(run_options, connection, feed=feed, collector=collector, display=display)
            await job.run()
            await job.conclude(terminal)
            terminal.say("")
            paint(terminal.out, scorer.lines())
            return job.exit_code


def _tell_failures(collector: Collector, terminal: Terminal) -> None:
    for failure in collector.tally.failures:
        write(terminal.err, failure.message, "red")


def _create(options: EvalOptions) -> BinaryIO:
    path = Path(options.output or "")
    with suppress(OSError):
        if path.samefile(options.file):
            raise StopError(f"{path} is the file that is read; name another for the verdicts.", code=ExitCode.USAGE)
    try:
        return path.open("wb")
    except OSError as error:
        raise StopError(f"{path} cannot be written: {error.strerror}", code=ExitCode.USAGE) from error
