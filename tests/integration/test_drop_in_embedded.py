"""The drop-in over a llama.cpp server with a real model: OpenAI's endpoints, asked by OpenAI's own package."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import httpx
import openai
import pytest
import pytest_asyncio

from tests.engine import MODEL, skip_without_engine
from unisono.adapters.embedded import EmbeddedBackend
from unisono.bootstrap import running
from unisono.config import Settings

pytestmark = pytest.mark.embedded


@dataclass(frozen=True, kw_only=True)
class DropIn:
    """A service, its engine, and a client that knows OpenAI only."""

    url: str
    backend: EmbeddedBackend
    client: openai.AsyncOpenAI


@pytest_asyncio.fixture
async def drop_in() -> AsyncGenerator[DropIn, None]:
    """A service over an engine of its own."""
    skip_without_engine()
    settings = Settings(listen="127.0.0.1:0", http_listen="127.0.0.1:0", embedded=True, drain=0.0, state_dir="none")
    async with running(settings, with_http=True) as service:
        assert isinstance(service.backend, EmbeddedBackend)
        async with openai.AsyncOpenAI(base_url=f"{service.http_url}/v1", api_key="none", max_retries=0) as client:
            yield DropIn(url=service.http_url, backend=service.backend, client=client)


async def ask(client: openai.AsyncOpenAI, question: str) -> str:
    """The answer, streamed."""
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_chats_are_answered(drop_in: DropIn) -> None:
    """Whole or streamed, the same."""
    whole = await drop_in.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 24
    assert await ask(drop_in.client, "What is the capital of France?") == whole.choices[0].message.content


async def test_callers_share_passes(drop_in: DropIn) -> None:
    """Eight at once take less than half of the passes of eight in turn: all of them have 24 tokens to say."""
    _ = await ask(drop_in.client, "Count to one.")
    before = (await drop_in.backend.engine_counters())["n_decode_total"]
    answers = await asyncio.gather(*(ask(drop_in.client, f"Tell me a long story about {n} cats.") for n in range(8)))
    passes = (await drop_in.backend.engine_counters())["n_decode_total"] - before
    assert all(answers)
    assert passes < 8 * 24 / 2


async def test_ollamas_own_api_is_not_spoken_there(drop_in: DropIn) -> None:
    """In Ollama's shape."""
    async with httpx.AsyncClient(base_url=drop_in.url, trust_env=False) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
        answer = await client.post("/api/chat", json=body)
    assert answer.status_code == 501
    assert list(answer.json()) == ["error"]
