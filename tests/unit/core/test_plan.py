"""Items → groups."""

from __future__ import annotations

from typing import Any

import pytest

from unisono.core.errors import ModelLacksCapabilityError, ModelNotFoundError, UnisonoError
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Item,
    LoadedRunner,
    Message,
    ModelInfo,
    Options,
    Role,
    RunnerOptions,
    RunnerSpec,
    Slots,
    SlotSource,
    Think,
    Tool,
)
from unisono.core.plan import Group, Plan, lacks_capability, plan, runner_for, warn_of_slots

CHAT = ChatRequest(messages=(Message(role=Role.USER, content="hi there"),))
EVERYTHING = frozenset({"completion", "tools", "thinking", "vision", "embedding", "insert"})


def model(name: str = "m", **more: Any) -> ModelInfo:
    """A model whose digest is its name, unless said otherwise."""
    return ModelInfo(**{"backend": "ollama", "name": name, "digest": f"sha256:{name}", **more})


def item(n: int = 0, request: ChatRequest | GenerateRequest | EmbedRequest = CHAT, **more: Any) -> Item:
    """An item for model m, unless said otherwise."""
    return Item(**{"item_id": str(n), "index": n, "request": request, "model": "m", **more})


def indexes(planned: Plan) -> list[list[int]]:
    """The items of each group."""
    return [[one.index for one in group.items] for group in planned.groups]


# -- Groups ------------------------------------------------------------------------------------------------------


def test_nothing_is_no_group() -> None:
    """No items, no plan."""
    assert plan([], {}, {}) == Plan()


def test_one_runner_is_one_group_in_the_callers_order() -> None:
    """Items of one model with the same runner options share a group, and keep their order."""
    items = [item(n, options=Options(temperature=n / 10, num_predict=n)) for n in range(5)]
    planned = plan(items, {"m": model()}, {})
    assert indexes(planned) == [[0, 1, 2, 3, 4]]
    assert planned.groups[0].runner == RunnerSpec(backend="ollama", model="m", digest="sha256:m")


def test_aliases_of_one_file_share_a_group() -> None:
    """Two names of one digest are one runner, which has the name that came first."""
    models = {"m": model(digest="d"), "alias": model("alias", digest="d"), "other": model("other")}
    items = [item(0, model="alias"), item(1, model="m"), item(2, model="other"), item(3, model="alias")]
    planned = plan(items, models, {})
    assert indexes(planned) == [[0, 1, 3], [2]]
    assert [group.runner.model for group in planned.groups] == ["alias", "other"]


def test_same_digest_on_two_backends_is_two_runners() -> None:
    """A file on another host is another runner."""
    models = {"m": model(digest="d"), "there": model("there", digest="d", backend="other")}
    assert indexes(plan([item(0), item(1, model="there")], models, {})) == [[0], [1]]


@pytest.mark.parametrize(
    "other",
    [
        {"options": Options(runner=RunnerOptions(num_ctx=2048))},
        {"options": Options(runner=RunnerOptions(use_mmap=False))},
        {"request": ChatRequest(messages=CHAT.messages, shift=False)},
        {"request": GenerateRequest(prompt="p", shift=True)},
    ],
)
def test_what_reloads_the_model_is_another_group(other: dict[str, Any]) -> None:
    """Runner options and context shift tell groups apart."""
    assert indexes(plan([item(0), item(1, **other), item(2)], {"m": model()}, {})) == [[0, 2], [1]]


def test_loaded_goes_first_then_larger() -> None:
    """A group that is in memory goes first, however small; then the larger; equals as they came."""
    models = {name: model(name) for name in "abcd"}
    items = [item(n, model=name) for n, name in enumerate("abbcd")]
    loaded = {"ollama": [LoadedRunner(model="d", digest="sha256:d", context_length=4096)]}
    planned = plan(items, models, loaded)
    assert [group.runner.model for group in planned.groups] == ["d", "b", "a", "c"]
    assert [group.is_loaded for group in planned.groups] == [True, False, False, False]
    assert planned.groups[0].reason == "its model is loaded already"
    assert "larger" in planned.groups[1].reason


