"""Settings: from the environment (UNISONO_…), each with a unit and a default that serves.

What durations, sizes, addresses and tokens are stands in `setting_kinds.py`.

Several backends stand in one variable, UNISONO_BACKENDS; what only one of them has (a token, a number of slots) in
variables that end in its name. `configured_backends` puts the two together.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from unisono.setting_kinds import (
    A_SIZE,
    READ_CHANGES,
    READ_HOSTS,
    READ_ORIGINS,
    READ_SIZE,
    Address,
    Duration,
    Listen,
    MillisecondsOrDuration,
    Size,
    Slots,
    Token,
    clean_token,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class SettingError(ValueError):
    """A setting cannot be what it is; the message names the variable."""


# -- Several backends ------------------------------------------------------------------------------------------

EMBEDDED = "embedded"
LLAMA_SERVER = "llama-server"
OLLAMA = "ollama"
# What may stand before an address, with a plus.
_KINDS = (OLLAMA, LLAMA_SERVER)
_BACKEND_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}", re.ASCII)
_KIND = re.compile(r"([a-z-]+)\+(.*)", re.ASCII)
_NO_TOKEN = SecretStr("")
_TOKEN_OF, _SLOTS_OF = "UNISONO_BACKEND_TOKEN_", "UNISONO_SLOTS_"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """One backend of the configuration."""

    # Unique; the service calls it so everywhere.
    name: str
    # "ollama", "llama-server" or "embedded".
    kind: str
    # Its address, which may hold a password; empty for the embedded engine, and for Ollama's usual address.
    url: str = field(default="", repr=False)
    # Sent to it as "Authorization: Bearer …".
    token: SecretStr = _NO_TOKEN
    # Slots of each of its runners; None: learned.
    slots: int | None = None
    # Where its address is written: a variable, or an option of the command line.
    written_in: str = "UNISONO_BACKENDS"

    @property
    def suffix(self) -> str:
        """What its own variables end in."""
        return self.name.upper().replace("-", "_")

    @property
    def loads_on_demand(self) -> bool:
        """Whether its models take each other's place, as its clients ask for them."""
        return self.kind == OLLAMA


def parse_backends(text: str) -> tuple[BackendSettings, ...]:
    """Reads "gpu1=http://10.0.0.1:11434, cpp=llama-server+http://10.0.0.2:8080, emb=embedded".

    Raises ValueError.
    """
    found: dict[str, BackendSettings] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, where = (word.strip() for word in part.partition("="))
        if not _BACKEND_NAME.fullmatch(name) or not where:
            # Without the address: it may hold a password.
            raise ValueError(
                f"{name!r}: each backend is NAME=ADDRESS, several with commas; a name has letters, digits, - and _, "
                "and begins with a letter"
            )
        kind, url = OLLAMA, where
        if where == EMBEDDED:
            kind, url = EMBEDDED, ""
        elif (written := _KIND.fullmatch(where)) is not None:
            kind, url = written.groups()
            if kind not in _KINDS or not url:
                raise ValueError(
                    f"{name}: write ADDRESS for an Ollama, {LLAMA_SERVER}+ADDRESS for a llama.cpp server, "
                    f"or {EMBEDDED}"
                )
        one = BackendSettings(name=name, kind=kind, url=url)
        if one.suffix in found:
            raise ValueError(
                f"two backends are called {name!r}, by names that differ in case or in - and _ at most: "
                "give each one of its own"
            )
        found[one.suffix] = one
    if text.strip() and not found:
        raise ValueError("it names no backend: each is NAME=ADDRESS, several with commas")
    return tuple(found.values())


def _backends(value: Any) -> Any:
    return parse_backends(value) if isinstance(value, str) else value


