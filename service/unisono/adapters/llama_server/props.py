"""What a llama.cpp server tells of itself: `/props` and `/v1/models`, as values.

Source of the fields: answers of the server (xllamacpp 2026.10), and llama.cpp's tools/server/README.md.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from unisono.core.model import ModelInfo

# A template that knows one of these can be told to think, or shows what was thought.
_THINKING: Final = re.compile(r"enable_thinking|reasoning_effort|reasoning_content|<think>|thinking")


class Settings(msgspec.Struct):
    """What each slot starts with."""

    # Tokens of context of each slot.
    n_ctx: int = 0


class TemplateCaps(msgspec.Struct):
    """What the chat template can write."""

    supports_tools: bool = False


class Props(msgspec.Struct):
    """The answer of /props."""

    default_generation_settings: Settings = msgspec.field(default_factory=Settings)
    total_slots: int = 0
    build_info: str = ""
    model_path: str = ""
    # "vision", "audio", "video" → whether it takes them.
    modalities: dict[str, bool] = {}
    chat_template: str = ""
    # None from servers that do not tell.
    chat_template_caps: TemplateCaps | None = None


class Meta(msgspec.Struct):
    """Figures of a model's file."""

    n_ctx_train: int | None = None
    n_params: int | None = None
    size: int | None = None
    ftype: str | None = None


class Model(msgspec.Struct):
    """One entry of /v1/models."""

    # The alias; without one, the file's path.
    id: str
    # None while it is being loaded.
    meta: Meta | None = None


class Models(msgspec.Struct):
    """The answer of /v1/models."""

    data: list[Model] = []


def model_info(model: Model, props: Props, *, backend: str, embeds: bool) -> ModelInfo:
    """A model as the rest of the house knows it."""
    meta = model.meta or Meta()
    # Without an alias the id is the file's path, which is nobody's business.
    name = re.split(r"[/\\]", model.id)[-1].removesuffix(".gguf") or model.id
    return ModelInfo(
        backend=backend,
        name=name,
        # It tells no digest, but it holds one model for as long as it runs.
        digest=name,
        parameter_size=_short(meta.n_params),
        quantization=meta.ftype or "",
        context_length=meta.n_ctx_train or 0,
        capabilities=capabilities(props, embeds=embeds),
        size_bytes=meta.size or 0,
        fixed_context=props.default_generation_settings.n_ctx,
    )


def capabilities(props: Props, *, embeds: bool) -> frozenset[str]:
    """What the model can do, in Ollama's words.

    Tools matter most: a template that does not know them leaves them out without a word. "insert" is never among
    them: /infill gives another kind of answer.
    """
    caps = props.chat_template_caps
    can = {
        "completion": True,
        "tools": caps.supports_tools if caps is not None else "tools" in props.chat_template,
        "thinking": _THINKING.search(props.chat_template) is not None,
        "vision": props.modalities.get("vision", False),
        "embedding": embeds,
    }
    return frozenset(name for name, is_so in can.items() if is_so)


def _short(count: int | None) -> str:
    """A number of parameters as people write it: "134.52M", "8.03B"."""
    if not count:
        return ""
    return f"{count / 1e9:.2f}B" if count >= 1_000_000_000 else f"{count / 1e6:.2f}M"
