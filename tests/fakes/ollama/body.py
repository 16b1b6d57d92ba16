"""Reading a request's JSON body with the errors of Go's encoding/json.

gin binds the body with a JSON decoder that reads one value and does not look at what follows it.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from tests.fakes.ollama.wire import ApiError

_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"
_BASE64 = re.compile(rb"[A-Za-z0-9+/\r\n]*={0,2}[\r\n]*")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+|[+-]?0")
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_GO_KINDS = {"str": "string", "int": "number", "float": "number", "bool": "bool", "list": "array", "dict": "object"}

# api/types.go: the fields whose type the decoder checks, with the Go type that its error names.
_COMMON: Mapping[str, tuple[type, str]] = {"model": (str, "string"), "options": (dict, "map[string]interface {}")}
_RUN: Mapping[str, tuple[type, str]] = {
    **_COMMON,
    "stream": (bool, "bool"),
    "truncate": (bool, "bool"),
    "shift": (bool, "bool"),
    "logprobs": (bool, "bool"),
    "top_logprobs": (int, "int"),
}
FIELDS: Mapping[str, Mapping[str, tuple[type, str]]] = {
    "ChatRequest": {**_RUN, "messages": (list, "[]api.Message"), "tools": (list, "api.Tools")},
    "GenerateRequest": {
        **_RUN,
        "prompt": (str, "string"),
        "suffix": (str, "string"),
        "system": (str, "string"),
        "template": (str, "string"),
        "raw": (bool, "bool"),
        "context": (list, "[]int"),
        "images": (list, "[]api.ImageData"),
    },
    "EmbedRequest": {**_COMMON, "truncate": (bool, "bool"), "dimensions": (int, "int")},
    "EmbeddingRequest": {**_COMMON, "prompt": (str, "string")},
    "ShowRequest": {"model": (str, "string"), "name": (str, "string")},
}
_MESSAGE: Mapping[str, tuple[type, str]] = {
    "role": (str, "string"),
    "content": (str, "string"),
    "thinking": (str, "string"),
    "images": (list, "[]api.ImageData"),
    "tool_calls": (list, "[]api.ToolCall"),
}


def parse_json(raw: bytes | bytearray) -> Any:
    """The first JSON value of a body; ApiError(400) with Go's words for what is none."""
    text = raw.decode("utf-8", "replace").lstrip(_BLANK)
    if not text:
        raise ApiError(400, "missing request body")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise ApiError(400, _go_words(error)) from None
    return value


def bind(raw: bytes | bytearray, kind: str) -> dict[str, Any]:
    """A body bound to one of Ollama's request types; ApiError(400) where it does not fit."""
    value = parse_json(raw)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ApiError(400, f"json: cannot unmarshal {_go_kind(value)} into Go value of type api.{kind}")
    _check(value, FIELDS[kind], kind, "")
    for message in value.get("messages") or ():
        if isinstance(message, dict):
            _check(message, _MESSAGE, kind, "messages.")
            for image in message.get("images") or ():
                check_base64(image)
        elif message is not None:
            raise ApiError(
                400,
                f"json: cannot unmarshal {_go_kind(message)} into Go struct field {kind}.messages of type api.Alias",
            )
    for image in value.get("images") or ():
        check_base64(image)
    if value.get("keep_alive") is not None:
        value["keep_alive"] = duration_s(value["keep_alive"])
    think = value.get("think")
    if isinstance(think, str) and think not in ("high", "medium", "low", "max"):
        allowed = '"high", "medium", "low", "max", true, or false'
        raise ApiError(400, f'invalid think value: "{think}" (must be {allowed})')
    return value


def duration_s(value: Any) -> float:
    """A keep_alive in seconds; negative is for ever (api/types.go, Duration.UnmarshalJSON())."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        words = {"dict": "map[string]interface {}", "list": "[]interface {}", "bool": "bool"}
        raise ApiError(400, f"Unsupported type: '{words[type(value).__name__]}'")
    if isinstance(value, str):
        if not _DURATION.fullmatch(value):
            raise ApiError(400, f'time: invalid duration "{value}"')
        seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in _DURATION_PART.findall(value))
        return float("inf") if value.startswith("-") and seconds else seconds
    return float("inf") if value < 0 else float(value)


def check_base64(image: Any) -> None:
    """ApiError(400) for an image that is not standard base64."""
    if not isinstance(image, str):
        raise ApiError(400, f"json: cannot unmarshal {_go_kind(image)} into Go value of type []uint8")
    data = image.encode()
    good = _BASE64.match(data)
    assert good is not None
    if good.end() < len(data):
        raise ApiError(400, f"illegal base64 data at input byte {good.end()}")
    try:
        binascii.a2b_base64(data)
    except binascii.Error:
        raise ApiError(400, f"illegal base64 data at input byte {len(data) // 4 * 4}") from None
    if len(data.replace(b"\n", b"").replace(b"\r", b"")) % 4:
        raise ApiError(400, f"illegal base64 data at input byte {len(data) // 4 * 4}")


def _check(value: Mapping[str, Any], types: Mapping[str, tuple[type, str]], kind: str, path: str) -> None:
    for name, item in value.items():
        wanted = types.get(name)
        if wanted is None or item is None:
            continue
        python, go = wanted
        if type(item) is not python:
            raise ApiError(
                400, f"json: cannot unmarshal {_go_kind(item)} into Go struct field {kind}.{path}{name} of type {go}"
            )


def _go_kind(value: Any) -> str:
    return _GO_KINDS.get(type(value).__name__, "null")


def _go_words(error: json.JSONDecodeError) -> str:
    """Go's message for a syntax error that Python found; the common ones only."""
    rest = error.doc[error.pos :].lstrip(_BLANK)
    if not rest or error.msg.startswith("Unterminated string"):
        return "unexpected EOF"
    where = "looking for beginning of value"
    if error.msg.startswith(("Expecting property name", "Illegal trailing comma")):
        where = "looking for beginning of object key string"
    elif error.msg.startswith("Expecting ':'"):
        where = "after object key"
    elif error.msg.startswith("Expecting ','"):
        where = "after object key:value pair"
    elif error.msg.startswith("Invalid control character"):
        where = "in string literal"
    return f"invalid character '{rest[0]}' {where}"
