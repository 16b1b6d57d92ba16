"""Items → groups: which runner answers which items, in which order, and what should be said about it beforehand.

Theory of operation. Only requests to the same runner share forward passes, and a runner is a model's files (their
digest: two names can be one model) loaded with certain options. So items are grouped by just that. A group whose
runner is in the backend's memory goes first, so that nothing is loaded twice; then the larger group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.errors import ModelLacksCapabilityError, UnisonoError
from unisono.core.limits import text_bytes
from unisono.core.model import ChatRequest, EmbedRequest, GenerateRequest, RunnerSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from unisono.core.model import Item, LoadedRunner, ModelInfo, Slots

# Bytes of text a token, for estimates: English prose has about four.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Items that one runner answers."""

    runner: RunnerSpec
    model: ModelInfo
    items: tuple[Item, ...]
    is_loaded: bool
    # Why it goes when it does, for people.
    reason: str
    # The runner's slots, where it is loaded and the backend tells them.
    told_slots: int | None = None

    @property
    def estimated_prompt_tokens(self) -> int:
        """Tokens of all prompts, at four bytes of text each."""
        return sum(-(-text_bytes(item) // BYTES_PER_TOKEN) for item in self.items)

    @property
    def max_completion_tokens(self) -> int | None:
        """The most tokens that all answers can have; None where one of them has no limit."""
        total = 0
        for item in self.items:
            if isinstance(item.request, EmbedRequest):
                continue
            bound = item.options.num_predict
            if bound is None or bound < 0:
                return None
            total += bound
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something that will work, but perhaps not as meant."""

    item_id: str
    field: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the items go, and which cannot go anywhere."""

    groups: tuple[Group, ...] = ()
    # Items that fail at once, and why.
    refused: tuple[tuple[Item, UnisonoError], ...] = ()
    warnings: tuple[Warned, ...] = field(default=())


def plan(
    items: Iterable[Item],
    models: Mapping[str, ModelInfo | UnisonoError],
    loaded: Mapping[str, Sequence[LoadedRunner]],
) -> Plan:
    """Groups the items.

    `models` holds, for each name that an item uses, the model or why there is none. `loaded` holds what each backend,
    by its name, has in memory.
    """
    members: dict[RunnerSpec, list[Item]] = {}
    model_of: dict[RunnerSpec, ModelInfo] = {}
    first_name: dict[tuple[str, str], str] = {}
    refused: list[tuple[Item, UnisonoError]] = []
    for item in items:
        model = models[item.model]
        error = model if isinstance(model, UnisonoError) else lacks_capability(item, model)
        if error is not None or isinstance(model, UnisonoError):
            refused.append((item, error or model))  # type: ignore[arg-type]  # the first is set unless the second is
            continue
        name = first_name.setdefault((model.backend, model.digest), model.name)
        runner = runner_for(item, model, name)
        members.setdefault(runner, []).append(item)
        model_of.setdefault(runner, model)
    groups = [
        _group(runner, model_of[runner], tuple(theirs), loaded.get(runner.backend, ()))
        for runner, theirs in members.items()
    ]
    groups.sort(key=lambda group: (not group.is_loaded, -len(group.items)))
    warnings = [warning for group in groups for warning in _warnings(group)]
    return Plan(groups=tuple(groups), refused=tuple(refused), warnings=tuple(warnings))


def runner_for(item: Item, model: ModelInfo, name: str) -> RunnerSpec:
    """The runner that answers an item: the model's files, and how they must be loaded."""
    shift = item.request.shift if isinstance(item.request, (ChatRequest, GenerateRequest)) else None
    return RunnerSpec(
        backend=model.backend,
        model=name,
        digest=model.digest,
        options=item.options.runner,
        shift=shift,
        is_embedding=model.is_embedding or isinstance(item.request, EmbedRequest),
    )


def lacks_capability(item: Item, model: ModelInfo) -> ModelLacksCapabilityError | None:
    """Why the model cannot do what the item asks; None where it can, or where its capabilities are not known."""
    if model.capabilities is None:
        return None
    for capability, what in _needs(item):
        if capability not in model.capabilities:
            known = ", ".join(sorted(model.capabilities)) or "none"
            return ModelLacksCapabilityError(
                f"model {model.name!r} does not support {what}. It has the capabilities: {known}",
                metadata={"model": model.name, "backend": model.backend, "capability": capability},
            )
    return None


def _needs(item: Item) -> list[tuple[str, str]]:
    request = item.request
    if isinstance(request, EmbedRequest):
        return [("embedding", "embeddings")]
    needs = [("completion", "chat" if isinstance(request, ChatRequest) else "generating text")]
    if isinstance(request, ChatRequest) and request.tools:
        needs.append(("tools", "tools"))
    if isinstance(request, GenerateRequest) and request.suffix:
        needs.append(("insert", "a suffix (filling in the middle)"))
    has_images = (
        any(message.images for message in request.messages) if isinstance(request, ChatRequest) else request.images
    )
    if has_images:
        needs.append(("vision", "pictures"))
    if request.think is not None and request.think.value != "off":
        needs.append(("thinking", "thinking"))
    return needs


def _group(runner: RunnerSpec, model: ModelInfo, items: tuple[Item, ...], loaded: Sequence[LoadedRunner]) -> Group:
    there = next((one for one in loaded if _is(runner, one)), None)
    is_loaded = there is not None
    reason = "its model is loaded already" if is_loaded else "loaded groups go first, then larger ones"
    return Group(
        runner=runner,
        model=model,
        items=items,
        is_loaded=is_loaded,
        reason=reason,
        told_slots=there.slots if there is not None else None,
    )


def _is(runner: RunnerSpec, there: LoadedRunner) -> bool:
    """Whether what is in memory is this runner, as far as a backend tells: its files and its context."""
    asked = runner.options.num_ctx
    return runner.digest == there.digest and (asked is None or asked == there.context_length)


def _warnings(group: Group) -> list[Warned]:
    context = group.runner.options.num_ctx or group.model.context_length
    found: list[Warned] = []
    for item in group.items:
        tokens = -(-_longest_prompt_bytes(item) // BYTES_PER_TOKEN)
        answer = max(0, item.options.num_predict or 0)
        if context and tokens + answer > context:
            found.append(
                Warned(
                    item_id=item.item_id,
                    field="options.runner.num_ctx",
                    reason="CONTEXT_MAY_BE_TOO_SMALL",
                    message=f"about {tokens:,} tokens of prompt and up to {answer:,} of answer, in a context of "
                    f"{context:,}. Raise options.runner.num_ctx, or shorten the prompt",
                )
            )
    return found


def _longest_prompt_bytes(item: Item) -> int:
    """Bytes of what must fit into the context at one time: each text of an embedding by itself."""
    if isinstance(item.request, EmbedRequest):
        return max((len(text.encode(errors="surrogatepass")) for text in item.request.input), default=0)
    return text_bytes(item)


def warn_of_slots(group: Group, slots: Slots) -> Warned | None:
    """A warning where the group's items will run one after the other."""
    if slots.count != 1 or len(group.items) == 1:
        return None
    why = "it is an embedding model" if group.runner.is_embedding else "OLLAMA_NUM_PARALLEL is 1, its default"
    return Warned(
        item_id="",
        field="",
        reason="ONE_SLOT",
        message=f"{group.runner.model} runs with one slot ({slots.source.value}): no forward pass is shared. Likely "
        f"{why}; start Ollama with OLLAMA_NUM_PARALLEL=8 to share passes",
    )