class Settings(BaseSettings):
    """The service's settings; each field is the variable UNISONO_ with its name in capitals.

    A variable that is empty is as one that is not set.
    """

    model_config = SettingsConfigDict(
        env_prefix="UNISONO_",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        # An address may hold a password.
        hide_input_in_errors=True,
    )

    # Where the gRPC service listens. Loopback by default: there is no authentication yet.
    listen: Listen = "127.0.0.1:50051"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # -- The backend: the first that is set, of these four.
    # Several, each with a name: see `parse_backends`.
    backends: Annotated[tuple[BackendSettings, ...], NoDecode, BeforeValidator(_backends)] = ()
    # llama.cpp's own server inside this service, with a small model.
    embedded: bool = False
    # A llama.cpp server's address.
    llama_server_url: str = ""
    # The Ollama's address; empty: OLLAMA_HOST, and 127.0.0.1:11434 where that is not set either.
    ollama_url: str = ""
    # The model of batches and items that name none; empty: the backend's only one.
    default_model: str = ""
    # Sent to the backend as "Authorization: Bearer …". Of several, each has one of its own, or none.
    backend_token: Token = _NO_TOKEN
    connect_timeout: Duration = Field(default=5.0, gt=0)
    # How long one load of a model may take; three are tried.
    load_timeout: Duration = Field(default=600.0, gt=0)
    # How long items wait for a backend that is away before they fail with BACKEND_UNAVAILABLE.
    backend_patience: Duration = Field(default=60.0, ge=0)
    # Requests at the backend of which none is answered anything for so long are given up.
    stall_timeout: Duration = Field(default=600.0, gt=0)
    # After so much work without a pause, a backend that loads models on demand is left to its other clients for a
    # moment: it keeps them waiting as long as requests of ours are there. 0: never.
    yield_every: Duration = Field(default=300.0, ge=0)

    # -- How much at a time.
    # Slots of each runner: set it to OLLAMA_NUM_PARALLEL where you know it. Unset: learned. Of several backends, it
    # is for those that have no number of their own.
    slots: Slots | None = None
    # The most requests in flight while slots are being learned.
    max_in_flight: int = Field(default=64, ge=1, le=4096)
    # The memory that a runner may take; no larger context is asked for than fits. Unset: not known.
    memory_limit: Annotated[int, Field(ge=1), A_SIZE, READ_SIZE] | None = None
    # The share of a runner's context, of all its slots together, that items in flight may reserve.
    memory_factor: float = Field(
        default=1.0,
        gt=0,
        le=1,
        validation_alias=AliasChoices("UNISONO_MEMORY_FACTOR", "OLLAMA_BATCH_MEMORY_FACTOR"),
    )

    # -- The window, in which requests of single callers (Infer) gather to go together.
    # Otherwise none is gathered, and each waits for a free slot only.
    batch_enabled: bool = Field(
        default=True, validation_alias=AliasChoices("UNISONO_BATCH_ENABLED", "OLLAMA_BATCH_ENABLED")
    )
    # They go when there are so many. Unset: as many as the runner has slots.
    batch_size: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("UNISONO_BATCH_SIZE", "OLLAMA_BATCH_SIZE")
    )
    # They go after so long at the latest. Under both names, a bare number means milliseconds.
    batch_timeout: MillisecondsOrDuration = Field(
        default=0.010, ge=0, validation_alias=AliasChoices("UNISONO_BATCH_TIMEOUT", "OLLAMA_BATCH_TIMEOUT")
    )

    # The folder in which learned slots are kept from one run to the next; empty: XDG_STATE_HOME/unisono, and
    # ~/.local/state/unisono where that is not set; "none": they are not kept.
    state_dir: str = ""

    # -- Batches that are kept (SubmitBatch), by `unisono serve`.
    # The folder in which they are kept; empty: XDG_DATA_HOME/unisono, and ~/.local/share/unisono where that is not
    # set; "none": nowhere.
    data_dir: str = ""
    # The journal's file grows no larger. Unset: as far as the disk has room.
    max_data_bytes: Annotated[int, Field(ge=1024 * 1024), A_SIZE, READ_SIZE] | None = None
    # Files that callers hand in and get back have no more bytes together; then no more are taken. Unset: as far as
    # the disk has room.
    max_files_bytes: Annotated[int, Field(ge=1), A_SIZE, READ_SIZE] | None = None
    # How long a batch is kept after its end.
    retention: Duration = Field(default=30 * 86_400.0, ge=0)
    # That run at one time, and that have not ended.
    max_kept_running: int = Field(default=8, ge=1)
    max_kept_batches: int = Field(default=1_000, ge=1)

    # -- The embedded engine.
    embedded_model: str = ""
    embedded_slots: int = Field(default=8, ge=1, le=256)
    # Tokens of context for each slot.
    embedded_context: int = Field(default=2048, ge=64)

    # -- What batches get where they say nothing.
    item_timeout: Duration = Field(default=120.0, ge=0)
    keep_alive: Duration = Field(default=300.0, ge=0)
    detach_grace: Duration = Field(default=900.0, ge=0)

    # -- Limits.
    max_items: int = Field(default=50_000, ge=1)
    max_item_text_bytes: Size = Field(default=4 * 1024 * 1024, ge=1)
    max_image_bytes: Size = Field(default=16 * 1024 * 1024, ge=1)
    max_batches: int = Field(default=256, ge=1)
    max_journal_bytes: Size = Field(default=256 * 1024 * 1024, ge=1024)
    max_open_items: int = Field(default=10_000, ge=1)
    # How long ended batches can be attached to.
    keep_ended: Duration = Field(default=900.0, ge=0)
    # How long running batches may go on when the service is told to stop.
    drain: Duration = Field(default=30.0, ge=0)

    # Where `unisono serve` serves its metrics, at /metrics; "none": nowhere. That the port is taken is a warning.
    metrics_listen: Address = "127.0.0.1:9464"

    # Where `unisono serve` serves HTTP; "none": nowhere. That the port is taken is a warning.
    # Loopback by default: there is no authentication yet.
    http_listen: Address = "127.0.0.1:4080"
    # Names by which that port may be asked, beside addresses, names without a dot, this machine's own, and those
    # below localhost, local and internal. And where web pages come from that may ask it, beside this machine.
    http_hosts: Annotated[tuple[str, ...], NoDecode, READ_HOSTS] = ()
    http_origins: Annotated[tuple[str, ...], NoDecode, READ_ORIGINS] = ()

    # -- The drop-in Ollama, at the same port.
    # What may change the server behind it: names of setting_kinds.CHANGES, with commas.
    allow: Annotated[frozenset[str], NoDecode, READ_CHANGES] = frozenset()
    # Forwarded requests that are under way at one time, as long as Ollama's own queue; and the body of one.
    max_forwarded: int = Field(default=512, ge=1)
    max_forwarded_bytes: Size = Field(default=64 * 1024 * 1024, ge=1024)

    # -- Traces; where they go is told by the standard OTEL_* variables.
    # Items of one batch that get a span of their own; failures always do.
    trace_items: int = Field(default=1000, ge=0)


