"""Items → groups."""

from __future__ import annotations

from typing import Any

import pytest

from unisono.core.batch import ContextPolicy
from unisono.core.errors import ContextConflictError, ModelLacksCapabilityError, ModelNotFoundError, UnisonoError
from unisono.core.harmonise import Standing
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
        {"options": Options(runner=RunnerOptions(use_mmap=False))},
        {"options": Options(runner=RunnerOptions(num_batch=16, num_ctx=2048))},
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


def test_a_plan_says_that_embeddings_go_together() -> None:
    """Where there are several."""
    texts = [item(n, request=EmbedRequest(input=("a",))) for n in range(2)]
    for several in (True, False):
        (group,) = plan(texts if several else texts[:1], {"m": model()}, {}).groups
        assert group.reason.endswith("texts of many items go in one request") is several


@pytest.mark.parametrize(
    ("num_ctx", "backend", "is_loaded"),
    [
        (None, "ollama", True),
        (4096, "ollama", True),
        (2048, "ollama", True),
        (8192, "ollama", False),
        (None, "x", False),
    ],
)
def test_loaded_means_with_that_context(num_ctx: int | None, backend: str, *, is_loaded: bool) -> None:
    """A model in memory with too small a context, or on another backend, is not this runner."""
    there = {backend: [LoadedRunner(model="m", digest="sha256:m", context_length=4096)]}
    planned = plan([item(options=Options(runner=RunnerOptions(num_ctx=num_ctx)))], {"m": model()}, there)
    assert planned.groups[0].is_loaded is is_loaded


def test_told_slots_come_with_the_runner_that_is_loaded() -> None:
    """Where a backend tells the slots of what it holds, the plan says them; for another runner it says nothing."""
    there = {"ollama": [LoadedRunner(model="m", digest="sha256:m", context_length=4096, slots=6)]}
    for num_ctx, slots in ((4096, 6), (8192, None)):
        planned = plan([item(options=Options(runner=RunnerOptions(num_ctx=num_ctx)))], {"m": model()}, there)
        assert planned.groups[0].told_slots == slots


def test_embeddings_are_loaded_as_such() -> None:
    """A runner for embeddings is loaded by an embedding, since an empty chat would fail."""
    embedder = model(capabilities=frozenset({"embedding"}))
    assert runner_for(item(request=EmbedRequest(input=("a",))), embedder, "m").is_embedding
    assert runner_for(item(request=EmbedRequest(input=("a",))), model(), "m").is_embedding
    assert not runner_for(item(), model(), "m").is_embedding


def test_what_it_takes_comes_with_the_runner_that_is_loaded() -> None:
    """What a backend says of the memory of what it holds is the plan's to tell."""
    there = {"ollama": [LoadedRunner(model="m", digest="sha256:m", context_length=4096, size_bytes=123)]}
    assert plan([item()], {"m": model()}, there).groups[0].measured_bytes == 123
    assert plan([item()], {"m": model()}, {}).groups[0].measured_bytes == 0


def test_groups_of_a_model_are_neighbours() -> None:
    """Models go by how many items they have in all; what is loaded is the first of its model, which is the first."""
    batched = Options(runner=RunnerOptions(num_batch=16))
    models = {name: model(name) for name in "abc"}
    items = [
        item(0, model="a"),
        *(item(n, model="b") for n in (1, 2)),
        item(3, model="a", options=batched),
        item(4, model="a", options=batched),
        *(item(n, model="c", options=batched) for n in (5, 6)),
        item(7, model="c"),
    ]
    assert indexes(plan(items, models, {})) == [[3, 4], [0], [5, 6], [7], [1, 2]]
    loaded = {"ollama": [LoadedRunner(model="c", digest="sha256:c", context_length=4096)]}
    assert indexes(plan(items, models, loaded))[:2] == [[5, 6], [7]]


def test_chats_and_embeddings_of_one_model_share_its_context() -> None:
    """They are groups of their own, but loading one for the other would cost a load."""
    items = [item(0, options=context(2048)), item(1, EmbedRequest(input=("a",)), options=context(512))]
    planned = plan(items, {"m": model()}, {})
    assert [group.runner.is_embedding for group in planned.groups] == [False, True]
    assert [group.runner.options.num_ctx for group in planned.groups] == [2048, 2048]


def test_each_group_knows_what_its_prompts_have_in_common() -> None:
    """Families are found within a group: what another runner computed is of no use."""
    long = GenerateRequest(prompt="p" * 600)
    batched = Options(runner=RunnerOptions(num_batch=16))
    planned = plan([item(0, long), item(1, long), item(2), item(3, long, options=batched)], {"m": model()}, {})
    first, second = planned.groups
    assert [one and one.size for one in first.prefixes] == [600, 600, None]
    assert second.prefixes == (None,)


# -- Contexts ----------------------------------------------------------------------------------------------------


def context(num_ctx: int | None, **more: Any) -> Options:
    """Options that ask for a context."""
    return Options(runner=RunnerOptions(num_ctx=num_ctx), **more)


def contexts(planned: Plan) -> list[tuple[int | None, int]]:
    """What each group's runner is asked for, and how many items it has."""
    return [(group.runner.options.num_ctx, len(group.items)) for group in planned.groups]


MIXED = [item(0, options=context(2048)), item(1, options=context(4096)), item(2), item(3, options=context(2048))]


def test_one_context_for_all() -> None:
    """By default items that differ in their context alone share a runner, which has the largest."""
    planned = plan(MIXED, {"m": model()}, {})
    assert contexts(planned) == [(4096, 4)]
    assert planned.groups[0].context_tokens == 4096
    assert planned.groups[0].context_reason == "4,096 tokens: the most that an item asks for"
    assert planned.warnings == ()


