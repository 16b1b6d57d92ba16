"""OpenAI's own package as a client of a service: its lines, its files, and batches until they are over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from openai import AsyncOpenAI
from openai.types import Batch

from tests.integration.service import LIMIT_S, House, house

OVER = ("completed", "failed", "expired", "cancelled")
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def line(custom_id: str, body: dict[str, Any], *, url: str = CHAT, method: str = "POST") -> str:
    """A request of a batch file."""
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def chat(custom_id: str, text: str = "Hello", *, model: str = "fake", **fields: Any) -> str:
    """A conversation of one message."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}
    return line(custom_id, body)


def chats(count: int) -> list[str]:
    """Conversations named i0, i1 and so on."""
    return [chat(f"i{number}", f"Question {number}") for number in range(count)]


@asynccontextmanager
async def served(keeps_in: Path, **settings: Any) -> AsyncGenerator[tuple[House, AsyncOpenAI]]:
    """A service, and OpenAI's client of it."""
    async with house(keeps_in=keeps_in, with_http=True, **settings) as h:
        client = AsyncOpenAI(base_url=f"{h.http_url}/v1", api_key="any", timeout=LIMIT_S, max_retries=0)
        async with client:
            yield h, client


async def upload(client: AsyncOpenAI, lines: Iterable[str]) -> str:
    """A batch's file; its id."""
    file = await client.files.create(file=("requests.jsonl", "\n".join(lines).encode() + b"\n"), purpose="batch")
    return file.id


async def create(client: AsyncOpenAI, lines: Iterable[str], *, endpoint: Any = CHAT, **fields: Any) -> Batch:
    """A batch of a new file."""
    window: Any = fields.pop("window", "24h")
    return await client.batches.create(
        input_file_id=await upload(client, lines), endpoint=endpoint, completion_window=window, **fields
    )


async def until_over(client: AsyncOpenAI, batch: Batch) -> Batch:
    """Polls it."""
    async with asyncio.timeout(LIMIT_S):
        while batch.status not in OVER:
            await asyncio.sleep(0.01)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file of results, by custom_id."""
    assert file_id is not None
    content = await client.files.content(file_id)
    found = [json.loads(text) for text in content.text.splitlines()]
    by_id = {one["custom_id"]: one for one in found}
    assert len(by_id) == len(found)
    return by_id