def configured_backends(settings: Settings, environ: Mapping[str, str]) -> tuple[BackendSettings, ...]:
    """The backends, in the order of the configuration; one, where UNISONO_BACKENDS is not set.

    Raises SettingError: a variable for a backend that there is not, a number of slots or a token that is none.
    """
    if not settings.backends:
        return (replace(_only_backend(settings, environ), token=settings.backend_token, slots=settings.slots),)
    suffixes = {one.suffix for one in settings.backends}
    for variable in environ:
        for start in (_TOKEN_OF, _SLOTS_OF):
            if environ[variable] and variable.startswith(start) and variable.removeprefix(start) not in suffixes:
                names = ", ".join(one.name for one in settings.backends)
                raise SettingError(f"{variable}: UNISONO_BACKENDS has no backend of that name; it has {names}")
    return tuple(
        replace(
            one,
            token=_own_token(environ, _TOKEN_OF + one.suffix),
            slots=_own_slots(environ, _SLOTS_OF + one.suffix) or settings.slots,
        )
        for one in settings.backends
    )


def _only_backend(settings: Settings, environ: Mapping[str, str]) -> BackendSettings:
    if settings.embedded:
        return BackendSettings(name=EMBEDDED, kind=EMBEDDED)
    if settings.llama_server_url:
        url, written_in = settings.llama_server_url, "UNISONO_LLAMA_SERVER_URL"
        return BackendSettings(name=LLAMA_SERVER, kind=LLAMA_SERVER, url=url, written_in=written_in)
    url, written_in = environ.get("OLLAMA_HOST", ""), "OLLAMA_HOST"
    if settings.ollama_url:
        is_of_environ = environ.get("UNISONO_OLLAMA_URL") == settings.ollama_url
        url, written_in = settings.ollama_url, "UNISONO_OLLAMA_URL" if is_of_environ else "--ollama"
    return BackendSettings(name=OLLAMA, kind=OLLAMA, url=url, written_in=written_in)


def _own_slots(environ: Mapping[str, str], variable: str) -> int | None:
    value = environ.get(variable, "").strip()
    try:
        return _slots.validate_python(value) if value else None
    except ValidationError as error:
        raise SettingError(_must_be(variable, value, _slots.json_schema())) from error


_slots = TypeAdapter[int](Slots)


def _own_token(environ: Mapping[str, str], variable: str) -> SecretStr:
    try:
        return clean_token(SecretStr(environ.get(variable, "")))
    except ValueError as error:
        raise SettingError(f"{variable}: {error}") from None


# -- What does nothing -----------------------------------------------------------------------------------------

# The command line's own, and the fault rig's.
_OTHERS = ("UNISONO_SERVER", "UNISONO_FAILPOINTS")
# What Kubernetes sets in every pod beside a Service of the name unisono.
_FOREIGN = re.compile(r"UNISONO_(SERVICE_(HOST|PORT)|PORT_[0-9]+_)")


