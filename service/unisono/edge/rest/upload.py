"""A multipart upload, written to the disk as it comes; of it, no more is in memory than a piece.

What is too large is read to its end all the same, up to a bound, and not kept: a client that is still sending would
otherwise see a broken connection instead of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from unisono.core.errors import LimitExceededError
from unisono.edge.rest.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from python_multipart.multipart import MultipartCallbacks

    from unisono.app.stores import FileDraft, FileStore

# What OpenAI takes of a batch's file.
MAX_FILE_BYTES: Final = 200 * 1024 * 1024
# What the store says is at its limit where all files together are too large.
FILES_LIMIT: Final = "max_files_bytes"
# Bytes that are read of what is too large; a client that sends more is cut off.
_MAX_READ_BYTES: Final = 1024 * 1024 * 1024
_MAX_FIELD_BYTES: Final = 16 * 1024
_MAX_PARTS: Final = 32
_MAX_NAME: Final = 255
# Written at one time.
_WRITE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What came."""

    draft: FileDraft
    filename: str
    # The other fields of the form.
    fields: dict[str, str]


class _Form:
    """Takes a form apart, as the parser finds it."""

    def __init__(self, boundary: bytes) -> None:
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }
        self._parser = MultipartParser(boundary, callbacks)
        self.filename: str | None = None
        self.fields: dict[str, bytes] = {}
        # Bytes of the file that came; and those of them that nobody has taken yet.
        self.file_bytes = 0
        self.pending = bytearray()
        self.is_ended = False
        self._parts = 0
        self._field_bytes = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        # The field that a part is; None: it is the file.
        self._name: str | None = None

    def feed(self, data: bytes) -> None:
        """The next piece; raises RefusedError."""
        try:
            _ = self._parser.write(data)
        except FormParserError as error:
            raise RefusedError(400, f"The body is no multipart form: {error}.") from error

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise RefusedError(400, f"The form has more than {_MAX_PARTS} parts.")
        self._disposition = b""
        self._header = (bytearray(), bytearray())

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        # Names may be any bytes, and most are UTF-8.
        kind, options = parse_options_header(self._disposition.decode("latin-1"))
        name = _text(options.get(b"name", b""))
        if kind != b"form-data" or not name:
            raise RefusedError(400, "Each part of the form needs a name.")
        if name == "file":
            if self.filename is not None:
                raise RefusedError(400, "The form has more than one file.", param="file")
            self.filename = _text(options.get(b"filename", b""))[-_MAX_NAME:] or "upload"
            self._name = None
        elif name in self.fields:
            raise RefusedError(400, f"The form says {name} twice.", param=name)
        else:
            self._name = name
            self.fields[name] = b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self.file_bytes += end - start
            if self.file_bytes <= MAX_FILE_BYTES:
                self.pending += data[start:end]
            return
        self._field_bytes += end - start
        if self._field_bytes > _MAX_FIELD_BYTES:
            raise RefusedError(400, f"The form's fields are longer than {_MAX_FIELD_BYTES:,} bytes.")
        self.fields[self._name] += data[start:end]

    def _on_end(self) -> None:
        self.is_ended = True


async def receive(content_type: str, chunks: AsyncIterable[bytes], files: FileStore) -> Upload:
    """Reads a whole upload; raises RefusedError, and LimitExceededError where there is no room on the disk."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise RefusedError(400, "A file is sent as multipart/form-data, with the fields file and purpose.")
    try:
        form = _Form(boundary)
    except FormParserError as error:
        raise RefusedError(400, f"The body is no multipart form: {error}.") from error
    draft = await files.draft()
    try:
        filename = await _read(form, chunks, draft)
    except LimitExceededError as error:
        await draft.discard()
        if error.metadata.get("limit") != FILES_LIMIT:
            raise
        await _read_on(chunks)
        # As OpenAI says that the quota for files is used up: it is of no use to send the same again.
        raise RefusedError(400, error.message) from error
    except BaseException:
        await draft.discard()
        raise
    fields = {name: _text(value) for name, value in form.fields.items()}
    return Upload(draft=draft, filename=filename, fields=fields)


async def _read(form: _Form, chunks: AsyncIterable[bytes], draft: FileDraft) -> str:
    """Writes the file of a form; answers with its name."""
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        if count > _MAX_READ_BYTES:
            raise _too_large()
        form.feed(chunk)
        if len(form.pending) >= _WRITE_BYTES:
            await draft.write(bytes(form.pending))
            form.pending.clear()
    if form.file_bytes > MAX_FILE_BYTES:
        raise _too_large()
    if not form.is_ended:
        raise RefusedError(400, "The form ends before its last boundary.")
    if form.filename is None:
        raise RefusedError(400, "Missing required parameter: 'file'.", param="file")
    if form.pending:
        await draft.write(bytes(form.pending))
    return form.filename


async def _read_on(chunks: AsyncIterable[bytes]) -> None:
    """Reads what is not kept, so that the client hears why."""
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        if count > _MAX_READ_BYTES:
            return


def _too_large() -> RefusedError:
    what = f"The file is larger than {MAX_FILE_BYTES:,} bytes (200 MiB), the most that a batch's file may have."
    return RefusedError(413, what, param="file", code="file_too_large")


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
