"""What Ollama tells of its models and runners: `/api/tags`, `/api/show`, `/api/ps`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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
    # The Modelfile, and its PARAMETER lines by themselves: "draft_num_predict              4".
    modelfile: str = ""
    parameters: str = ""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What /api/show tells of a model, and /api/tags does not: see ModelInfo."""

    kv_bytes_per_token: int | None
    draft_num_predict: int

    def of(self, model: ModelInfo) -> ModelInfo:
        """The model with that."""
        return replace(model, kv_bytes_per_token=self.kv_bytes_per_token, draft_num_predict=self.draft_num_predict)


# Where nobody says how many, a model with a draft model beside it drafts so many. Source: Ollama 0.33, api/types.go,
# DefaultOptions; server/routes.go, modelOptions. Some versions do so with layers of its own for it, too.
_DRAFTED_BY_DEFAULT: Final = 4
_PARAMETER: Final = re.compile(r"^draft_num_predict\s+(\d+)(?:\.\d*)?\s*$", re.MULTILINE)
_DRAFT_MODEL: Final = re.compile(r"^DRAFT .*sha256-[0-9a-f]{64}\W*$", re.MULTILINE)

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
    return read_shown(text).of(info)


def read_shown(text: bytes) -> Shown:
    """Reads what only /api/show tells."""
    shown = _decode_show(text)
    facts = shown.model_info or {}
    return Shown(kv_bytes_per_token=kv_bytes_per_token(facts), draft_num_predict=_drafted(shown, facts))


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


def _drafted(shown: _Show, facts: dict[str, Any]) -> int:
    """Tokens that the model drafts for each pass; more than it does where there is doubt, which harms nothing."""
    if parameter := _PARAMETER.search(shown.parameters):
        return int(parameter[1])
    layers = facts.get(f"{facts.get('general.architecture')}.nextn_predict_layers")
    can_draft = _DRAFT_MODEL.search(shown.modelfile) is not None or (isinstance(layers, int) and layers > 0)
    return _DRAFTED_BY_DEFAULT if can_draft else 0


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
