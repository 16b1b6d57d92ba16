"""Settings: from the environment (UNISONO_…), each with a unit and a default that serves.

Durations are written as people write them ("500ms", "2m", "1h30m"), sizes too ("4MiB", "512 kB").
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from unisono.core.durations import parse_duration

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgG]?)(i?)[bB]?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


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


# Seconds, and bytes.
Duration = Annotated[float, BeforeValidator(_duration)]
Size = Annotated[int, BeforeValidator(_size)]


class Settings(BaseSettings):
    """The service's settings; each field is the variable UNISONO_ with its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="UNISONO_", extra="ignore", frozen=True, populate_by_name=True)

    # Where the gRPC service listens. Loopback by default: there is no authentication yet.
    listen: str = "127.0.0.1:50051"
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    # -- The backend: the first that is set, of these three.
    # llama.cpp's own server inside this service, with a small model.
    embedded: bool = False
    # A llama.cpp server's address.
    llama_server_url: str = ""
    # The Ollama's address; empty: OLLAMA_HOST, and 127.0.0.1:11434 where that is not set either.
    ollama_url: str = ""
    # The model of batches and items that name none; empty: the backend's only one.
    default_model: str = ""
    # Sent to the backend as "Authorization: Bearer …".
    backend_token: SecretStr = SecretStr("")
    connect_timeout: Duration = Field(default=5.0, gt=0)
    # How long one load of a model may take; three are tried.
    load_timeout: Duration = Field(default=600.0, gt=0)
    # How long items wait for a backend that is away before they fail with BACKEND_UNAVAILABLE.
    backend_patience: Duration = Field(default=60.0, ge=0)
    # Requests at the backend of which none is answered anything for so long are given up.
    stall_timeout: Duration = Field(default=600.0, gt=0)

    # -- How much at a time.
    # Slots of each runner: set it to OLLAMA_NUM_PARALLEL where you know it. Unset: learned.
    slots: int | None = Field(default=None, ge=1, le=4096)
    # The most requests in flight while slots are being learned.
    max_in_flight: int = Field(default=64, ge=1, le=4096)
    # The memory that a runner may take; no larger context is asked for than fits. Unset: not known.
    memory_limit: Size | None = Field(default=None, ge=1)
    # The share of a runner's context, of all its slots together, that items in flight may reserve.
    memory_factor: float = Field(
        default=1.0,
        gt=0,
        le=1,
        validation_alias=AliasChoices("UNISONO_MEMORY_FACTOR", "OLLAMA_BATCH_MEMORY_FACTOR"),
    )

    # The folder in which learned slots are kept from one run to the next; empty: XDG_STATE_HOME/unisono, and
    # ~/.local/state/unisono where that is not set; "none": they are not kept.
    state_dir: str = ""

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

    # -- Traces; where they go is told by the standard OTEL_* variables.
    # Items of one batch that get a span of their own; failures always do.
    trace_items: int = Field(default=1000, ge=0)