@pytest.mark.parametrize(
    ("num_ctx", "backend", "is_loaded"),
    [(None, "ollama", True), (4096, "ollama", True), (2048, "ollama", False), (None, "x", False)],
)
def test_loaded_means_with_that_context(num_ctx: int | None, backend: str, *, is_loaded: bool) -> None:
    """A model in memory with another context, or on another backend, is not this runner."""
    there = {backend: [LoadedRunner(model="m", digest="sha256:m", context_length=4096)]}
    planned = plan([item(options=Options(runner=RunnerOptions(num_ctx=num_ctx)))], {"m": model()}, there)
    assert planned.groups[0].is_loaded is is_loaded


def test_told_slots_come_with_the_runner_that_is_loaded() -> None:
    """Where a backend tells the slots of what it holds, the plan says them; for another runner it says nothing."""
    there = {"ollama": [LoadedRunner(model="m", digest="sha256:m", context_length=4096, slots=6)]}
    for num_ctx, slots in ((4096, 6), (2048, None)):
        planned = plan([item(options=Options(runner=RunnerOptions(num_ctx=num_ctx)))], {"m": model()}, there)
        assert planned.groups[0].told_slots == slots


def test_embeddings_are_loaded_as_such() -> None:
    """A runner for embeddings is loaded by an embedding, since an empty chat would fail."""
    embedder = model(capabilities=frozenset({"embedding"}))
    assert runner_for(item(request=EmbedRequest(input=("a",))), embedder, "m").is_embedding
    assert runner_for(item(request=EmbedRequest(input=("a",))), model(), "m").is_embedding
    assert not runner_for(item(), model(), "m").is_embedding


# -- Refusals ----------------------------------------------------------------------------------------------------


def test_unknown_model_refuses_its_items_alone() -> None:
    """Items of a model that nobody has fail with the reason that was found; the rest is planned."""
    error = ModelNotFoundError("no model 'x'; get it with: ollama pull x")
    models: dict[str, ModelInfo | UnisonoError] = {"m": model(), "x": error}
    items = [item(0, model="x"), item(1), item(2, model="x")]
    planned = plan(items, models, {})
    assert [(one.index, why) for one, why in planned.refused] == [(0, error), (2, error)]
    assert indexes(planned) == [[1]]


IMAGE = (b"\x89PNG",)


@pytest.mark.parametrize(
    ("request_", "needs"),
    [
        (CHAT, "completion"),
        (GenerateRequest(prompt="p"), "completion"),
        (ChatRequest(messages=CHAT.messages, tools=(Tool(name="f"),)), "tools"),
        (GenerateRequest(prompt="p", suffix="s"), "insert"),
        (ChatRequest(messages=(*CHAT.messages, Message(role=Role.USER, images=IMAGE))), "vision"),
        (GenerateRequest(prompt="p", images=IMAGE), "vision"),
        (ChatRequest(messages=CHAT.messages, think=Think.HIGH), "thinking"),
        (GenerateRequest(prompt="p", think=Think.ON), "thinking"),
        (EmbedRequest(input=("a",)), "embedding"),
    ],
)
def test_model_that_cannot_refuses(request_: ChatRequest | GenerateRequest | EmbedRequest, needs: str) -> None:
    """Each thing that an item can ask for needs its capability; unknown capabilities refuse nothing."""
    asked = item(request=request_)
    assert lacks_capability(asked, model(capabilities=None)) is None
    assert lacks_capability(asked, model(capabilities=EVERYTHING)) is None
    error = lacks_capability(asked, model(capabilities=EVERYTHING - {needs}))
    assert isinstance(error, ModelLacksCapabilityError)
    assert error.metadata == {"model": "m", "backend": "ollama", "capability": needs}
    assert all(known in error.message for known in EVERYTHING - {needs})
    planned = plan([asked], {"m": model(capabilities=EVERYTHING - {needs})}, {})
    assert [type(why) for _, why in planned.refused] == [ModelLacksCapabilityError]
    assert planned.groups == ()


def test_model_that_can_nothing_says_so() -> None:
    """An empty list of capabilities is told as none."""
    error = lacks_capability(item(), model(capabilities=frozenset()))
    assert error is not None
    assert error.message.endswith("It has the capabilities: none")


