"""/api/embed and /api/embeddings: vectors that follow from the text, computed on the runner's one slot."""

from __future__ import annotations

import asyncio
import math
import random
import time
from functools import lru_cache
from typing import Any
from zlib import crc32

from tests.fakes.ollama.answers import tokenize
from tests.fakes.ollama.faults import FaultKind
from tests.fakes.ollama.http import Exchange
from tests.fakes.ollama.models import FakeModel
from tests.fakes.ollama.runner import Job, Runner
from tests.fakes.ollama.wire import ApiError, quote

# Recorded: embed_unsupported.
UNSUPPORTED = "This server does not support embeddings. Start it with `--embeddings`"
# llm/llama_server.go, normalizeEmbeddingError(); routes.go, EmbedHandler().
TOO_LONG = "the input length exceeds the context length"
# routes.go, EmbedHandler(): whatever is no status error of the runner, a runner that died too, is a 400. The text
# is what Embedding() of llm/llama_server.go wraps around net/http's; the port in it is invented.
DIED = 'do embedding request: Post "http://127.0.0.1:40000/v1/embeddings": EOF'


def inputs_of(body: dict[str, Any]) -> list[str]:
    """The texts of a request; ApiError(400) for anything else (recorded: embed_bad)."""
    given = body.get("input")
    if given is None:
        return []
    if isinstance(given, str):
        return [given] if given else []
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        return given
    raise ApiError(400, "invalid input type")


async def embed(
    exchange: Exchange, runner: Runner, texts: list[str], *, truncate: bool, dimensions: int
) -> tuple[list[str], int]:
    """The vectors of some texts as JSON text, and how many tokens they have; ApiError where one cannot be."""
    model = runner.model
    if not model.can("embedding"):
        raise ApiError(501, UNSUPPORTED)
    prompts: list[list[str]] = []
    for text in texts:
        tokens = ["<s>", *tokenize(text), "</s>"]  # the recorded "hello" has 3 tokens
        if len(tokens) > runner.num_ctx:
            if not truncate:
                raise ApiError(400, TOO_LONG)
            tokens = tokens[: runner.num_ctx]
        prompts.append(tokens)
    await _compute(exchange, runner, prompts)
    size = model.embedding_length
    if 0 < dimensions < size:
        size = dimensions
    return [vector(text, model.embedding_length, size) for text in texts], sum(map(len, prompts))


async def _compute(exchange: Exchange, runner: Runner, prompts: list[list[str]]) -> None:
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = len(prompts)
    failed: list[ApiError] = []
    jobs: list[Job] = []

    def ended() -> None:
        nonlocal left
        left -= 1
        failed.extend(job.error for job in jobs if job.error is not None)
        if (left == 0 or failed) and not over.done():
            over.set_result(None)

    fault = exchange.fault
    jobs.extend(
        Job(exchange.live, prompt, (), stops=False, on_token=lambda _: None, on_end=ended, is_embedding=True)
        for prompt in prompts
    )
    if fault is not None and fault.kind is FaultKind.KILL_RUNNER:
        jobs[0].on_slot = runner.kill
    elif fault is not None and fault.kind is FaultKind.STALL and not fault.released.is_set():
        jobs[0].frozen = True
        fault.on_release.append(lambda: runner.freeze(jobs[0], frozen=False))
    try:
        for job in jobs:
            runner.submit(job)
        await over
    finally:
        for job in jobs:
            runner.cancel(job)
    if failed:
        raise ApiError(400, DIED)


@lru_cache(maxsize=4096)
def vector(text: str, length: int, size: int) -> str:
    """The unit vector of a text, cut to `size` numbers and of length one again, as JSON."""
    numbers = random.Random(crc32(text.encode()))
    values = [numbers.uniform(-1.0, 1.0) for _ in range(length)][:size]
    norm = math.sqrt(sum(value * value for value in values)) or 1.0
    return "[" + ",".join(f"{value / norm:.8g}" for value in values) + "]"


async def embed_body(
    exchange: Exchange, runner: Runner, body: dict[str, Any], texts: list[str], loaded_ns: int
) -> bytes:
    """The whole answer of /api/embed."""
    name = quote(body.get("model") or "")
    if not texts:
        return f'{{"model":{name},"embeddings":[]}}'.encode()
    vectors, tokens = await embed(
        exchange,
        runner,
        texts,
        truncate=body.get("truncate") is not False,
        dimensions=body.get("dimensions") or 0,
    )
    headers_ns = exchange.live.headers_ns
    total_ns = time.monotonic_ns() - headers_ns
    return (
        f'{{"model":{name},"embeddings":[{",".join(vectors)}],"total_duration":{total_ns},'
        f'"load_duration":{loaded_ns - headers_ns},"prompt_eval_count":{tokens}}}'
    ).encode()


def legacy_body(model: FakeModel, prompt: str) -> bytes:
    """The answer of /api/embeddings."""
    numbers = vector(prompt, model.embedding_length, model.embedding_length) if prompt else "[]"
    return f'{{"embedding":{numbers}}}'.encode()
