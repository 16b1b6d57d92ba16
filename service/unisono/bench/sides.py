"""The sides that are compared: what a client does by itself.

(a) one at a time; (b) `asyncio.gather` over httpx; (c) the same behind a semaphore of as many as there are slots;
(d) `asyncio.gather` over the `ollama` package's AsyncClient, for an Ollama. Each has a client of its own for each
batch, made before the clock starts, as a script would have: one whose pool holds many idle connections is slower.
Unisono's side is in `through.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx

from unisono.bench.backend import OLLAMA, Answer, Backend, ask, messages_of, options_of
from unisono.bench.workloads import Ask, Phase, Sending

_T = TypeVar("_T")
ONE_AT_A_TIME = "one at a time"
GATHER = "gather"
SEMAPHORE = "semaphore"
OLLAMA_PACKAGE = "ollama package"
UNISONO = "unisono"
# Those that ours is held against; one at a time is there to be seen.
RIVALS = (GATHER, SEMAPHORE, OLLAMA_PACKAGE)


@dataclass(slots=True, kw_only=True)
class Ran:
    """What a side did with a phase."""

    seconds: float
    answers: list[Answer]
    # Forward passes by the side's own count; None where it has none.
    passes: int | None = None
    # By how much the memory of the side's own service grew, in bytes; None where it has none.
    memory_growth: int | None = None
    notes: list[str] = field(default_factory=list)


class Side(Protocol):
    """A way to have requests answered."""

    @property
    def name(self) -> str:
        """One of the names above."""
        ...

    async def run(self, phase: Phase, sending: Sending, *, callers: int) -> Ran:
        """Has all requests of a phase answered; never raises because of a request."""
        ...


# One request through some client.
Send = Callable[[Ask], Awaitable[Answer]]


class Direct:
    """A side that asks the backend itself."""

    def __init__(self, name: str, backend: Backend, *, slots: int, streams: bool) -> None:
        """`streams`: answers come token by token, so that passes can be counted from their times."""
        self.name = name
        self._backend = backend
        self._slots = slots
        self._streams = streams

    async def run(self, phase: Phase, sending: Sending, *, callers: int) -> Ran:
        """See Side. Callers have a client each."""
        if sending is Sending.CALLERS:
            return await self._run_callers(phase, callers)
        async with self._client() as send:
            began = time.perf_counter()
            answers = await self._all(send, phase.asks)
            return Ran(seconds=time.perf_counter() - began, answers=answers)

    async def _run_callers(self, phase: Phase, callers: int) -> Ran:
        async with contextlib.AsyncExitStack() as stack:
            sends = [await stack.enter_async_context(self._client()) for _ in range(callers)]
            began = time.perf_counter()
            parts = zip(sends, cut(phase.asks, callers), strict=True)
            found = await asyncio.gather(*[one_after_the_other(send, part) for send, part in parts])
            seconds = time.perf_counter() - began
        return Ran(seconds=seconds, answers=[answer for part in found for answer in part])

    async def _all(self, send: Send, asks: Sequence[Ask]) -> list[Answer]:
        if self.name == ONE_AT_A_TIME:
            return await one_after_the_other(send, asks)
        if self.name == SEMAPHORE:
            gate = asyncio.Semaphore(self._slots)

            async def gated(one: Ask) -> Answer:
                async with gate:
                    return await send(one)

            return list(await asyncio.gather(*[gated(one) for one in asks]))
        return list(await asyncio.gather(*[send(one) for one in asks]))

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncGenerator[Send, None]:
        if self.name == OLLAMA_PACKAGE:
            client = _ollama_client(self._backend)

            async def send(one: Ask) -> Answer:
                return await _ask_by_package(client, self._backend, one)

            try:
                yield send
            finally:
                await client.close()
            return
        async with self._backend.client() as pool:

            async def send_by_httpx(one: Ask) -> Answer:
                return await ask(pool, self._backend, one, streams=self._streams)

            yield send_by_httpx


def direct_sides(backend: Backend, *, slots: int, streams: bool) -> tuple[list[Direct], list[str]]:
    """The sides that ask the backend themselves, and why one is missing."""
    names = [ONE_AT_A_TIME, GATHER, SEMAPHORE]
    notes = []
    if backend.kind != OLLAMA:
        notes.append(f"no {OLLAMA_PACKAGE}: it speaks to an Ollama only")
    elif importlib.util.find_spec("ollama") is None:
        notes.append(f"no {OLLAMA_PACKAGE}: it is not installed here (pip install ollama)")
    else:
        names.append(OLLAMA_PACKAGE)
    return [Direct(name, backend, slots=slots, streams=streams) for name in names], notes


async def one_after_the_other(send: Send, asks: Sequence[Ask]) -> list[Answer]:
    """Each when the one before is answered."""
    return [await send(one) for one in asks]


def cut(whole: Sequence[_T], parts: int) -> list[Sequence[_T]]:
    """So many parts, of nearly equal length, in order."""
    return [whole[len(whole) * k // parts : len(whole) * (k + 1) // parts] for k in range(parts)]


def _ollama_client(backend: Backend) -> Any:
    # By name, because it need not be installed, and takes its time: only this side needs it.
    ollama = importlib.import_module("ollama")
    return ollama.AsyncClient(host=backend.url, headers=backend.headers, trust_env=False)


async def _ask_by_package(client: Any, backend: Backend, one: Ask) -> Answer:
    """The package's `chat` has no `truncate`; all else is as the other sides send it."""
    answer = Answer(name=one.name)
    began = time.perf_counter()
    try:
        found = await client.chat(
            model=backend.model_of(one), messages=messages_of(one), options=options_of(one), stream=False
        )
        answer.tokens, answer.prompt_tokens = found.eval_count or 0, found.prompt_eval_count or 0
    except (httpx.HTTPError, ConnectionError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    except Exception as error:
        # Its own errors are no tree; those it knows end the request, all else is a defect.
        if type(error).__module__.partition(".")[0] != "ollama":
            raise
        answer.error = f"{type(error).__name__}: {error}"
    answer.latency_s = time.perf_counter() - began
    return answer