# Names of one setting, the one that goes first before the others.
_ALIASES = [
    [str(name) for name in one.validation_alias.choices]
    for one in Settings.model_fields.values()
    if isinstance(one.validation_alias, AliasChoices)
]


def _goes_first(first: str, other: str) -> str:
    return f"{other} is ignored: {first} is set too, and goes first"


def idle_settings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """For each variable that is set, would be heeded, and does nothing: its name, and why."""
    named = {
        "UNISONO_BACKENDS": settings.backends,
        "UNISONO_EMBEDDED": settings.embedded,
        "UNISONO_LLAMA_SERVER_URL": settings.llama_server_url,
        "UNISONO_OLLAMA_URL": settings.ollama_url,
    }
    first, *passed_over = [name for name, value in named.items() if value] or [""]
    written = {name.upper(): value for name, value in environ.items()}
    if written.get(first) and written.get("OLLAMA_HOST"):
        passed_over.append("OLLAMA_HOST")
    lines = [_goes_first(first, variable) for variable in passed_over]
    for names in _ALIASES:
        used, *others = [name for name in names if written.get(name)] or [""]
        lines += [_goes_first(used, variable) for variable in others]
    if settings.backends and settings.backend_token.get_secret_value():
        lines.append(f"UNISONO_BACKEND_TOKEN is ignored: with UNISONO_BACKENDS, each has its own, {_TOKEN_OF}<NAME>")
    known = {f"UNISONO_{name.upper()}" for name in Settings.model_fields} | {*_OTHERS}
    for variable in sorted(environ):
        name = variable.upper()
        if not name.startswith("UNISONO_") or not environ[variable] or name in known or _FOREIGN.match(name):
            continue
        if name.startswith((_TOKEN_OF, _SLOTS_OF)):
            # Of a list, `configured_backends` sees to it; and on the command line, another was named instead of it.
            if not settings.backends and not environ.get("UNISONO_BACKENDS"):
                lines.append(
                    f"{variable} is ignored: it is for one of several backends, and UNISONO_BACKENDS is not set"
                )
            continue
        near = difflib.get_close_matches(
            name.removeprefix("UNISONO_"), [one.removeprefix("UNISONO_") for one in known], 1
        )
        lines.append(
            f"{variable} is ignored: there is no such setting" + "".join(f"; is UNISONO_{one} meant?" for one in near)
        )
    return lines


# -- What is wrong ---------------------------------------------------------------------------------------------

# Kinds of values, by their name in a JSON schema. Texts and lists are not among them: they may hold a password.
_KIND_WORDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}


def wrong_settings(error: ValidationError, environ: Mapping[str, str]) -> list[str]:
    """For each setting that cannot be what it is: the variable, its value, and what it must be.

    Validators of our own say so in words of their own; for the rest, the words follow from the setting's schema.
    """
    schemas = Settings.model_json_schema(by_alias=False)["properties"]
    lines: list[str] = []
    for one in error.errors():
        name, variable = _setting(str(one["loc"][0]), environ)
        if (own := one.get("ctx", {}).get("error")) is not None:
            lines.append(f"{variable}: {own}")
        else:
            lines.append(_must_be(variable, environ.get(variable, one["input"]), schemas[name]))
    return lines


def _setting(place: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The field that an error speaks of, and its variable: of one that has several, the one that is set."""
    for name, field_info in Settings.model_fields.items():
        names = field_info.validation_alias
        if isinstance(names, AliasChoices) and place in names.choices:
            return name, next((str(variable) for variable in names.choices if environ.get(str(variable))), place)
    return place.lower(), f"UNISONO_{place.upper()}"


def _must_be(variable: str, value: object, schema: Mapping[str, Any]) -> str:
    # Where a setting may be left out, its schema is that of what else it may be.
    schema = schema["anyOf"][0] if "anyOf" in schema else schema
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{variable} is {value!r}; it must be {', '.join(others)} or {last}"
    kind = schema.get("description") or _KIND_WORDS.get(schema["type"])
    if kind is None:
        return f"{variable} is not a valid {schema['type']}"
    return f"{variable} is {value!r}; it must be {kind}{_bounds(schema)}"


def _bounds(schema: Mapping[str, Any]) -> str:
    above, least, most = schema.get("exclusiveMinimum"), schema.get("minimum"), schema.get("maximum")
    if least is not None:
        return f", {least:g} to {most:g}" if most is not None else f", {least:g} or more"
    if above is not None:
        return f", above {above:g}" + (f" and up to {most:g}" if most is not None else "")
    return ""
