"""Forwarded requests to Ollama: who reads their answers, which are passed on as they come."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Final

from unisono.adapters.held import ForwardedCall, StreamReader, WholeBodyReader
from unisono.adapters.ollama.answer import TextReader, corrected, parse_time_ns
from unisono.adapters.ollama.failures import failure, retry_after_s
from unisono.core.model import EmbedRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from unisono.adapters.held import HeldExchange
    from unisono.adapters.held.exchange import Head
    from unisono.adapters.held.forwarded import Reader
    from unisono.app.ports import Relay
    from unisono.core.errors import UnisonoError
    from unisono.core.model import Item

_CREATED: Final = re.compile(rb'"created_at"\s*:\s*"([^"]+)"')


def forwarded_call(
    exchange: HeldExchange, relay: Relay, item: Item, *, backend: str, model: str, now_ns: Callable[[], int]
) -> ForwardedCall:
    """The call of a request that was staged as it came. `now_ns` stands in where an answer has no time."""

    def held_s() -> float:
        return exchange.held_s

    def at_ns(beginning: bytes) -> int:
        found = _CREATED.search(beginning)
        try:
            return parse_time_ns(found[1].decode("ascii", errors="replace")) if found else now_ns()
        except ValueError:
            return now_ns()

    def reader_of(content_type: str) -> Reader:
        if content_type == "application/x-ndjson":
            return TextReader(backend=backend, model=model, held_s=held_s, now_ns=now_ns)
        if content_type == "text/event-stream":
            return StreamReader(backend=backend, model=model)
        return WholeBodyReader(
            is_embedding=isinstance(item.request, EmbedRequest),
            at_ns=at_ns,
            corrected=lambda durations: corrected(durations, held_s()),
        )

    return ForwardedCall(
        exchange,
        relay,
        reader_of=reader_of,
        failure=partial(_failure, backend=backend, model=model),
        backend=backend,
        model=model,
    )


def _failure(head: Head, body: bytes, *, backend: str, model: str) -> UnisonoError:
    return failure(head.status, body, backend=backend, model=model, retry_after_s=retry_after_s(head.headers))
