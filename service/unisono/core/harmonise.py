"""One context for the items of a model: how many tokens, and why.

Theory of operation. The context is part of how a model is loaded: two items that differ in nothing but `num_ctx`
would load it twice (16 items with two values: 15.0 s; with one for all: 4.4 s). A larger context does an item no
harm, so items of one *kin*, which is a runner but for its context, share one. In this order:

1. What is at work already, if it is large enough: nothing is loaded, and batches share their passes.
2. What the backend has in memory, if it is large enough.
3. The largest that an item asks for; no larger than the model was trained for, nor than memory allows.

Large enough is what serves the item that asks for most. An item that asks for nothing takes any context that holds
its prompt; where there is none to take, the backend's default, which the service does not know. Where others ask
for less than its prompt may need, it gets that, but no more than the usual default.

An item that asks for more than its group gets is warned. A backend whose contexts are fixed (a llama.cpp server) has
nothing to choose: items that ask for more than it has are a group of their own, and fail alone.

A request that goes as it came (AS_SENT) cannot be given another context: the backend loads the model anew for each
that means another one than is loaded. So it has a runner by what it says, and one that says nothing has the backend's
default, whatever others of its kin run with. Turns (core/turns.py) keep the two from taking each other's place with
each request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from unisono.core.limits import text_bytes
from unisono.core.model import EmbedRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from unisono.core.model import Item, LoadedRunner, ModelInfo, RunnerSpec

# Ollama's default on most machines.
USUAL_CONTEXT = 4096
# Nothing smaller is chosen, however little memory there is, unless an item asks for it.
LEAST_CONTEXT = 512
# Contexts that the service works out are multiples of this: llama.cpp pads them.
_STEP = 256
# Bytes of text a token: of English prose, and of text that is hard on the vocabulary.
BYTES_PER_TOKEN = 4
_FEWEST_BYTES_PER_TOKEN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A runner that had work lately."""

    runner: RunnerSpec
    # Tokens of context a slot that the backend had given it when it was loaded; 0: not known.
    context_tokens: int = 0
    # It has work now.
    is_busy: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of context a slot; 0: not known."""
        return self.context_tokens or self.runner.options.num_ctx or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a group's items get."""

    # What the runner is asked for; None: the backend's default.
    num_ctx: int | None
    # Tokens of each slot; 0: not known.
    tokens: int
    # Why, for people.
    reason: str


def kin_of(runner: RunnerSpec) -> RunnerSpec:
    """A runner but for its context. Whether it is loaded by an embedding or a chat makes no other runner of it."""
    return with_context(replace(runner, is_embedding=False), None)


def with_context(runner: RunnerSpec, num_ctx: int | None) -> RunnerSpec:
    """The same runner with another context."""
    if runner.options.num_ctx == num_ctx:
        return runner
    return replace(runner, options=replace(runner.options, num_ctx=num_ctx))


def asked_of(item: Item) -> int | None:
    """The context that an item asks for."""
    return item.options.runner.num_ctx


def longest_prompt_bytes(item: Item) -> int:
    """Bytes of what must fit into the context at one time: each text of an embedding by itself."""
    if isinstance(item.request, EmbedRequest):
        return max((len(text.encode(errors="surrogatepass")) for text in item.request.input), default=0)
    return text_bytes(item)


