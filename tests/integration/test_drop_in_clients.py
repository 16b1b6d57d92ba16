"""Programs that know Ollama, or OpenAI, and nothing of this service: they work as they are, with another address."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from tests.fakes.ollama import FakeModel
from tests.integration.service import LIMIT_S, House, house

ollama = pytest.importorskip("ollama", reason="Ollama's own client is not installed")
openai = pytest.importorskip("openai", reason="OpenAI's own client is not installed")

EVERYTHING = FakeModel(name="all", capabilities=("completion", "tools", "vision", "thinking", "insert"))
MODELS = [FakeModel(name="fake"), EVERYTHING, FakeModel(name="fake-embed", capabilities=("embedding",))]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHORT = {"num_predict": 5}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Capital(BaseModel):
    """What is wanted."""

    name: str


async def both(h: House, ask: Any) -> tuple[Any, Any]:
    """The same asked of the stand-in itself, and through the drop-in; in a thread, since it waits."""
    return await asyncio.to_thread(ask, h.fake.url), await asyncio.to_thread(ask, h.http_url)


def timeless(answer: Any) -> Any:
    """An answer without what differs from time to time."""
    value = answer.model_dump() if isinstance(answer, BaseModel) else answer
    if isinstance(value, dict):
        own = ("created_at", "created", "id", "expires_at", "size_vram", "modified_at")
        return {k: timeless(v) for k, v in value.items() if k not in own and "duration" not in k}
    return [timeless(each) for each in value] if isinstance(value, list | tuple) else value


async def test_ollamas_client() -> None:
    """Chat, generate, embeddings, what there is: the same as from the backend itself."""
    async with house(models=MODELS, with_http=True) as h:

        def ask(url: str) -> list[Any]:
            client = ollama.Client(url)
            found = [
                client.chat("fake", QUESTION, options=SHORT),
                list(client.chat("fake", QUESTION, options=SHORT, stream=True)),
                client.chat("all", QUESTION, options=SHORT, tools=[TOOL]),
                client.chat("all", QUESTION, options=SHORT, think=True),
                client.chat("fake", QUESTION, options=SHORT, format="json"),
                client.chat("fake", QUESTION, options=SHORT, format=Capital.model_json_schema()),
                client.generate("fake", "Once", options=SHORT),
                list(client.generate("fake", "Once", options=SHORT, stream=True)),
                client.generate("fake", "Once", options=SHORT, raw=True),
                client.embed("fake-embed", ["a", "b"]),
                client.embed("fake-embed", "a", dimensions=8),
                client.embeddings("fake-embed", "a"),
                client.list(),
                client.show("fake"),
                client.ps(),
            ]
            client._client.close()
            return found

        direct, through = await both(h, ask)
        for one, other in zip(direct, through, strict=True):
            assert timeless(other) == timeless(one)


async def test_ollamas_client_async() -> None:
    """Its other half, with several requests at a time."""
    async with house(models=MODELS, with_http=True) as h:
        client = ollama.AsyncClient(h.http_url)
        answers = await asyncio.gather(*(client.chat("fake", QUESTION, options=SHORT) for _ in range(8)))
        assert {answer.message.content for answer in answers} == {answers[0].message.content}
        parts = [part async for part in await client.chat("fake", QUESTION, options=SHORT, stream=True)]
        assert "".join(part.message.content for part in parts) == answers[0].message.content
        assert len((await client.embed("fake-embed", ["a", "b", "c"])).embeddings) == 3
        with pytest.raises(ollama.ResponseError) as caught:
            await client.chat("nosuch", QUESTION)
        assert caught.value.status_code == 404
        await client._client.aclose()


async def test_errors_of_ollamas_client() -> None:
    """Each with the backend's status and words; what is refused by the service says by which setting."""
    async with house(models=MODELS, with_http=True) as h:

        def ask(url: str) -> list[tuple[int, str]]:
            client = ollama.Client(url)
            found: list[tuple[int, str]] = []
            for wrong in (
                lambda: client.chat("nosuch", QUESTION),
                lambda: list(client.chat("nosuch", QUESTION, stream=True)),
                lambda: client.chat("fake-embed", QUESTION),
                lambda: client.chat("fake", QUESTION, tools=[TOOL]),
                lambda: client.chat("fake", QUESTION, think=True),
                lambda: client.generate("fake", "x", options={"num_ctx": "many"}),
                lambda: client.embed("fake", "x"),
                lambda: client.show("nosuch"),
            ):
                with pytest.raises(ollama.ResponseError) as caught:
                    wrong()
                found.append((caught.value.status_code, caught.value.error))
            client._client.close()
            return found

        direct, through = await both(h, ask)
        assert through == direct
        client = ollama.Client(h.http_url)
        with pytest.raises(ollama.ResponseError, match="UNISONO_ALLOW=pull") as refused:
            await asyncio.to_thread(client.pull, "x")
        assert refused.value.status_code == 403
        client._client.close()


