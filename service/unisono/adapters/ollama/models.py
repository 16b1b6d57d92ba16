"""What Ollama tells of its models and runners: `/api/tags`, `/api/show`, `/api/ps`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import msgspec

from unisono.adapters.ollama.answer import parse_time_ns
from unisono.core.memory import kv_bytes_per_token
from unisono.core.model import LoadedRunner, ModelInfo


class _Details(msgspec.Struct):
    family: str = ""
    parameter_size: str = ""
    quantization_level: str = ""
    # In /api/tags only, since 0.32; older ones tell it in /api/show.
    context_length: int = 0


class _Tag(msgspec.Struct):
    name: str = ""
    model: str = ""
    digest: str = ""
    size: int = 0
    details: _Details | None = None
    capabilities: list[str] | None = None


class _Tags(msgspec.Struct):
    models: list[_Tag] | None = None


class _Show(msgspec.Struct):
    details: _Details | None = None
    model_info: dict[str, Any] | None = None
    capabilities: list[str] | None = None


class _Running(msgspec.Struct):
    name: str = ""
    model: str = ""
    digest: str = ""
    size: int = 0
    size_vram: int = 0
    context_length: int = 0
    expires_at: str = ""


class _Runners(msgspec.Struct):
    models: list[_Running] | None = None


class _Version(msgspec.Struct):
    version: str


_decode_tags: Final = msgspec.json.Decoder(_Tags).decode
_decode_show: Final = msgspec.json.Decoder(_Show).decode
_decode_runners: Final = msgspec.json.Decoder(_Runners).decode
_decode_version: Final = msgspec.json.Decoder(_Version).decode


def read_version(text: bytes) -> str:
    """Reads /api/version. Raises msgspec.DecodeError, as all of these."""
    return _decode_version(text).version


def read_tags(text: bytes, backend: str) -> tuple[ModelInfo, ...]:
    """Reads /api/tags."""
    return tuple(
        _info(
            backend=backend,
            name=tag.name or tag.model,
            digest=tag.digest,
            details=tag.details or _Details(),
            capabilities=tag.capabilities,
            size=tag.size,
        )
        for tag in _decode_tags(text).models or ()
    )


def read_show(text: bytes, backend: str, name: str) -> ModelInfo:
    """Reads /api/show, which tells no digest: the name stands for it."""
    shown = _decode_show(text)
    details = shown.details or _Details()
    facts = shown.model_info or {}
    if not details.context_length:
        length = facts.get(f"{facts.get('general.architecture')}.context_length", 0)
        details.context_length = length if isinstance(length, int) else 0
    info = _info(backend=backend, name=name, digest=name, details=details, capabilities=shown.capabilities)
    return replace(info, kv_bytes_per_token=kv_bytes_per_token(facts))


def read_kv_bytes(text: bytes) -> int | None:
    """Reads from /api/show what a token of context takes in memory; None where it does not tell."""
    return kv_bytes_per_token(_decode_show(text).model_info or {})


def read_runners(text: bytes) -> tuple[LoadedRunner, ...]:
    """Reads /api/ps."""
    return tuple(
        LoadedRunner(
            model=runner.name or runner.model,
            digest=runner.digest or runner.name,
            context_length=runner.context_length,
            size_bytes=runner.size,
            size_vram_bytes=runner.size_vram,
            expires_at_ns=_time_or_none(runner.expires_at),
        )
        for runner in _decode_runners(text).models or ()
    )


def _info(
    *, backend: str, name: str, digest: str, details: _Details, capabilities: list[str] | None, size: int = 0
) -> ModelInfo:
    return ModelInfo(
        backend=backend,
        name=name,
        digest=digest or name,
        family=details.family,
        parameter_size=details.parameter_size,
        quantization=details.quantization_level,
        context_length=max(0, details.context_length),
        capabilities=None if capabilities is None else frozenset(capabilities),
        size_bytes=max(0, size),
    )


def _time_or_none(text: str) -> int | None:
    try:
        return parse_time_ns(text) if text else None
    except ValueError:
        return None
