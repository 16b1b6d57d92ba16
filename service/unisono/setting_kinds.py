"""Kinds of values that settings have: durations, sizes, addresses, tokens; how each is written, and what it is then.

Durations are written as people write them ("500ms", "2m", "1h30m"), sizes too ("4MiB", "512 kB").
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from unisono.core.durations import parse_duration

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgG]?)(i?)[bB]?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}
_BARE = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+", re.ASCII)
_HOST_PORT = re.compile(r"(?:\[[^\[\]\s]+\]|[^:/\[\]\s]+):([0-9]{1,5})", re.ASCII)
_HIGHEST_PORT = 65_535
# A star stands for any text.
_HOST = re.compile(r"\*|(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/\s,?#@]+", re.ASCII)


def _duration(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    written = _SIZE.fullmatch(value.strip())
    if written is None:
        raise ValueError(f"{value!r} is not a size: write 4MiB, 512kB or a number of bytes")
    number, prefix, binary = written.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


def _milliseconds(value: Any) -> Any:
    """As a duration, but a bare number means milliseconds."""
    if isinstance(value, str) and _BARE.fullmatch(value.strip()):
        value = f"{value}ms"
    return _duration(value)


def clean_token(value: SecretStr) -> SecretStr:
    """Without what a file of secrets has around them. What is refused is not repeated: it is a secret."""
    text = value.get_secret_value().strip()
    if not (text.isascii() and text.isprintable()):
        raise ValueError("has a character that cannot stand in an HTTP header: take out all but printable ASCII")
    return SecretStr(text)


def _listen(value: str) -> str:
    value = value.strip()
    if value.startswith("unix:"):
        return value
    written = _HOST_PORT.fullmatch(value)
    if written is None or int(written[1]) > _HIGHEST_PORT:
        raise ValueError(
            f"{value!r} is not HOST:PORT, like 127.0.0.1:50051 or [::]:50051, with a port from 0 (any that is free) "
            f"to {_HIGHEST_PORT}"
        )
    return value


def parse_address(text: str) -> tuple[str, int] | None:
    """Reads HOST:PORT, with brackets around an IPv6 address; None for "none". Raises ValueError."""
    if text.strip().lower() == "none":
        return None
    written = _HOST_PORT.fullmatch(text.strip())
    if written is None or int(written[1]) > _HIGHEST_PORT:
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, or none")
    return text.strip().rpartition(":")[0].strip("[]"), int(written[1])


def _address(value: Any) -> Any:
    if isinstance(value, str):
        _ = parse_address(value)
    return value


def _written(value: Any, pattern: re.Pattern[str], what: str) -> Any:
    """The parts of a list with commas, each of which must fit."""
    if not isinstance(value, str):
        return value
    parts = tuple(part for part in (part.strip() for part in value.split(",")) if part)
    for part in parts:
        if not pattern.fullmatch(part):
            raise ValueError(f"{part!r} is no {what}, several with commas")
    return parts


def _hosts(value: Any) -> Any:
    return _written(value, _HOST, "name of a host without its port: write unisono.example.org, or *.example.org")


def _origins(value: Any) -> Any:
    return _written(value, _ORIGIN, "origin of a page: write https://app.example.org, or https://*.example.org")


# Seconds, and bytes. A description is what `wrong_settings` calls a value of the kind.
_A_DURATION = Field(description="a duration like 500ms, 30s or 1h30m")
Duration = Annotated[float, BeforeValidator(_duration), _A_DURATION]
MillisecondsOrDuration = Annotated[float, BeforeValidator(_milliseconds), _A_DURATION]
A_SIZE = Field(description="a size like 4MiB, 512kB or a number of bytes")
# These two, last and in this order, where a size has bounds and may be left out: so the bounds are in the schema.
READ_SIZE = BeforeValidator(_size)
Size = Annotated[int, A_SIZE, READ_SIZE]
Slots = Annotated[int, Field(ge=1, le=4096)]
Token = Annotated[SecretStr, AfterValidator(clean_token)]
Listen = Annotated[str, AfterValidator(_listen)]
Address = Annotated[str, BeforeValidator(_address)]
# For tuples that pydantic must not read as JSON.
READ_HOSTS = BeforeValidator(_hosts)
READ_ORIGINS = BeforeValidator(_origins)
