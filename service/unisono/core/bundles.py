"""Which embedding items go in one request, what each gets of its answer, and what follows when the request fails.

Theory of operation. An embedding model has one slot: its requests stand in line, and each costs a way there and back
in which nothing is computed. So items that differ in nothing but their texts become a *bundle*: one request with all
their texts, whose vectors are dealt out again.

A request is refused as a whole, though only one of its texts may be at fault. Then each half of the bundle becomes a
request of its own, until the item at fault stands alone: of 100 items, 13 or 14 requests more for one such item. What
the backend failed at (a runner that died, an answer that cannot be read) is tried again first, like any request. When
the attempts are used up, it may still be one text that does it, and the halves are *suspects*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from unisono.core.errors import (
    BackendBusyError,
    BackendFailedError,
    BackendStalledError,
    BadAnswerError,
    ConnectionLostError,
    OutOfMemoryError,
    PromptTooLongError,
    RefusedByBackendError,
    RunnerDiedError,
)
from unisono.core.limits import text_bytes
from unisono.core.model import EmbedRequest, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from unisono.core.errors import UnisonoError
    from unisono.core.model import Finished, Item, Options

# Texts of one bundle, and their bytes. More would save little: a request's own cost is some milliseconds, and 64 KiB
# are some 16,000 tokens, which take a tenth of a second on a large card and a minute on a small processor. So long
# others wait who want the slot, the first results are late, and a failure costs as much again.
MOST_TEXTS = 256
MOST_BYTES = 64 * 1024

# One text is enough for these, and no attempt will change it.
_MISTAKES = (PromptTooLongError, RefusedByBackendError)
# One text may be enough for these too (a vector that is not a number, more than memory holds), or none is the cause.
# Not among them: what concerns all texts alike, such as a model that cannot be loaded.
_FAILURES = (
    RunnerDiedError,
    ConnectionLostError,
    BackendStalledError,
    OutOfMemoryError,
    BadAnswerError,
    BackendFailedError,
)


@dataclass(slots=True)
class _Open:
    """A bundle that takes more."""

    places: list[int]
    texts: int
    size: int


def bundled(
    items: Sequence[Item], *, most_texts: int = MOST_TEXTS, most_bytes: int = MOST_BYTES
) -> list[tuple[int, ...]]:
    """The places of the items of one runner, bundle by bundle; in their order, and the bundles by their first.

    An item is never divided: one that is larger than a bundle may be is a bundle of its own. So is one that does not
    want an embedding.
    """
    bundles: list[_Open] = []
    still_open: dict[tuple[int | None, bool, Options], _Open] = {}
    for place, item in enumerate(items):
        if not isinstance(item.request, EmbedRequest):
            bundles.append(_Open([place], 0, 0))
            continue
        request, texts, size = item.request, len(item.request.input), text_bytes(item)
        # Whether texts are cut is said in two words: not at all is sent as no.
        key = (request.dimensions, bool(request.truncate), item.options)
        bundle = still_open.get(key)
        if bundle is None or bundle.texts + texts > most_texts or bundle.size + size > most_bytes:
            bundle = still_open[key] = _Open([], 0, 0)
            bundles.append(bundle)
        bundle.places.append(place)
        bundle.texts += texts
        bundle.size += size
    return [tuple(bundle.places) for bundle in bundles]


def merged(items: Sequence[Item]) -> Item:
    """What is sent for a bundle: the first item, with the texts of all."""
    texts = [text for item in items for text in _texts(item)]
    first = items[0]
    if len(items) == 1 or not isinstance(first.request, EmbedRequest):
        return first
    return replace(first, request=replace(first.request, input=tuple(texts)))


def dealt(answer: Finished, items: Sequence[Item]) -> list[Finished]:
    """What each item of a bundle gets of its answer, which has as many vectors as the items have texts.

    The backend counts the tokens of the bundle as a whole. They are shared out by bytes of text, which is an
    estimate for the one item, and exact in the sum.
    """
    if len(items) == 1:
        return [answer]
    ends = accumulate((len(_texts(item)) for item in items), initial=0)
    vectors = [answer.embeddings[start:end] for start, end in pairwise(ends)]
    sizes = [text_bytes(item) for item in items]
    usage = answer.usage
    prompt = shares(usage.prompt_tokens, sizes)
    completion = shares(usage.completion_tokens, sizes)
    cached: Iterable[int | None] = [None] * len(items)
    if usage.cached_prompt_tokens is not None:
        cached = shares(usage.cached_prompt_tokens, sizes)
    return [
        replace(
            answer,
            embeddings=theirs,
            usage=Usage(prompt_tokens=asked, cached_prompt_tokens=known, completion_tokens=said),
        )
        for theirs, asked, known, said in zip(vectors, prompt, cached, completion, strict=True)
    ]


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """A total in whole parts that follow the weights; their sum is the total."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    ends = [total * upto // whole for upto in accumulate(weights, initial=0)]
    return [end - start for start, end in pairwise(ends)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the items of a bundle have behind them, as far as it decides on their attempts."""

    max_attempts: int
    # Attempts that were used up by failures that are tried again.
    charged: int = 0
    # They were in a bundle that used up all attempts.
    is_suspect: bool = False

    def attempts_left(self, count: int) -> int:
        """The attempts of a bundle of so many items.

        One alone has its own. Suspects together have one, since a failure costs them nothing: they are divided.
        """
        return 1 if self.is_suspect and count > 1 else max(1, self.max_attempts - self.charged)

    def after(self, error: UnisonoError) -> Standing | None:
        """What the halves of a bundle have behind them that failed for good; None: it is not to be divided.

        1. A mistake that can be one text's: as the bundle had. The attempt that found it is nobody's.
        2. A failure that can be one text's: they are suspects, and have used up no attempt.
        3. Suspects that the backend had no room for: as before, since they had but one attempt.
        4. Anything else concerns all of them.
        """
        if isinstance(error, _MISTAKES) or (self.is_suspect and isinstance(error, BackendBusyError)):
            return self
        if isinstance(error, _FAILURES):
            return Standing(max_attempts=self.max_attempts, is_suspect=True)
        return None


def _texts(item: Item) -> tuple[str, ...]:
    return item.request.input if isinstance(item.request, EmbedRequest) else ()
