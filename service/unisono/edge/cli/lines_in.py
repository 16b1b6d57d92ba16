"""Lines of a batch file to items.

Two forms, line by line: OpenAI's batch line (`custom_id`, `method`, `url`, `body`), and a plain one, which is the
body itself with an id beside it. A line that cannot be read costs only itself: it becomes a result that failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.body import Kind, read_body
from unisono.edge.batchfile.fields import FieldError, Fields, quote
from unisono.edge.batchfile.line import FORMS, Form, parse_object, read_openai, take_id
from unisono.edge.batchfile.responses_out import settings_of
from unisono.edge.cli.source import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a result's item came from."""

    item_id: str
    # The place among the file's items, from 0, refused lines counted.
    position: int
    # The line's number in the file, from 1.
    line: int
    form: Form
    # What the request asked for, where its answer has that again.
    settings: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodLine:
    """A line that became an item."""

    origin: Origin
    item: item_pb2.Item


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that could not be read."""

    origin: Origin
    # Begins with the line's number and the field's path: "line 7: body.messages[0].role: must be one of …".
    message: str


class LineReader:
    """Turns lines into items, and remembers every id that it gave."""

    def __init__(self) -> None:
        # Of each id, where it came from.
        self.origins: dict[str, Origin] = {}
        self._position = 0
        # A line that cannot be read at all is answered in the form of the line before.
        self._form = Form.PLAIN
        self._settings: Mapping[str, object] | None = None

    def read(self, lines: Iterable[Line]) -> Iterator[GoodLine | BadLine]:
        """One for each line that is not blank."""
        for line in lines:
            if line.text is None or line.text.strip():
                yield self._read_line(line)
                self._position += 1

    def _read_line(self, line: Line) -> GoodLine | BadLine:
        item_id = ""
        self._settings = None
        try:
            fields = Fields(parse_object(line.text))
            is_openai = any(fields.has(name) for name in ("body", "url", "method"))
            if is_openai and self._form is Form.PLAIN:
                self._form = Form.CHAT  # until the url is known
            elif not is_openai:
                self._form = Form.PLAIN
            item_id = self._take_new_id(fields, is_openai=is_openai)
            item = self._read_openai(fields) if is_openai else _read_plain(fields)
        except FieldError as error:
            origin = self._origin(line, item_id)
            # An id that is kept from use here must not be given out later, or two results would carry it.
            self.origins.setdefault(origin.item_id, origin)
            return BadLine(origin=origin, message=f"line {line.number}: {error}")
        origin = self._origin(line, item_id)
        if not item_id and (former := self.origins.get(origin.item_id)) is not None:
            problem = f"has no id, and {origin.item_id!r} is the id of line {former.line} already"
            return BadLine(origin=origin, message=f"line {line.number}: {problem}")
        item.item_id = origin.item_id
        self.origins[origin.item_id] = origin
        return GoodLine(origin=origin, item=item)

    def _take_new_id(self, fields: Fields, *, is_openai: bool) -> str:
        item_id, path = _take_id(fields, is_openai=is_openai)
        if (former := self.origins.get(item_id)) is not None:
            raise FieldError(path, f"{quote(item_id)} is the id of line {former.line} already")
        return item_id

    def _origin(self, line: Line, item_id: str) -> Origin:
        return Origin(
            item_id=item_id or f"line-{line.number}",
            position=self._position,
            line=line.number,
            form=self._form,
            settings=self._settings,
        )

    def _read_openai(self, fields: Fields) -> item_pb2.Item:
        method, url = fields.text("method"), fields.text("url")
        if method not in (None, "POST"):
            raise fields.wrong("method", f"must be POST, not {quote(method)}")
        if url not in FORMS:
            what = "is missing; it must" if url is None else "must"
            raise fields.wrong("url", f"{what} be one of {', '.join(FORMS)}" + (f", not {quote(url)}" if url else ""))
        self._form = FORMS[url]
        body = fields.value("body")
        if body is None:
            raise fields.wrong("body", "is missing")
        inner = Fields(body, "body")
        fields.end()
        item = read_openai(inner, self._form)
        if self._form is Form.RESPONSES and isinstance(body, dict):
            self._settings = settings_of(body)
        return item


def _take_id(fields: Fields, *, is_openai: bool) -> tuple[str, str]:
    """The caller's id ("" where there is none) and the path of its field."""
    names = ("custom_id",) if is_openai else ("item_id", "custom_id", "id")
    given = [name for name in names if fields.has(name)]
    if len(given) > 1:
        raise fields.wrong(given[1], f"says again what {given[0]} says; write one of them")
    if not given:
        return "", ""
    name = given[0]
    return take_id(fields, name), fields.at(name)


def _read_plain(fields: Fields) -> item_pb2.Item:
    kinds = [kind for kind in Kind if fields.has(kind.value)]
    if not kinds:
        raise FieldError("", "has none of prompt, messages, input, and no body with a url")
    if len(kinds) > 1:
        raise FieldError(kinds[1].value, f"stands beside {kinds[0].value}; a line is one of them")
    return read_body(fields, kinds[0], system_beside_messages=True)