def test_thinking_turned_off_needs_nothing() -> None:
    """Asking not to think is no need of a model that thinks."""
    quiet = item(request=ChatRequest(messages=CHAT.messages, think=Think.OFF))
    assert lacks_capability(quiet, model(capabilities=frozenset({"completion"}))) is None


# -- Estimates ---------------------------------------------------------------------------------------------------


def group_of(*items: Item, **more: Any) -> Group:
    """The one group of these items."""
    (group,) = plan(items, {"m": model(**more)}, {}).groups
    return group


def test_prompt_tokens_are_four_bytes_each_rounded_up() -> None:
    """An estimate counts every item by itself."""
    prompts = [GenerateRequest(prompt="x" * size) for size in (1, 4, 5)]
    assert group_of(*[item(n, prompt) for n, prompt in enumerate(prompts)]).estimated_prompt_tokens == 1 + 1 + 2


@pytest.mark.parametrize(
    ("bounds", "most"), [([10, 20], 30), ([0], 0), ([10, None], None), ([10, -1], None), ([-2], None)]
)
def test_most_tokens_of_all_answers(bounds: list[int | None], most: int | None) -> None:
    """The sum of all num_predict, and no number where one answer has no bound."""
    items = [item(n, options=Options(num_predict=bound)) for n, bound in enumerate(bounds)]
    assert group_of(*items).max_completion_tokens == most


def test_embeddings_have_no_answer_to_bound() -> None:
    """Texts to embed add nothing to the tokens of answers."""
    assert group_of(item(request=EmbedRequest(input=("a",)))).max_completion_tokens == 0


# -- Warnings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "num_predict", "num_ctx", "trained", "is_warned"),
    [
        (400, 28, 128, 0, False),
        (400, 29, 128, 0, True),
        (401, 28, 128, 0, True),
        (513, None, 128, 0, True),
        (512, -1, 128, 0, False),
        (512, -2, None, 128, False),
        (512, 1, None, 128, True),
        (4_000_000, 1, None, 0, False),
    ],
)
def test_context_that_may_be_too_small(
    size: int, num_predict: int | None, num_ctx: int | None, trained: int, *, is_warned: bool
) -> None:
    """Prompt and answer past the context that is asked for, or past the longest that there is, are warned of."""
    asked = item(
        request=GenerateRequest(prompt="x" * size),
        options=Options(num_predict=num_predict, runner=RunnerOptions(num_ctx=num_ctx)),
    )
    warnings = plan([asked, item(1)], {"m": model(context_length=trained)}, {}).warnings
    assert [(one.item_id, one.reason, one.field) for one in warnings] == (
        [("0", "CONTEXT_MAY_BE_TOO_SMALL", "options.runner.num_ctx")] if is_warned else []
    )
    assert all("128" in one.message for one in warnings)


@pytest.mark.parametrize(("texts", "is_warned"), [(("x" * 400,) * 50, False), (("x", "x" * 600), True), ((), False)])
def test_each_text_of_an_embedding_has_the_context_for_itself(texts: tuple[str, ...], *, is_warned: bool) -> None:
    """Many short texts are not warned of; one that is too long is."""
    planned = plan([item(request=EmbedRequest(input=texts))], {"m": model(context_length=128)}, {})
    assert bool(planned.warnings) is is_warned


@pytest.mark.parametrize(("count", "items", "is_warned"), [(0, 5, False), (1, 1, False), (1, 2, True), (2, 5, False)])
def test_one_slot_is_warned_of(count: int, items: int, *, is_warned: bool) -> None:
    """Where items will run one after the other, that is said, with the remedy."""
    group = group_of(*[item(n) for n in range(items)])
    warned = warn_of_slots(group, Slots(count=count, source=SlotSource.LEARNED))
    assert (warned is not None) is is_warned
    if warned is not None:
        assert warned.reason == "ONE_SLOT"
        assert "OLLAMA_NUM_PARALLEL=8" in warned.message
        assert "(learned)" in warned.message


def test_one_slot_of_an_embedding_model_has_its_own_reason() -> None:
    """An embedding model always has one slot: the default is not to blame."""
    texts = [item(n, EmbedRequest(input=("a",))) for n in range(2)]
    warned = warn_of_slots(group_of(*texts), Slots(count=1, source=SlotSource.TOLD))
    assert warned is not None
    assert "it is an embedding model" in warned.message
