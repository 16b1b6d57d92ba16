"""Results too large for one message → parts that fit, and a rest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from unisono.core.events import Result, ResultPart, weight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# What a message may hold of a result. Clients accept 4 MiB by default; the rest is for its frame.
MAX_MESSAGE_WEIGHT = 3 * 1024 * 1024
# Characters of text a part: at most 2 MiB of UTF-8.
_TEXT_STEP = 512 * 1024


def split(result: Result, limit: int = MAX_MESSAGE_WEIGHT) -> tuple[list[ResultPart], Result]:
    """The parts that go before a result, and the result without what they hold; no parts where it fits as it is.

    Put together in order (texts and lists appended), parts and rest give the result as it was.
    """
    done = result.completion
    if done is None or weight(result) <= limit:
        return [], result
    pieces: list[dict[str, Any]] = [
        *({"content": text} for text in _slices(done.content)),
        *({"thinking": text} for text in _slices(done.thinking)),
        *({"embeddings": some} for some in _runs(done.embeddings, lambda v: 4 * len(v) + 16, limit)),
        *({"logprobs": some} for some in _runs(done.logprobs, lambda e: 160 * (1 + len(e.top)), limit)),
    ]
    parts = [
        ResultPart(item_id=result.item_id, index=result.index, part=number, **piece)
        for number, piece in enumerate(pieces)
    ]
    rest = replace(done, content="", thinking="", embeddings=(), logprobs=())
    return parts, replace(result, completion=rest, parts=len(parts))


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), _TEXT_STEP):
        yield text[start : start + _TEXT_STEP]


def _runs(values: tuple[Any, ...], size_of: Any, limit: int) -> Iterator[tuple[Any, ...]]:
    """Consecutive values whose sizes sum to at most the limit; one that is larger goes alone."""
    run: list[Any] = []
    size = 0
    for value in values:
        if run and size + size_of(value) > limit:
            yield tuple(run)
            run, size = [], 0
        run.append(value)
        size += size_of(value)
    if run:
        yield tuple(run)