def test_each_context_for_itself() -> None:
    """SEPARATE leaves every item what it asks for."""
    planned = plan(MIXED, {"m": model()}, {}, policy=ContextPolicy.SEPARATE)
    assert contexts(planned) == [(2048, 2), (4096, 1), (None, 1)]
    assert [group.context_tokens for group in planned.groups] == [2048, 4096, 0]
    assert planned.groups[0].context_reason == "2,048 tokens: asked for"
    assert "default" in planned.groups[2].context_reason
    there = {"ollama": [LoadedRunner(model="m", digest="sha256:m", context_length=4096)]}
    planned = plan(MIXED, {"m": model()}, there, policy=ContextPolicy.SEPARATE)
    assert contexts(planned) == [(4096, 1), (None, 1), (2048, 2)]
    assert [group.is_loaded for group in planned.groups] == [True, True, False]


def test_differing_contexts_refused() -> None:
    """REJECT refuses all items of the model, whatever else tells its runners apart, and nobody else's."""
    batched = Options(runner=RunnerOptions(num_batch=16))
    items = [*MIXED, item(4, options=batched), item(5, model="other", options=context(512)), item(6, model="other")]
    planned = plan(items, {"m": model(), "other": model("other")}, {}, policy=ContextPolicy.REJECT)
    assert contexts(planned) == [(512, 2)]
    assert [one.index for one, _ in planned.refused] == [0, 1, 2, 3, 4]
    error = planned.refused[0][1]
    assert isinstance(error, ContextConflictError)
    assert "2,048, 4,096" in error.message
    assert error.metadata == {"model": "m", "backend": "ollama"}


def test_one_context_is_no_conflict() -> None:
    """Items that ask for nothing contradict nobody."""
    planned = plan([MIXED[0], MIXED[2]], {"m": model()}, {}, policy=ContextPolicy.REJECT)
    assert contexts(planned) == [(2048, 2)]


def test_who_gets_less_is_warned() -> None:
    """The model was trained for less than an item asks for."""
    planned = plan([item(0, options=context(9000)), *MIXED[1:]], {"m": model(context_length=8192)}, {})
    assert contexts(planned) == [(8192, 4)]
    (warned,) = planned.warnings
    assert (warned.item_id, warned.reason, warned.field) == ("0", "CONTEXT_CLAMPED", "options.runner.num_ctx")
    assert warned.message == (
        "asks for a context of 9,000 tokens, and gets 8,192 tokens: the model was trained for no more"
    )


@pytest.mark.parametrize(
    ("slots", "told", "num_ctx"), [({}, None, 3840), ({None: 2}, None, 2048 - 128), ({4096: 2}, None, 2048 - 128)]
)
def test_no_more_than_memory_allows(slots: dict[int | None, int], told: int | None, num_ctx: int) -> None:
    """With a limit of so many bytes; slots are known by the runner itself, or by one of another context."""
    found = plan(
        [item(0, options=context(8192))],
        {"m": model(size_bytes=1000, kv_bytes_per_token=10)},
        {},
        memory_limit_bytes=1000 + 40_000,
        standing={"ollama": [Standing(runner=runner_for(item(options=context(4096)), model(), "m"))]},
        slots_of=lambda runner: slots.get(runner.options.num_ctx, 0),
    )
    assert contexts(found) == [(num_ctx // 256 * 256, 1)]
    assert [one.reason for one in found.warnings] == ["CONTEXT_CLAMPED"]


def test_slots_that_a_backend_tells_count_for_memory() -> None:
    """A runner that is loaded with four slots would be loaded with four again."""
    found = plan(
        [item(0, options=context(8192))],
        {"m": model(size_bytes=1000, kv_bytes_per_token=10)},
        {"ollama": [LoadedRunner(model="m", digest="sha256:m", context_length=512, slots=4)]},
        memory_limit_bytes=1000 + 40_960,
    )
    assert contexts(found) == [(1024, 1)]


def test_what_is_at_work_is_joined() -> None:
    """Another batch's runner that is large enough, by its own name; those of other models are not."""
    busy = [
        Standing(runner=runner_for(item(options=context(8192)), model("x"), "x"), is_busy=True),
        Standing(runner=runner_for(item(options=context(4096)), model(), "m"), is_busy=True),
    ]
    assert contexts(plan([MIXED[0]], {"m": model()}, {}, standing={"ollama": busy})) == [(4096, 1)]
    assert contexts(plan([MIXED[0]], {"m": model()}, {}, standing={"elsewhere": busy})) == [(2048, 1)]


def test_fixed_contexts_are_not_asked_for() -> None:
    """Whoever asks for no more than there is shares the one runner; who asks for more is apart, and fails alone."""
    fixed = {"m": model(fixed_context=2048)}
    there = {"ollama": [LoadedRunner(model="m", digest="sha256:m", context_length=2048, slots=8)]}
    planned = plan(MIXED, fixed, there)
    assert contexts(planned) == [(None, 3), (4096, 1)]
    assert [group.is_loaded for group in planned.groups] == [True, False]
    assert planned.groups[0].context_reason == "2,048 tokens: the backend was started with them"
    assert contexts(plan([MIXED[1]], fixed, there)) == [(4096, 1)]


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
    length = f"up to {num_predict:,} of answer" if num_predict else "an answer without a bound (options.num_predict)"
    assert all(length in one.message for one in warnings)
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
    assert "Ollama gives embedding models one slot" in warned.message
