"""Gathers what comes back of a batch: results to the outlet, figures to the meter and the tally."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from google.rpc import status_pb2

from unisono._generated.unisono.v1 import event_pb2
from unisono.core.durations import format_duration
from unisono.edge.batchfile.line import Form
from unisono.edge.cli.errors import ExitCode, StopError, failed_result, problem_of_status
from unisono.edge.cli.lines_in import BadLine, LineReader, Origin
from unisono.edge.cli.lines_out import STATES, Ended
from unisono.edge.cli.outlets import Outlet
from unisono.edge.cli.progress import Display, Meter
from unisono.edge.cli.report import Failure, Tally

# What the service refuses as malformed: the reader looks for it in the file, so the line is named.
_MALFORMED = ("INVALID_REQUEST", "DUPLICATE_ITEM")
# The place in the request, which means nothing to the reader of a file.
_ITEM_PATH = re.compile(r"\bitems\[\d+\]\.")


class Collector:
    """Hears the session and the feed."""

    def __init__(
        self,
        *,
        reader: LineReader,
        outlet: Outlet,
        meter: Meter,
        display: Display,
        batch_id: str = "",
        form_of: Callable[[event_pb2.Result], Form] = lambda _: Form.PLAIN,
    ) -> None:
        """`batch_id`: where no `accepted` will tell it. `form_of`: how the line of an item was written that `reader`
        has not read.
        """
        self._reader = reader
        self._form_of = form_of
        self._outlet = outlet
        self._meter = meter
        self._display = display
        self._batch_id = batch_id
        # What came of results that are too large for one message, by index.
        self._parts: dict[int, event_pb2.Result] = {}
        # Models by group, for messages.
        self._models: dict[int, str] = {}
        self.tally = Tally()
        # Item ids by the service's index, for the pass map.
        self.names: dict[int, str] = {}
        # Items that were sent and of which we know what became.
        self.answered = 0
        # The last event, once it came.
        self.summary: event_pb2.Summary | None = None

    def on_lines(self, count: int) -> None:
        """More lines were read."""
        self._meter.total += count
        self._display.refresh()

    def on_bad_line(self, line: BadLine) -> None:
        """A line of the file is no item; it fails alone."""
        self._end(line.origin, failed_result(line.origin.item_id, "INVALID_REQUEST", line.message), _now())

    def on_refusal(self, item_id: str, refusal: status_pb2.Status) -> None:
        """The service did not take an item; so there will be no result of it but this."""
        self.answered += 1
        result = event_pb2.Result(item_id=item_id, state=event_pb2.ITEM_STATE_FAILED, error=refusal)
        self._end(self._origin(result), result, _now())

    def on_connection(self, text: str) -> None:
        """The connection was lost, or is there again."""
        self._display.say(text)

    def pass_over(self, result: event_pb2.Result) -> None:
        """An item ended whose result is not shown."""
        self._meter.count_result(result)
        self._display.refresh()

    def on_event(self, event: event_pb2.BatchEvent) -> None:
        """Something happened."""
        kind = event.WhichOneof("event")
        self._meter.note(event)
        if kind == "accepted":
            self._batch_id = event.accepted.batch_id
        elif kind == "group_planned":
            self._models[event.group_planned.group] = event.group_planned.model
        elif kind == "loading":
            self._tell_loading(event.loading)
        elif kind == "result_part":
            self._keep_part(event.result_part)
        elif kind == "result":
            self.answered += 1
            self.names[event.result.index] = event.result.item_id
            result = self._whole(event.result)
            self._end(self._origin(result), result, event.time.seconds or _now())
        elif kind == "summary":
            self.summary = event.summary
        self._display.refresh()

    def _tell_loading(self, loading: event_pb2.Loading) -> None:
        model = self._models.get(loading.group) or "the model"
        if loading.state == event_pb2.Loading.STATE_STARTED:
            self._meter.phase = f"loading {model}"
        elif loading.state == event_pb2.Loading.STATE_LOADED:
            self._meter.phase = ""
            took = format_duration(loading.duration.ToNanoseconds() / 1e9)
            self._display.say(f"{model} is loaded ({took})")
        elif loading.state == event_pb2.Loading.STATE_FAILED:
            self._meter.phase = ""
            self._display.say(f"{model} could not be loaded: {problem_of_status(loading.error).text}")

    def _keep_part(self, part: event_pb2.ResultPart) -> None:
        if part.part == 0:
            # Also where the connection was lost among them: they are all sent again.
            self._parts.pop(part.index, None)
        kept = self._parts.setdefault(part.index, event_pb2.Result()).completion
        kept.content += part.content
        kept.thinking += part.thinking
        kept.embeddings.extend(part.embeddings)
        kept.logprobs.extend(part.logprobs)

    def _whole(self, result: event_pb2.Result) -> event_pb2.Result:
        """The result with the parts that came before it in front of what it holds."""
        parts = self._parts.pop(result.index, None)
        if parts is None or not result.HasField("completion"):
            return result
        whole = event_pb2.Result()
        whole.CopyFrom(result)
        last = result.completion
        whole.completion.content = parts.completion.content + last.content
        whole.completion.thinking = parts.completion.thinking + last.thinking
        for name in ("embeddings", "logprobs"):
            whole.completion.ClearField(name)
            getattr(whole.completion, name).extend(getattr(parts.completion, name))
            getattr(whole.completion, name).extend(getattr(last, name))
        return whole

    def _origin(self, result: event_pb2.Result) -> Origin:
        """Where the item came from; one that we never sent is taken as it comes, rather than dropped."""
        return self._reader.origins.get(result.item_id) or Origin(
            item_id=result.item_id, position=result.index, line=0, form=self._form_of(result)
        )

    def _end(self, origin: Origin, result: event_pb2.Result, time_s: int) -> None:
        state = STATES.get(result.state, "failed")
        failure: Failure | None = None
        if not result.HasField("completion"):
            problem = problem_of_status(result.error)
            if problem.reason in _MALFORMED and origin.line:
                message = _name_line(origin.line, problem.text)
                result.error.CopyFrom(failed_result("", problem.reason, message).error)
                problem = problem_of_status(result.error)
            failure = Failure(item_id=origin.item_id, state=state, reason=problem.reason, message=problem.text)
        self._meter.count_result(result)
        self.tally.add(state, failure, result.usage.completion_tokens)
        try:
            self._outlet.put(Ended(origin=origin, result=result, batch_id=self._batch_id, time_s=time_s))
        except BrokenPipeError:
            raise StopError("The reader of the results went away.", code=ExitCode.ITEMS_FAILED) from None
        except OSError as error:
            raise StopError(f"The results cannot be written: {error}", code=ExitCode.ITEMS_FAILED) from error
        self._display.refresh()


def _name_line(number: int, message: str) -> str:
    start = f"line {number}: "
    return message if message.startswith(start) else start + _ITEM_PATH.sub("", message)


def _now() -> int:
    return int(time.time())
