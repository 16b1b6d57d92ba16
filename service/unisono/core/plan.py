"""Items → groups: which runner answers which items, in which order, and what should be said about it beforehand.

Theory of operation. Only requests to the same runner share forward passes, and a runner is a model's files (their
digest: two names can be one model) loaded with certain options. So items are grouped by just that; those that differ
in nothing but the context that they ask for can share one (core/harmonise.py). A model that is in the backend's
memory goes first, so that nothing is loaded twice; then the one with more items. A model's groups are neighbours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from unisono.core import harmonise
from unisono.core.advice import why_one_slot
from unisono.core.batch import ContextPolicy
from unisono.core.errors import ContextConflictError, ModelLacksCapabilityError, UnisonoError
from unisono.core.harmonise import BYTES_PER_TOKEN, asked_of, longest_prompt_bytes
from unisono.core.limits import text_bytes
from unisono.core.memory import estimate, fits_context
from unisono.core.model import ChatRequest, EmbedRequest, GenerateRequest, RunnerSpec
from unisono.core.prefixes import families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from unisono.core.harmonise import Context, Standing
    from unisono.core.memory import MemoryEstimate
    from unisono.core.model import Item, LoadedRunner, ModelInfo, Slots
    from unisono.core.prefixes import Prefix

# What a group's reason adds where core/bundles.py puts its items together.
_BUNDLED = "; texts of many items go in one request"


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
    # What it takes in memory, where it is loaded and the backend tells that; 0: not known.
    measured_bytes: int = 0
    # Tokens of context of each slot, and why so many, for people; 0: not known.
    context_tokens: int = 0
    context_reason: str = ""
    # For each item, what its prompt has in common with others of the group; None: nothing worth it.
    prefixes: tuple[Prefix | None, ...] = ()

    def memory_with(self, slots: int) -> MemoryEstimate | None:
        """What its runner takes in memory with so many slots, 0 for as many as nobody knows; None: not derivable."""
        return estimate(self.model, self.runner, slots, self.context_tokens)

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


@dataclass(frozen=True, slots=True)
class _Kin:
    """Items that one runner could answer, if it had a context for all of them."""

    runner: RunnerSpec
    model: ModelInfo
    items: list[Item]


def plan(
    items: Iterable[Item],
    models: Mapping[str, ModelInfo | UnisonoError],
    loaded: Mapping[str, Sequence[LoadedRunner]],
    *,
    policy: ContextPolicy = ContextPolicy.HARMONISE,
    memory_limit_bytes: int | None = None,
    standing: Mapping[str, Sequence[Standing]] | None = None,
    slots_of: Callable[[RunnerSpec], int] = lambda _: 0,
) -> Plan:
    """Groups the items.

    `models` holds, for each name that an item uses, the model or why there is none. `loaded` holds what each backend,
    by its name, has in memory; `standing`, which of its runners had work lately. `memory_limit_bytes` is what a
    runner may take, where that is known, and `slots_of` tells how many slots one has; 0: not known.
    """
    kins: dict[RunnerSpec, _Kin] = {}
    first_name: dict[tuple[str, str], str] = {}
    refused: list[tuple[Item, UnisonoError]] = []
    for item in items:
        model = models[item.model]
        if isinstance(model, UnisonoError):
            refused.append((item, model))
            continue
        if (error := lacks_capability(item, model)) is not None:
            refused.append((item, error))
            continue
        name = first_name.setdefault((model.backend, model.digest), model.name)
        runner = harmonise.kin_of(runner_for(item, model, name))
        kins.setdefault(runner, _Kin(runner, model, [])).items.append(item)
    if policy is ContextPolicy.REJECT:
        refused += _refuse_conflicts(kins)
    groups: list[Group] = []
    for kin in kins.values():
        there = next((one for one in loaded.get(kin.runner.backend, ()) if one.digest == kin.runner.digest), None)
        kept = (standing or {}).get(kin.runner.backend, ())
        fits = None if memory_limit_bytes is None else _fits(kin, there, kept, memory_limit_bytes, slots_of)
        if policy is ContextPolicy.SEPARATE:
            shares = _separated(kin.items, there)
        elif policy is ContextPolicy.AS_SENT and not kin.model.fixed_context:
            groups += _as_sent(kin, there, kept)
            continue
        else:
            shares = _harmonised(kin, there, kept, fits)
        for context, theirs in shares:
            is_other = there is not None and context.num_ctx not in {None, there.context_length}
            groups += _groups(kin, theirs, context, None if is_other else there)
    _sort(groups)
    warnings = [warning for group in groups for warning in _warnings(group)]
    return Plan(groups=tuple(groups), refused=tuple(refused), warnings=tuple(warnings))


def _refuse_conflicts(kins: dict[RunnerSpec, _Kin]) -> list[tuple[Item, UnisonoError]]:
    """Takes out the models of which items ask for different contexts: all their items, and why."""
    asked: dict[tuple[str, str], set[int]] = {}
    for kin in kins.values():
        sizes = {num_ctx for item in kin.items if (num_ctx := asked_of(item)) is not None}
        asked.setdefault((kin.runner.backend, kin.runner.digest), set()).update(sizes)
    refused: list[tuple[Item, UnisonoError]] = []
    for runner in list(kins):
        sizes = asked[runner.backend, runner.digest]
        if len(sizes) > 1:
            error = ContextConflictError(
                f"items of model {runner.model!r} ask for different num_ctx: "
                f"{', '.join(f'{size:,}' for size in sorted(sizes))}. Ask for one value, or let the batch's "
                "context_policy harmonise or separate them",
                metadata={"model": runner.model, "backend": runner.backend},
            )
            refused += [(item, error) for item in kins.pop(runner).items]
    return refused


def _fits(
    kin: _Kin,
    there: LoadedRunner | None,
    standing: Iterable[Standing],
    limit_bytes: int,
    slots_of: Callable[[RunnerSpec], int],
) -> int | None:
    """The largest context that memory allows. Slots that nobody knows count as one, which is Ollama's default."""
    kept = [one.runner for one in standing if harmonise.kin_of(one.runner) == kin.runner]
    slots = max([slots_of(runner) for runner in (kin.runner, *kept)])
    return fits_context(kin.model, there.slots or slots if there is not None else slots, limit_bytes)


