"""The chat model, with the real langchain-core, over a service in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed")

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool

from tests.clients.served import service_at
from tests.fakes.ollama import FakeOllama
from unisono_client import Client, ItemError, UnisonoError
from unisono_client.gathered import Gathered
from unisono_client.langchain import ChatUnisono
from unisono_client.langchain_messages import to_messages

PIXEL = base64.b64encode(b"\x89PNG").decode()


class Backend:
    """A stand-in in a thread of this process, so that what it received can be looked at."""

    def __init__(self) -> None:
        self.fake: FakeOllama
        self.url = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._done: asyncio.Event
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        self._done = asyncio.Event()
        async with FakeOllama(num_parallel=8, pass_s=0.002) as self.fake:
            self.url = self.fake.url
            self._ready.set()
            _ = await self._done.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        _ = self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        _ = self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)
        self._loop.close()

    def bodies(self, word: str) -> list[Any]:
        """What was asked with this word in it."""
        return [request.body for request in self.fake.requests if word in str(request.body)]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """The stand-in."""
    with Backend() as made:
        yield made


@pytest.fixture(scope="module")
def target(backend: Backend) -> Iterator[str]:
    """A service over it."""
    with service_at(backend.url, settings={"default_model": "fake"}) as found:
        yield found


@pytest.fixture
def model(target: str) -> ChatUnisono:
    """The chat model."""
    return ChatUnisono(target=target, model="fake", options={"temperature": 0})


class Heard(BaseCallbackHandler):
    """Counts what callbacks are told."""

    def __init__(self) -> None:
        self.started = 0
        self.ended = 0
        self.tokens: list[str] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        """A run begins."""
        self.started += 1

    def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        """A piece of text."""
        self.tokens.append(str(token))

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        """A run ends."""
        self.ended += 1


def batches(messages: list[AIMessage]) -> set[bool]:
    """Whether answers shared their forward passes with others of the batch."""
    return {message.response_metadata["shared_with"] > 0 for message in messages}


def test_a_batch_is_one_batch(model: ChatUnisono) -> None:
    """40 inputs are one batch of the service, which shares their passes; answers are in order, callbacks are told."""
    heard = Heard()
    answers = model.batch([f"[[tokens=20]] {n}" for n in range(40)], config={"callbacks": [heard]})
    assert len({answer.text for answer in answers}) == 40
    assert batches(answers) == {True}
    assert (heard.started, heard.ended) == (40, 40)
    assert answers[0].usage_metadata is not None
    assert answers[0].usage_metadata["output_tokens"] == 21
    assert answers[0].response_metadata["finish_reason"] == "stop"
    assert model.batch([]) == []
    said = model.batch([f"[[say=answer {n}]]" for n in range(5)])
    assert [answer.content for answer in said] == [f"answer {n}" for n in range(5)]


async def test_the_number_at_a_time_is_the_batchs(model: ChatUnisono, backend: Backend) -> None:
    """`max_concurrency` of a config: no more run at one time; 1 means that no pass is shared."""
    answers = await model.abatch([f"[[tokens=9]] {n}" for n in range(6)], config={"max_concurrency": 1})
    assert batches(answers) == {False}


async def test_an_item_that_fails(model: ChatUnisono) -> None:
    """Its error is raised, or returned in its place; the batch's others are answered."""
    inputs: list[LanguageModelInput] = ["[[say=one]]", "[[crash]]", "[[say=three]]"]
    one, two, three = await model.abatch(inputs, return_exceptions=True)
    assert (one.content, three.content) == ("one", "three")
    assert isinstance(two, ItemError)
    with pytest.raises(ItemError):
        _ = await model.abatch(inputs)
    with pytest.raises(ItemError, match="MODEL_NOT_FOUND"):
        _ = ChatUnisono(target=model.target, model="nosuch").invoke("x")


async def test_one_at_a_time_and_streamed(model: ChatUnisono) -> None:
    """invoke, ainvoke, stream and astream; tokens are told to callbacks."""
    assert model.invoke("[[say=Rome]]").content == "Rome"
    assert (await model.ainvoke([SystemMessage("Be brief."), HumanMessage("[[say=Rome]]")])).content == "Rome"
    heard = Heard()
    chunks = list(model.stream("[[tokens=60]]", config={"callbacks": [heard]}))
    assert len(chunks) > 1
    whole = chunks[0]
    for each in chunks[1:]:
        whole += each
    assert whole.content == model.invoke("[[tokens=60]]").content == "".join(heard.tokens)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 61
    assert "".join([str(each.content) async for each in model.astream("[[tokens=60]]")]) == whole.content
    with pytest.raises(ItemError):
        _ = list(model.stream("[[crash]]"))


