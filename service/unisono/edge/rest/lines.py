"""Lines of OpenAI's batch files: what is wrong with them, the items that they become, and results as lines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from unisono.core.batch import BadItem
from unisono.core.errors import BatchDeadlineError, CancelledItemError, InternalError, Violation
from unisono.core.files import LineError
from unisono.edge.batchfile.answers import BODIES
from unisono.edge.batchfile.fields import FieldError, Fields, quote
from unisono.edge.batchfile.line import FORMS, MAX_LINE_BYTES, Form, parse_object, read_openai, take_id
from unisono.edge.batchfile.responses_out import settings_of
from unisono.edge.contract import convert_in, convert_out
from unisono.edge.rest.errors import error_body, of_house, param_of
from unisono.edge.status import utf8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.events import Result
    from unisono.core.files import FileBatch
    from unisono.core.limits import Limits
    from unisono.core.model import Completion, Item

# What OpenAI takes of a file.
MAX_LINES: Final = 50_000
# Errors of a file that are told; with so many, it is read no further.
MAX_ERRORS: Final = 100
# Of fields of a conversation, where in a request for a response they come from.
_RESPONSES: Final = (
    ("chat.messages", "input"),
    ("chat.tools", "tools"),
    ("chat.format", "text.format"),
    ("options.num_predict", "max_output_tokens"),
)


class FileCheck:
    """Looks at a file's lines; see `app.file_lines.LineCheck`. Bodies are looked at when they become items."""

    def __init__(self, endpoint: str, *, max_lines: int = MAX_LINES) -> None:
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._count = 0
        # Of each id, the line that has it.
        self._ids: dict[str, int] = {}
        self._models: set[str] = set()
        self._errors: list[LineError] = []

    @property
    def errors(self) -> Sequence[LineError]:
        """What was found."""
        return self._errors

    @property
    def is_enough(self) -> bool:
        """Whether no more lines need to be looked at."""
        return self._count > self._max_lines or len(self._errors) >= MAX_ERRORS

    @property
    def model(self) -> str:
        """What all lines ask; empty where they do not ask one and the same."""
        return next(iter(self._models)) if len(self._models) == 1 else ""

    def read(self, number: int, text: bytes | None) -> None:
        """The next line."""
        if self.is_enough:
            return
        self._count += 1
        if self._count > self._max_lines:
            self._errors.append(
                LineError(
                    code="too_many_tasks",
                    message=f"The file has more than {self._max_lines:,} requests, which is the most of one batch.",
                    line=number,
                )
            )
            return
        try:
            self._look(number, text)
        except _LineError as error:
            self._errors.append(
                LineError(code=error.code, message=utf8(error.message), line=number, param=error.param)
            )

    def end(self) -> None:
        """There are no more."""
        if not self._count:
            self._errors.append(LineError(code="empty_file", message="The file has no requests."))

    def _look(self, number: int, text: bytes | None) -> None:
        try:
            fields = Fields(parse_object(text))
        except FieldError as error:
            raise _LineError("invalid_json_line", f"This line is no request: {error}.") from None
        for name in ("custom_id", "method", "url", "body"):
            if not fields.has(name):
                raise _LineError("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
        try:
            item_id = take_id(fields, "custom_id")
            method, url = fields.text("method"), fields.text("url")
            body = fields.child("body")
        except FieldError as error:
            raise _LineError("invalid_value", f"Invalid value: {error}.", error.path) from None
        if (former := self._ids.setdefault(item_id, number)) != number:
            what = f"The custom_id {quote(item_id)} is that of line {former} already; ids are unique in a batch."
            raise _LineError("duplicate_custom_id", what, "custom_id")
        if method != "POST":
            raise _LineError("invalid_method", f"The method must be POST, not {quote(method)}.", "method")
        if url != self._endpoint:
            what = f"The url must be the batch's endpoint, {self._endpoint}, not {quote(url)}."
            raise _LineError("url_mismatch", what, "url")
        model = body.value("model") if body is not None else None
        self._models.add(model if isinstance(model, str) else "")
        # Whatever else it may be, it is not for a batch.
        if body is not None and body.value("stream") not in (None, False):
            raise _LineError("unsupported_value", "stream must be false in a batch.", "body.stream")


class _LineError(Exception):
    """A line cannot stand in a batch."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class OpenAILines:
    """See `app.file_lines.LineForm`."""

    max_line_bytes = MAX_LINE_BYTES

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def check(self, endpoint: str) -> FileCheck:
        """For one file."""
        return FileCheck(endpoint, max_lines=min(MAX_LINES, self._limits.max_items))

    def item(self, text: bytes, endpoint: str) -> Item | BadItem:
        """The item of a line that was checked; one that cannot be run fails alone."""
        fields = Fields(parse_object(text))
        item_id = take_id(fields, "custom_id")
        form = FORMS[endpoint]
        try:
            # An object: that was checked.
            message = read_openai(fields.child("body") or Fields({}), form)
        except FieldError as error:
            return _bad(item_id, error)
        message.item_id = item_id
        item = convert_in.item(message, bounds=self._limits)
        return _in_words_of_responses(item) if form is Form.RESPONSES else item

    def wants_lines(self, endpoint: str) -> bool:
        """Whether answers hold what was asked for once more."""
        return FORMS[endpoint] is Form.RESPONSES

    def result(self, batch: FileBatch, result: Result, at_ns: int, asked: bytes | None = None) -> tuple[bytes, bool]:
        """A line of output, or of the file of errors. `asked`: the line of its request, where that is wanted."""
        line = self.line(batch, result, at_ns, asked)
        return msgspec.json.encode(line) + b"\n", result.completion is not None

    def line(self, batch: FileBatch, result: Result, at_ns: int, asked: bytes | None = None) -> dict[str, object]:
        """A line, still as an object."""
        name = f"{batch.batch_id.removeprefix('batch_')}-{result.index}"
        value: dict[str, object] = {
            "id": f"batch_req_{name}",
            "custom_id": utf8(result.item_id),
            "response": None,
            "error": None,
        }
        error = result.error
        if result.completion is not None:
            # Without what OpenAI has no word for.
            message = convert_out.result(replace(result, error=None))
            body = BODIES[_form(batch, result.completion)](
                name, at_ns // 1_000_000_000, message, _settings(asked, result.item_id)
            )
            value["response"] = {"status_code": 200, "request_id": f"req_{name}", "body": body}
        elif isinstance(error, BatchDeadlineError):
            what = "The batch expired before this request was answered."
            value["error"] = {"code": "batch_expired", "message": what}
        elif isinstance(error, CancelledItemError):
            what = "The batch was cancelled before this request was answered."
            value["error"] = {"code": "batch_cancelled", "message": what}
        else:
            status, failed = of_house(error or InternalError("the item ended without an answer"), error_body)
            value["response"] = {"status_code": status, "request_id": f"req_{name}", "body": failed}
        return value


def _form(batch: FileBatch, done: Completion) -> Form:
    """The form of an answer: of a batch that was made of no file, a chat's, or embeddings'."""
    if batch.endpoint:
        return FORMS[batch.endpoint]
    return Form.EMBEDDINGS if done.embeddings else Form.CHAT


def _settings(asked: bytes | None, item_id: str) -> dict[str, object] | None:
    """What a line asked for; None where it is not known."""
    if asked is None:
        return None
    line = parse_object(asked)
    body = line.get("body")
    return settings_of(body) if isinstance(body, dict) and take_id(Fields(line), "custom_id") == item_id else None


def _in_words_of_responses(item: Item | BadItem) -> Item | BadItem:
    """What the contract's limits refuse, by the names that this API has for it."""
    if not isinstance(item, BadItem):
        return item
    violations = tuple(
        replace(one, field=next((theirs for ours, theirs in _RESPONSES if one.field.startswith(ours)), one.field))
        for one in item.violations
    )
    return replace(item, violations=violations)


def _bad(item_id: str, error: FieldError) -> BadItem:
    return BadItem(item_id=item_id, violations=(Violation(field=param_of(error.path), description=error.problem),))