def _separated(items: Iterable[Item], there: LoadedRunner | None) -> list[tuple[Context, list[Item]]]:
    """Items by the context that they ask for."""
    by_asked: dict[int | None, list[Item]] = {}
    for item in items:
        by_asked.setdefault(asked_of(item), []).append(item)
    return [(harmonise.own(asked, there), theirs) for asked, theirs in by_asked.items()]


def _harmonised(
    kin: _Kin, there: LoadedRunner | None, standing: Iterable[Standing], fits: int | None
) -> list[tuple[Context, list[Item]]]:
    """One context for all; where contexts are fixed, those who ask for more stay apart, and fail alone."""
    fixed = kin.model.fixed_context
    if fixed:
        context = harmonise.fixed(fixed)
        within = [item for item in kin.items if (asked_of(item) or 0) <= fixed]
        beyond = [item for item in kin.items if (asked_of(item) or 0) > fixed]
        return [*([(context, within)] if within else []), *_separated(beyond, there)]
    theirs = [one for one in standing if harmonise.kin_of(one.runner) == kin.runner]
    return [(harmonise.shared(kin.items, kin.model, there=there, standing=theirs, fits=fits), kin.items)]


def _as_sent(kin: _Kin, there: LoadedRunner | None, standing: Iterable[Standing]) -> list[Group]:
    """Groups of requests that go as they came: loaded is what the backend would not load anew for them."""
    theirs = [one for one in standing if harmonise.kin_of(one.runner) == kin.runner]
    by_asked: dict[int | None, list[Item]] = {}
    for item in kin.items:
        by_asked.setdefault(asked_of(item), []).append(item)
    groups: list[Group] = []
    for asked, items in by_asked.items():
        context = harmonise.as_sent(asked, theirs)
        is_there = there is not None and there.context_length == context.tokens
        groups += _groups(kin, items, context, there if is_there else None)
    return groups


