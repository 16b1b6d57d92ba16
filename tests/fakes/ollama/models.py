"""The models that the stand-in has installed, and the options that a request may carry.

Facts of the real server stand beside the function of Ollama's source (v0.32.15) that they were read from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.ollama.wire import ApiError

# server/sched.go, load(): these families are forced to one slot, whatever OLLAMA_NUM_PARALLEL says.
ONE_SLOT_FAMILIES = frozenset(
    {
        "mllama",
        "qwen3vl",
        "qwen3vlmoe",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "nemotron_h_omni",
    }
)

# api/types.go, Options and FromMap(): the options that are known, and the word for each type in an error.
OPTION_TYPES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "num_ctx",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "draft_num_predict",
            "num_keep",
            "seed",
            "num_predict",
            "top_k",
            "repeat_last_n",
        ),
        "integer",
    ),
    **dict.fromkeys(
        (
            "top_p",
            "min_p",
            "typical_p",
            "temperature",
            "repeat_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
        "float32",
    ),
    "use_mmap": "boolean",
    "stop": "array",
}


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """One installed model."""

    name: str  # with or without its tag; without one it is ":latest"
    digest: str = ""  # models with one digest are aliases of one file; default: made from the name
    capabilities: tuple[str, ...] = ("completion",)  # completion, tools, thinking, vision, insert, embedding
    context_length: int = 8192  # what the model was trained for
    embedding_length: int = 64  # numbers in an embedding
    family: str = "llama"  # some families have one slot only, see ONE_SLOT_FAMILIES
    size: int = 98_362_432  # bytes
    parameter_size: str = "134.52M"
    quantization_level: str = "Q4_1"
    system: str = ""  # the model's own system prompt
    options: Mapping[str, Any] = field(default_factory=dict)  # PARAMETER lines of its Modelfile
    # How many drafted tokens are right, pass after pass in turn; empty: the model has nothing to draft with, and
    # draft_num_predict changes nothing.
    drafts: tuple[int, ...] = ()
    modified_at: str = "2026-11-21T09:34:30.841237365Z"

    @property
    def short_name(self) -> str:
        """`name:tag`, as /api/tags and /api/ps say it."""
        return self.name if ":" in self.name.rsplit("/", 1)[-1] else f"{self.name}:latest"

    @property
    def full_name(self) -> str:
        """The name with registry and namespace, as some errors say it."""
        name = self.short_name
        return f"registry.ollama.ai/{name}" if "/" in name else f"registry.ollama.ai/library/{name}"

    @property
    def file_digest(self) -> str:
        """The 64 hex digits that stand in /api/tags."""
        return self.digest or hashlib.sha256(self.short_name.encode()).hexdigest()

    def can(self, capability: str) -> bool:
        """Whether the model has a capability."""
        return capability in self.capabilities

    def slots(self, num_parallel: int) -> int:
        """How many slots a runner of this model gets (server/sched.go, load())."""
        if not self.can("completion") or self.family in ONE_SLOT_FAMILIES:
            return 1
        return max(num_parallel, 1)


# What a FakeOllama has installed unless it is told otherwise.
DEFAULT_MODELS: tuple[FakeModel, ...] = (
    FakeModel(name="fake:latest"),
    FakeModel(name="fake-think:latest", capabilities=("completion", "thinking")),
    FakeModel(name="fake-tools:latest", capabilities=("completion", "tools")),
    FakeModel(name="fake-embed:latest", capabilities=("embedding",), family="bert", context_length=2048),
)

# types/model/name.go, isValidPart(): host/namespace/model:tag.
_NAME = re.compile(
    r"(?:(?:(?P<host>[A-Za-z0-9_][\w.:-]{0,349})/)?(?P<space>[A-Za-z0-9_][\w-]{0,79})/)?"
    r"(?P<model>[A-Za-z0-9_][\w.-]{0,79})(?::(?P<tag>[A-Za-z0-9_][\w.-]{0,79}))?",
    re.ASCII,
)


def parse_name(name: str) -> str | None:
    """The canonical `name:tag` of a model's name, or None if it is no valid name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    space = found["space"]
    model = f"{found['model']}:{found['tag'] or 'latest'}"
    return model if space in (None, "library") else f"{space}/{model}"


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """The options that a runner is loaded with: a change of any of them reloads it.

    api/types.go, Runner; None stands for "not asked for".
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int = -1
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int = 0
    draft_num_predict: int = 0
    shift: bool = True

    def needs_reload(self, wanted: RunnerOptions, *, num_ctx: int, num_batch: int, trained: int) -> bool:
        """Whether a runner with these options must be reloaded for others (sched.go, needsReload()).

        Values asked for automatically on both sides count as equal, num_gpu = -1 asks for nothing, and
        a num_ctx beyond the trained context counts as that. `num_ctx` and `num_batch` are the defaults.
        """
        ours = (
            min(self.num_ctx if self.num_ctx is not None else num_ctx, trained),
            self.num_batch or num_batch,
            -1 if wanted.num_gpu < 0 else self.num_gpu,
            self.main_gpu,
            self.use_mmap,
            self.num_thread,
            self.draft_num_predict,
            self.shift,
        )
        theirs = (
            min(wanted.num_ctx if wanted.num_ctx is not None else num_ctx, trained),
            wanted.num_batch or num_batch,
            -1 if wanted.num_gpu < 0 else wanted.num_gpu,
            wanted.main_gpu,
            wanted.use_mmap,
            wanted.num_thread,
            wanted.draft_num_predict,
            wanted.shift,
        )
        return ours != theirs


@dataclass(frozen=True, slots=True)
class Options:
    """A request's options, as far as the stand-in heeds them."""

    runner: RunnerOptions
    num_predict: int = -1
    num_keep: int = 4
    seed: int = -1
    stop: tuple[str, ...] = ()


