"""A backend's own counters: what it really computed, whoever asked.

llama.cpp's server has them on /metrics (so the embedded engine and the stand-in have them too). Ollama has no such
page, but the runner that it starts is a llama.cpp server: where it runs on this machine, it is found among the
processes by its `--port`, and asked there. Where neither helps, passes are counted from the tokens' times.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from unisono.bench.backend import LLAMA_SERVER, Answer, Backend
from unisono.core.model import PassMethod
from unisono.core.passes import PassCount, PassCounter

_LOOK_S = 2.0
# How often an Ollama's runners are looked for, to see how many it starts.
_WATCH_EVERY_S = 0.05
_COUNTER = re.compile(r"^(?:llamacpp|ollama):(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_IDLE_TRIES = 200
# A count by times says something where it is as sure as this: some tokens always come upon one another.
LEAST_CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counters at one moment, or what they rose by; None where nobody counts it."""

    passes: int | None = None
    # Prompt tokens computed, those found in a cache left out.
    prompt_tokens: int | None = None
    loads: int | None = None
    # The page that they were read from.
    page: str = ""

    def since(self, before: Counts) -> Counts:
        """What was counted since then; passes and tokens only of one and the same runner."""
        is_same = before.page == self.page
        return Counts(
            passes=_rise(before.passes, self.passes) if is_same else None,
            prompt_tokens=_rise(before.prompt_tokens, self.prompt_tokens) if is_same else None,
            loads=_rise(before.loads, self.loads),
        )


def _rise(before: int | None, after: int | None) -> int | None:
    # A runner that was started anew counts from 0 again.
    return None if before is None or after is None or after < before else after - before


@dataclass(slots=True)
class Counters:
    """Where a backend's counters are read."""

    # The page, and what it wants to see; "" where there is none.
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    # Whether an Ollama's runners are processes of this machine.
    runners: RunnerWatch | None = None

    @property
    def knows_passes(self) -> bool:
        """Whether passes are counted by the backend itself."""
        return bool(self.url)

    @property
    def source(self) -> str:
        """Where passes come from, for people."""
        return "the engine's own counter" if self.url else "counted from the times of the tokens"

    async def read(self) -> Counts:
        """The counters now."""
        if self.runners is not None:
            self.url = await self.runners.url()
        found = await _read_page(self.url, self.headers) if self.url else {}
        loads = found.get("loads_total")
        if loads is None and self.runners is not None:
            loads = len(self.runners.seen)
        return Counts(
            passes=_whole(found.get("n_decode_total")),
            prompt_tokens=_whole(found.get("prompt_tokens_total")),
            loads=_whole(loads),
            page=self.url,
        )

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncGenerator[None, None]:
        """Meanwhile every runner is seen that an Ollama starts, however short its life."""
        if self.runners is None:
            yield
            return
        task = asyncio.get_running_loop().create_task(self.runners.watch())
        try:
            yield
        finally:
            task.cancel()


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


async def find_counters(backend: Backend, url: str = "") -> Counters:
    """The counters of a backend; `url` names the page where it is elsewhere."""
    page = url or f"{backend.url.rstrip('/')}/metrics"
    if "n_decode_total" in await _read_page(page, backend.headers):
        return Counters(url=page, headers=backend.headers)
    if backend.kind == LLAMA_SERVER:
        return Counters()
    watch = RunnerWatch()
    watch.look()
    return Counters(url=await watch.url(), runners=watch) if watch.seen else Counters()


async def _read_page(url: str, headers: Mapping[str, str]) -> dict[str, float]:
    try:
        async with httpx.AsyncClient(timeout=_LOOK_S, trust_env=False, headers=headers) as client:
            answer = await client.get(url)
    except httpx.HTTPError:
        return {}
    return {name: float(value) for name, value in _COUNTER.findall(answer.text)} if answer.status_code == 200 else {}


async def until_idle(backend: Backend) -> None:
    """Returns when nothing is being computed any more, where the backend tells; a side leaves nothing to the next."""
    if backend.kind != LLAMA_SERVER:
        return
    async with backend.client() as client:
        for _ in range(_IDLE_TRIES):
            answer = await client.get("/slots", timeout=_LOOK_S)
            if answer.status_code != 200 or not any(slot["is_processing"] for slot in answer.json()):
                return
            await asyncio.sleep(_WATCH_EVERY_S)


class RunnerWatch:
    """The runners that an Ollama on this machine has started, as far as they can be seen."""

    def __init__(self, processes: Path = Path("/proc")) -> None:
        self._processes = processes
        # Of each process that was ever seen, the port.
        self.seen: dict[int, int] = {}

    def look(self) -> dict[int, int]:
        """The runners there are now: their processes' numbers and ports."""
        now: dict[int, int] = {}
        with contextlib.suppress(OSError):
            for folder in self._processes.iterdir():
                if folder.name.isdigit():
                    with contextlib.suppress(OSError, ValueError):
                        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                        is_ours = any("llama" in word for word in words[:2])
                        if is_ours and "--model" in words and "--port" in words:
                            now[int(folder.name)] = int(words[words.index("--port") + 1])
        self.seen |= now
        return now

    async def url(self) -> str:
        """The newest runner's counters; "" where it has none, or there is no runner."""
        for port in reversed(self.look().values()):
            page = f"http://127.0.0.1:{port}/metrics"
            if "n_decode_total" in await _read_page(page, {}):
                return page
        return ""

    async def watch(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_WATCH_EVERY_S)


def count_passes(answers: Sequence[Answer], *, slots: int | None) -> PassCount | None:
    """Forward passes, from the times of streamed tokens; None where none was streamed.

    As the service counts them, but that a model drafts is not known here: it shows in the confidence.
    """
    counter = PassCounter(PassMethod.CREATED_AT)
    counter.slots = slots or 0
    spoken = sorted((at_ns, place) for place, answer in enumerate(answers) for at_ns in answer.times_ns)
    if not spoken:
        return None
    last = {place: at_ns for at_ns, place in spoken}
    left = {place: len(answers[place].times_ns) for place in last}
    for at_ns, place in spoken:
        counter.spoke(place, at_ns)
        left[place] -= 1
        if not left[place]:
            tokens = answers[place].tokens
            counter.ended(place, at_ns, tokens=tokens or None, has_end_token=tokens > len(answers[place].times_ns))
    counter.settle()
    return counter.count