def test_many_threads(model: ChatUnisono) -> None:
    """A pool of threads that ask at about the same time: each has its own answer."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(model.invoke, [f"[[say=answer {n}]]" for n in range(30)]))
    assert [answer.content for answer in answers] == [f"answer {n}" for n in range(30)]


async def test_a_chain(model: ChatUnisono) -> None:
    """A prompt, the model and a parser: the chain's abatch goes through one batch."""
    chain = ChatPromptTemplate.from_messages([("system", "You know."), ("human", "[[say={word}]]")]) | model
    parsed = chain | StrOutputParser()
    assert await parsed.abatch([{"word": "one"}, {"word": "two"}]) == ["one", "two"]
    assert parsed.batch([{"word": "three"}, {"word": "four"}]) == ["three", "four"]


def test_tools_stop_and_options(model: ChatUnisono, backend: Backend) -> None:
    """Bound tools are called; `stop` and options reach the backend, the model's and the call's."""

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    with_tools = ChatUnisono(target=model.target, model="fake-tools").bind_tools([weather])
    answer = with_tools.invoke('[[tool=weather {"city": "Rome"}]]')
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
    follow_up = [HumanMessage("?"), answer, ToolMessage("sunny", tool_call_id=call["id"] or "c", name="weather")]
    assert with_tools.invoke([*follow_up, HumanMessage("[[say=fine]]")]).content == "fine"
    _ = model.invoke("unheard-of", stop=["END"], num_predict=3, format="json")
    (body,) = backend.bodies("unheard-of")
    assert body["options"]["stop"] == ["END"]
    assert (body["options"]["num_predict"], body["options"]["temperature"], body["format"]) == (3, 0, "json")


def test_messages() -> None:
    """Every kind of message and content that the contract knows; others are refused by name."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    given = [
        SystemMessage("s"),
        HumanMessage(["a", {"type": "text", "text": "b"}, picture, {"type": "image", "base64": PIXEL}]),
        AIMessage("c", tool_calls=[{"name": "f", "args": {"x": 1}, "id": "1"}]),
        ToolMessage("d", tool_call_id="1", name="f"),
        ChatMessage(content="e", role="user"),
    ]
    system, human, assistant, answer, other = to_messages(given)
    assert (system.role, human.content, list(human.images)) == ("system", "ab", [b"\x89PNG"] * 2)
    assert assistant.tool_calls[0].arguments == {"x": 1}
    assert (answer.role, answer.tool_name, answer.tool_call_id) == ("tool", "f", "1")
    assert other.role == "user"
    with pytest.raises(ValueError, match="function"):
        _ = to_messages([FunctionMessage(content="x", name="f")])
    with pytest.raises(ValueError, match="audio"):
        _ = to_messages([HumanMessage([{"type": "audio"}])])
    with pytest.raises(ValueError, match="not opened"):
        _ = to_messages([HumanMessage([{"type": "image_url", "image_url": "http://example.com/a.png"}])])


async def test_what_ends_a_batch_ends_each_input(model: ChatUnisono) -> None:
    """A call that the service refuses: every input has the reason."""
    refused = ChatUnisono(target=model.target, config={"max_attempts": 99})
    for each in await refused.abatch(["x", "y"], return_exceptions=True):
        assert isinstance(each, UnisonoError)
        assert each.reason == "INVALID_REQUEST"
    with pytest.raises(UnisonoError):
        _ = refused.batch(["x", "y"])


async def test_who_asks_late_hears_of_the_end(target: str) -> None:
    """An input that comes when its batch has ended already has the reason too, and does not wait for ever."""
    async with (
        asyncio.timeout(20),
        Client(target) as client,
        Gathered(client, {"max_attempts": 99}, 2) as gathered,
    ):
        with pytest.raises(UnisonoError) as first:
            _ = await gathered.ask("x")
        with pytest.raises(UnisonoError) as second:
            _ = await gathered.ask("y")
    assert first.value.reason == second.value.reason == "INVALID_REQUEST"


def test_what_would_do_nothing_is_refused() -> None:
    """An option beside `options`, a misspelt field, a choice that nobody makes: each says what is right."""
    with pytest.raises(ValueError, match=r"options=\{'temperature'"):
        _ = ChatUnisono(temperature=0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="'temprature' is not known"):
        _ = ChatUnisono(temprature=0)  # type: ignore[call-arg]
    schema = {"name": "weather", "description": "tells it", "parameters": {"type": "object", "properties": {}}}
    forced: tuple[tuple[str, Any], ...] = (("tool_choice", "weather"), ("strict", True))
    for name, value in forced:
        with pytest.raises(ValueError, match=name):
            _ = ChatUnisono().bind_tools([schema], **{name: value})
        with pytest.raises(ValueError, match=name):
            _ = ChatUnisono().invoke("x", **{name: value})
    _ = ChatUnisono().bind_tools([schema], tool_choice="auto")
    _ = ChatUnisono().with_structured_output({**schema, "title": "weather"})