_PLAIN = Options(RunnerOptions())


def resolve_options(model: FakeModel, asked: Mapping[str, Any] | None, *, shift: bool | None) -> Options:
    """The model's own options overridden by the request's; ApiError(500) for a wrong type.

    routes.go, modelOptions(); api/types.go, Options.FromMap(). Unknown options are ignored, null counts
    as not given, numbers with a fraction are cut.
    """
    if not asked and not model.options and shift is None:
        return _PLAIN
    values: dict[str, Any] = {}
    for source in (model.options, asked or {}):
        for key, value in source.items():
            kind = OPTION_TYPES.get(key)
            if kind is None or value is None:
                continue
            values[key] = _checked(key, kind, value)
    vision = model.can("vision")
    num_ctx = values.get("num_ctx")
    if num_ctx is not None:
        num_ctx = max(num_ctx, 2048 if vision else 4)  # sched.go, getRunner()
    runner = RunnerOptions(
        num_ctx=num_ctx,
        num_batch=values.get("num_batch"),
        num_gpu=values.get("num_gpu", -1),
        main_gpu=values.get("main_gpu"),
        use_mmap=values.get("use_mmap"),
        num_thread=values.get("num_thread", 0),
        draft_num_predict=values.get("draft_num_predict", 0),
        shift=True if shift is None else shift,
    )
    return Options(
        runner,
        num_predict=values.get("num_predict", -1),
        num_keep=values.get("num_keep", 4),
        seed=values.get("seed", -1),
        stop=tuple(values.get("stop", ())),
    )


def _checked(key: str, kind: str, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "integer" and number:
        return int(value)
    if kind == "float32" and number:
        return float(value)
    if kind == "boolean" and isinstance(value, bool):
        return value
    if kind == "array" and isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(item, str) for item in value):
            return value
        raise ApiError(500, f'option "{key}" must be of an array of strings')
    raise ApiError(500, f'option "{key}" must be of type {kind}')