def shared(
    items: Iterable[Item],
    model: ModelInfo,
    *,
    there: LoadedRunner | None = None,
    standing: Sequence[Standing] = (),
    fits: int | None = None,
) -> Context:
    """One context for all these items, of one kin.

    `there`: the model as the backend has it in memory. `standing`: the kin's runners that had work lately. `fits`:
    the largest context that memory allows; None: no limit is known.
    """
    asked = {num_ctx for item in items if (num_ctx := asked_of(item)) is not None}
    modest = [item for item in items if asked_of(item) is None]
    largest = max(asked, default=0)
    # Enough for those who ask, and for the prompts of those who do not.
    enough = _limited(max(largest, min(USUAL_CONTEXT, _longest(modest, BYTES_PER_TOKEN))), model)
    no_more = "no item needs more" if largest <= enough else "it was trained for no more"
    for one in standing:
        if one.is_busy and (one.tokens >= enough or not (asked or one.tokens)):
            what = f"{one.tokens:,} tokens" if one.tokens else "the backend's default"
            return Context(
                num_ctx=one.runner.options.num_ctx,
                tokens=one.tokens,
                reason=f"{what}: the model is at work with it, and {no_more}",
            )
    tokens = there.context_length if there is not None else 0
    if tokens >= enough and tokens:
        return _as_loaded(tokens, standing, f"and {no_more}")
    if not asked and not tokens and (fits is None or fits >= _limited(USUAL_CONTEXT, model)):
        return Context(num_ctx=None, tokens=0, reason="no item asks for a context: the backend's default")
    room = min(USUAL_CONTEXT, _longest(modest, _FEWEST_BYTES_PER_TOKEN, with_answer=True))
    if not asked and not tokens:
        # The default, and memory may not allow it.
        room = USUAL_CONTEXT
    wanted = _limited(-(-room // _STEP) * _STEP if room > largest else largest, model)
    if fits is not None and fits < wanted:
        most = max(LEAST_CONTEXT, fits - fits % _STEP)
        if most < wanted:
            if tokens >= most:
                return _as_loaded(tokens, standing, "and memory allows no more")
            return Context(num_ctx=most, tokens=most, reason=f"{most:,} tokens: memory allows no more")
    if wanted > largest:
        why = "what items that ask for none may need"
    elif wanted < largest:
        why = "the model was trained for no more"
    else:
        why = "the most that an item asks for"
    return Context(num_ctx=wanted, tokens=wanted, reason=f"{wanted:,} tokens: {why}")


def own(num_ctx: int | None, there: LoadedRunner | None) -> Context:
    """The context of items that all ask for the same, and share it with nobody else."""
    if num_ctx is not None:
        return Context(num_ctx=num_ctx, tokens=num_ctx, reason=f"{num_ctx:,} tokens: asked for")
    tokens = there.context_length if there is not None else 0
    return Context(num_ctx=None, tokens=tokens, reason="no item asks for a context: the backend's default")


def as_sent(num_ctx: int | None, standing: Sequence[Standing]) -> Context:
    """The context of a request that goes as it came. `standing`: its kin's runners that had work lately.

    The default has no name, and is known once the backend was seen to give it. Then whoever is at work with as much
    by name is the same to the backend, and to this service.
    """
    given = next((one.context_tokens for one in standing if one.runner.options.num_ctx == num_ctx), 0)
    tokens = given or num_ctx or 0
    reason = "asked for" if num_ctx is not None else "the backend's default, since the request goes as it came"
    reason = f"{tokens:,} tokens: {reason}" if tokens else reason
    for one in standing:
        if one.is_busy and tokens and one.tokens == tokens:
            return Context(num_ctx=one.runner.options.num_ctx, tokens=tokens, reason=reason)
    return Context(num_ctx=num_ctx, tokens=tokens, reason=reason)


def fixed(tokens: int) -> Context:
    """The context of a backend that has only this one; it is not asked for, so that all share one runner."""
    return Context(num_ctx=None, tokens=tokens, reason=f"{tokens:,} tokens: the backend was started with them")


def _as_loaded(tokens: int, standing: Sequence[Standing], why: str) -> Context:
    """What is in memory; by the name under which it was loaded, where it was this service that did it."""
    num_ctx = next((one.runner.options.num_ctx for one in standing if one.tokens == tokens), tokens)
    return Context(num_ctx=num_ctx, tokens=tokens, reason=f"{tokens:,} tokens: the model is loaded with them, {why}")


def _limited(tokens: int, model: ModelInfo) -> int:
    """No more than the model was trained for."""
    return min(tokens, model.context_length) if model.context_length else tokens


def _longest(items: Iterable[Item], bytes_per_token: int, *, with_answer: bool = False) -> int:
    """Tokens that the longest of these items may need."""
    needs = (
        -(-longest_prompt_bytes(item) // bytes_per_token)
        + (max(0, item.options.num_predict or 0) if with_answer else 0)
        for item in items
    )
    return max(needs, default=0)