async def test_openais_client() -> None:
    """Chat, completions and embeddings, streamed or not, live; models, and errors."""
    async with house(models=MODELS, with_http=True) as h:

        def ask(url: str) -> list[Any]:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="ollama", max_retries=0)
            chat, text = client.chat.completions, client.completions
            usage = {"include_usage": True}
            with pytest.raises(openai.NotFoundError) as caught:
                chat.create(model="nosuch", messages=QUESTION)
            found = [
                chat.create(model="fake", messages=QUESTION, max_tokens=5),
                list(chat.create(model="fake", messages=QUESTION, max_tokens=5, stream=True)),
                list(chat.create(model="fake", messages=QUESTION, max_tokens=5, stream=True, stream_options=usage)),
                chat.create(model="all", messages=QUESTION, max_tokens=5, tools=[TOOL]),
                text.create(model="fake", prompt="Once", max_tokens=5),
                list(text.create(model="fake", prompt="Once", max_tokens=5, stream=True)),
                client.embeddings.create(model="fake-embed", input=["a", "b"], encoding_format="float"),
                [model.id for model in client.models.list()],
                client.models.retrieve("fake").id,
                caught.value.body,
            ]
            client.close()
            return found

        direct, through = await both(h, ask)
        for one, other in zip(direct, through, strict=True):
            assert timeless(other) == timeless(one)


async def test_a_langchain_chat_model() -> None:
    """LangChain's own for Ollama: invoked, streamed, in a batch, with tools bound."""
    chat_models = pytest.importorskip("langchain_ollama", reason="langchain-ollama is not installed")
    async with house(models=MODELS, with_http=True) as h:
        model = chat_models.ChatOllama(model="fake", base_url=h.http_url, num_predict=5)
        answer = await model.ainvoke("What is the capital of France?")
        assert answer.content
        assert answer.response_metadata["done_reason"] == "length"
        parts = [part.content async for part in model.astream("What is the capital of France?")]
        assert "".join(parts) == answer.content
        passes = h.fake.passes
        several = await model.abatch([f"Question {number}" for number in range(4)])
        assert len(several) == 4
        # By themselves they were 4 x 5.
        assert h.fake.passes - passes < 4 * 5
        other = chat_models.ChatOllama(model="all", base_url=h.http_url, num_predict=5)
        assert (await other.bind_tools([TOOL]).ainvoke("Weather in Rome?")).response_metadata["done"]
        embeddings = chat_models.OllamaEmbeddings(model="fake-embed", base_url=h.http_url)
        assert len(await embeddings.aembed_documents(["a"])) == 1
        for each in (model, other, embeddings):
            # It never closes its connections by itself.
            each._client._client.close()
            await each._async_client._client.aclose()


async def test_curl() -> None:
    """A stream, as a shell sees it."""
    async with house(models=MODELS, with_http=True) as h:
        body = json.dumps({"model": "fake", "messages": QUESTION, "options": SHORT})
        try:
            curl = await asyncio.create_subprocess_exec(
                *("curl", "-sN", f"{h.http_url}/api/chat", "-d", body), stdout=asyncio.subprocess.PIPE
            )
        except FileNotFoundError:
            pytest.skip("curl is not installed")
        out, _ = await asyncio.wait_for(curl.communicate(), LIMIT_S)
        said = [json.loads(line) for line in out.splitlines()]
        assert said[-1]["done"] is True
        assert said[-1]["eval_count"] == 5


async def test_a_page_of_this_machine() -> None:
    """Which pages may ask is judged by this service; the backend, which has rules of its own, is not told."""
    async with house(models=MODELS, with_http=True) as h, httpx.AsyncClient(timeout=LIMIT_S) as client:
        origin = {"origin": "http://localhost:3000"}
        asked = {**origin, "access-control-request-method": "POST"}
        assert (await client.options(f"{h.http_url}/api/chat", headers=asked)).status_code == 204
        body = {"model": "fake", "messages": QUESTION, "options": SHORT, "stream": False}
        answer = await client.post(f"{h.http_url}/api/chat", json=body, headers=origin)
        assert answer.status_code == 200
        assert answer.headers.get_list("access-control-allow-origin") == [origin["origin"]]
        assert "origin" not in h.fake.requests_to("/api/chat")[-1].headers
        other = {"origin": "https://elsewhere.example.org"}
        assert (await client.post(f"{h.http_url}/api/chat", json=body, headers=other)).status_code == 403