def _groups(kin: _Kin, items: Iterable[Item], context: Context, there: LoadedRunner | None) -> list[Group]:
    """The items as groups: embeddings apart, since they are loaded and answered in another way.

    `there`: the model in memory as they need it.
    """
    by_kind: dict[bool, list[Item]] = {}
    for item in items:
        is_embedding = kin.model.is_embedding or isinstance(item.request, EmbedRequest)
        by_kind.setdefault(is_embedding, []).append(item)
    runner = harmonise.with_context(kin.runner, context.num_ctx)
    reason = "its model is loaded already" if there is not None else "loaded models go first, then larger groups"
    return [
        Group(
            runner=replace(runner, is_embedding=is_embedding),
            model=kin.model,
            items=tuple(theirs),
            is_loaded=there is not None,
            reason=reason + (_BUNDLED if is_embedding and len(theirs) > 1 else ""),
            told_slots=there.slots if there is not None else None,
            measured_bytes=there.size_bytes if there is not None else 0,
            context_tokens=context.tokens,
            context_reason=context.reason,
            prefixes=tuple(families(theirs)),
        )
        for is_embedding, theirs in by_kind.items()
    ]


def _sort(groups: list[Group]) -> None:
    """Models in memory first, then those with more items; of one model likewise."""
    items: Counter[tuple[str, str]] = Counter()
    is_there: dict[tuple[str, str], bool] = {}
    place: dict[tuple[str, str], int] = {}
    for group in groups:
        name = (group.runner.backend, group.runner.digest)
        items[name] += len(group.items)
        is_there[name] = is_there.get(name, False) or group.is_loaded
        _ = place.setdefault(name, len(place))

    def rank(group: Group) -> tuple[bool, int, int, bool, int]:
        name = (group.runner.backend, group.runner.digest)
        return not is_there[name], -items[name], place[name], not group.is_loaded, -len(group.items)

    groups.sort(key=rank)


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


def _warnings(group: Group) -> list[Warned]:
    context = group.context_tokens or group.model.context_length
    found: list[Warned] = []
    for item in group.items:
        asked = asked_of(item) or 0
        if group.context_tokens and asked > group.context_tokens:
            found.append(
                Warned(
                    item_id=item.item_id,
                    field="options.runner.num_ctx",
                    reason="CONTEXT_CLAMPED",
                    message=f"asks for a context of {asked:,} tokens, and gets {group.context_reason}",
                )
            )
        tokens = -(-longest_prompt_bytes(item) // BYTES_PER_TOKEN)
        answer = max(0, item.options.num_predict or 0)
        if context and tokens + answer > context:
            length = f"up to {answer:,} of answer" if answer else "an answer without a bound (options.num_predict)"
            found.append(
                Warned(
                    item_id=item.item_id,
                    field="options.runner.num_ctx",
                    reason="CONTEXT_MAY_BE_TOO_SMALL",
                    message=f"about {tokens:,} tokens of prompt and {length}, in a context of {context:,}. "
                    "Raise options.runner.num_ctx, or shorten the prompt",
                )
            )
    return found


def warn_of_slots(group: Group, slots: Slots, *, kind: str = "ollama") -> Warned | None:
    """A warning where the group's items will run one after the other. `kind`: of the backend."""
    one = why_one_slot(group.runner, group.model, slots, kind=kind)
    if one is None or len(group.items) == 1:
        return None
    return Warned(
        item_id="",
        field="",
        reason="ONE_SLOT",
        message=f"{group.runner.model} runs with one slot ({slots.source.value}): no forward pass is shared. Likely "
        f"the reason: {one.reason}. To do: {one.remedy}",
    )
