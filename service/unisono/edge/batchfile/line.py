"""What a line of a batch file is made of: its form, the object that it holds, the caller's id."""

from __future__ import annotations

import unicodedata
from enum import Enum
from typing import Final

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.body import Kind, read_body
from unisono.edge.batchfile.fields import FieldError, Fields, name_of, parse_json
from unisono.edge.batchfile.responses_in import read_response

# A longer line is not kept: the service would not take it (32 MiB a message).
MAX_LINE_BYTES: Final = 32 * 1024 * 1024 - 64 * 1024
MAX_ID_BYTES: Final = 256


class Form(Enum):
    """How a line was written, and so how its result is; the value is an OpenAI line's `url`."""

    PLAIN = ""
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"


_KINDS: Final = {Form.CHAT: Kind.CHAT, Form.COMPLETIONS: Kind.GENERATE, Form.EMBEDDINGS: Kind.EMBED}
# The forms of OpenAI's lines, by their url.
FORMS: Final = {form.value: form for form in Form if form is not Form.PLAIN}


def read_openai(body: Fields, form: Form) -> item_pb2.Item:
    """The item of an OpenAI line's body, still without an id. Raises FieldError."""
    if form is Form.RESPONSES:
        return read_response(body)
    kind = _KINDS[form]
    if not body.has(kind.value):
        raise body.wrong(kind.value, "is missing")
    return read_body(body, kind, system_beside_messages=False)


def parse_object(text: bytes | None) -> dict[str, object]:
    """The JSON object of a line; None: it is longer than MAX_LINE_BYTES. Raises FieldError."""
    if text is None:
        raise FieldError("", f"is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise FieldError("", f"not UTF-8 (byte {error.start + 1} of the line)") from None
    value = parse_json(decoded)
    if not isinstance(value, dict):
        raise FieldError("", f"must be a JSON object, not {name_of(value)}")
    return value


def take_id(fields: Fields, name: str) -> str:
    """The id in a field that is there: text, or a whole number. Raises FieldError."""
    value = fields.value(name)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64:
        value = str(value)
    if not isinstance(value, str):
        raise fields.wrong(name, f"must be text, not {name_of(value)}")
    if not value:
        raise fields.wrong(name, "is empty; leave it out to have the line's number for an id")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise fields.wrong(name, "must not hold control characters")
    if len(value.encode()) > MAX_ID_BYTES:
        raise fields.wrong(name, f"is longer than {MAX_ID_BYTES} bytes")
    return value
