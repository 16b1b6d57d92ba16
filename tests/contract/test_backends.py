"""What every backend promises: the same tests for Ollama's stand-in, for the embedded engine, and for a real Ollama.

A backend that cannot do, or cannot show, what a test is about skips it by name. The real Ollama is tested where
UNISONO_LIVE_OLLAMA gives its address (`make test-live`); UNISONO_LIVE_MODEL names the model, smollm2:135m by default.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import pytest_asyncio

from tests.engine import until_idle
from tests.fakes.ollama import FakeOllama
from unisono.adapters.embedded import EmbeddedBackend, EmbeddedCall
from unisono.adapters.ollama import OllamaBackend
from unisono.adapters.ollama.client import OllamaCall
from unisono.app.ports import Backend, HeldCall, ReleaseTimes
from unisono.core.errors import (
    BackendUnavailableError,
    ConnectionLostError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    PromptTooLongError,
    RefusedByBackendError,
    UnisonoError,
)
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Finished,
    FinishReason,
    Format,
    GenerateRequest,
    Item,
    Message,
    Options,
    PassMethod,
    Role,
    RunnerSpec,
    Spoke,
)

_T = TypeVar("_T")

# What every wait is bounded by: far more than any needs.
LIMIT_S = 60.0
# For how long a request is held where that is what a test is about.
HOLD_S = 1.5
KEEP_ALIVE_S = 60.0
LONG_PROMPT = "word " * 9_000
NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class World:
    """A backend, and what can be seen of it from outside."""

    backend: Backend
    model: str
    # Forward passes that it made so far; None where it does not tell.
    passes: Callable[[], Awaitable[int]] | None = None
    # Returns when it computes nothing; None where it does not tell.
    until_idle: Callable[[], Awaitable[None]] | None = None
    # Returns when somebody is being answered; None where it does not tell.
    until_busy: Callable[[], Awaitable[None]] | None = None
    # A schema that it refuses. Ollama takes any object, and where it is no schema it answers as if there were none.
    wrong_schema: str = "[1]"
    # Whether its answers follow a schema.
    follows_schemas: bool = True
    # Whether a request can name a model that it does not have.
    looks_at_models: bool = True
    can_unload: bool = True
    fake: FakeOllama | None = None

    async def runner(self) -> RunnerSpec:
        """The runner of its model."""
        model = await self.backend.find_model(self.model)
        return RunnerSpec(backend=self.backend.name, model=model.name, digest=model.digest)

    async def stage(self, item: Item, headers: Mapping[str, str] = NO_HEADERS) -> HeldCall:
        """A held request."""
        return await self.backend.stage(item, await self.runner(), headers)

    async def ask(self, item: Item) -> list[Spoke | Finished]:
        """A request that is released at once, and its answer."""
        call = await self.stage(item)
        _ = self.backend.release([call])
        return await answer_of(call)


def needs(value: _T | None, what: str) -> _T:
    """What a backend can show; skips the test by name where it cannot."""
    if value is None or value is False:
        pytest.skip(f"this backend does not {what}")
    return value


async def answer_of(call: HeldCall) -> list[Spoke | Finished]:
    """The whole answer."""
    async with asyncio.timeout(LIMIT_S):
        return [piece async for piece in call.answer()]


def ended(pieces: list[Spoke | Finished]) -> tuple[list[Spoke], Finished]:
    """An answer that is whole: pieces of text, then the end, and nothing after it."""
    *spoken, finished = pieces
    assert isinstance(finished, Finished)
    assert all(isinstance(piece, Spoke) for piece in spoken)
    return [piece for piece in spoken if isinstance(piece, Spoke)], finished


def options(num_predict: int = 6, **more: Any) -> Options:
    """Options of a short answer."""
    return Options(num_predict=num_predict, temperature=0.0, seed=1, **more)


def chat(text: str = "Tell me a story about the sea.", num_predict: int = 6, **more: Any) -> Item:
    """A conversation of one message."""
    request = ChatRequest(messages=(Message(role=Role.USER, content=text),), **more)
    return Item(item_id="a", index=0, request=request, options=options(num_predict))


def raw(text: str = "Once upon a time", num_predict: int = 6, **more: Any) -> Item:
    """A prompt as it is."""
    request = GenerateRequest(prompt=text, raw=True, **more)
    return Item(item_id="a", index=0, request=request, options=options(num_predict))


class Contract:
    """The tests."""

    async def test_it_says_what_it_is(self, world: World) -> None:
        """Its version proves that it answers; its address holds no credentials."""
        assert await world.backend.version()
        assert world.backend.name
        assert world.backend.kind in {"ollama", "embedded", "llama-server"}
        assert world.backend.url.startswith("http")
        assert "@" not in world.backend.url
        assert isinstance(world.backend.pass_method, PassMethod)

    async def test_models(self, world: World) -> None:
        """It lists its models, and finds one by its name, however that is written."""
        models = await world.backend.models()
        assert len({model.name for model in models}) == len(models)
        found = await world.backend.find_model(world.model)
        # Found by its name, it may tell more of itself than in the list.
        assert replace(found, kv_bytes_per_token=None) in models
        assert found.backend == world.backend.name
        assert found.digest
        assert await world.backend.find_model(f" {world.model.upper()} ") == found
        if len(models) == 1:
            assert await world.backend.find_model("") == found
        else:
            with pytest.raises(ModelNotFoundError, match="no model was named"):
                await world.backend.find_model("")

    async def test_an_unknown_model(self, world: World) -> None:
        """A model that it does not have is not found, and the error names it."""
        with pytest.raises(ModelNotFoundError, match="nothing-of-the-kind") as caught:
            await world.backend.find_model("nothing-of-the-kind:latest")
        assert caught.value.metadata["backend"] == world.backend.name

    async def test_load(self, world: World) -> None:
        """After a load the model is in memory; a second load finds it there, and is quick."""
        runner = await world.runner()
        first = await world.backend.load(runner, keep_alive_s=KEEP_ALIVE_S)
        assert first.duration_s >= 0
        (held,) = [one for one in await world.backend.loaded() if one.digest == runner.digest]
        assert held.model == runner.model
        assert held.slots == first.slots
        assert held.slots is None or held.slots > 0
        second = await world.backend.load(runner, keep_alive_s=KEEP_ALIVE_S)
        assert second.was_loaded
        assert second.slots == first.slots

    async def test_unload(self, world: World) -> None:
        """A model that is taken out of memory is not there any more; one that cannot be taken out stays."""
        runner = await world.runner()
        await world.backend.load(runner, keep_alive_s=KEEP_ALIVE_S)
        await world.backend.unload(runner)
        _ = needs(world.can_unload, "unload")
        async with asyncio.timeout(LIMIT_S):
            while any(one.digest == runner.digest for one in await world.backend.loaded()):
                pass

    async def test_nothing_is_computed_before_the_release(self, world: World) -> None:
        """A held request is a request that the backend has not begun."""
        passes = needs(world.passes, "tell its forward passes")
        before = await passes()
        call = await world.stage(chat())
        waiting = asyncio.ensure_future(call.wait_closed())
        for _ in range(20):
            await world.backend.version()
        assert await passes() == before
        assert not call.is_closed
        assert not waiting.done()
        _ = world.backend.release([call])
        async with asyncio.timeout(LIMIT_S):
            await waiting
        _, finished = ended(await answer_of(call))
        assert await passes() >= before + finished.usage.completion_tokens

    async def test_a_release_says_when(self, world: World) -> None:
        """The times of a release are those of this machine, and a wave goes out within a moment."""
        spreads: list[float] = []
        # The best of a few: on a busy machine another process may come between.
        while len(spreads) < 3 and (not spreads or min(spreads) > 0.005):
            calls = [await world.stage(chat(num_predict=1)) for _ in range(8)]
            before = time.time_ns()
            times = world.backend.release(calls)
            after = time.time_ns()
            assert before <= times.first_ns <= times.last_ns <= after
            assert times.spread_s == pytest.approx((times.last_ns - times.first_ns) / 1e9)
            spreads.append(times.spread_s)
            for pieces in await asyncio.gather(*map(answer_of, calls)):
                _ = ended(pieces)
        assert min(spreads) < 0.05

    async def test_a_release_of_nothing(self, world: World) -> None:
        """Nobody to release is no mistake, and neither is one who went away meanwhile."""
        assert isinstance(world.backend.release([]), ReleaseTimes)
        call = await world.stage(chat())
        call.abort()
        _ = world.backend.release([call])
        with pytest.raises(UnisonoError):
            await answer_of(call)

    @pytest.mark.parametrize("make", [chat, raw], ids=["chat", "raw"])
    async def test_an_answer(self, world: World, make: Callable[..., Item]) -> None:
        """Pieces in an order of time, the end last: text, reason, usage and durations that go together."""
        began_ns, began = time.time_ns(), time.monotonic()
        spoken, finished = ended(await world.ask(make(num_predict=6)))
        took_s = time.monotonic() - began
        assert "".join(piece.content for piece in spoken)
        times = [*(piece.at_ns for piece in spoken), finished.at_ns]
        assert all(before <= after for before, after in pairwise(times))
        assert began_ns - 1e9 < times[0]
        assert times[-1] < time.time_ns() + 1e9
        assert finished.finish_reason is FinishReason.LENGTH
        assert finished.finish_reason_raw == "length"
        assert finished.model == (await world.runner()).model
        assert finished.usage.completion_tokens == 6
        assert finished.usage.prompt_tokens > 0
        cached = finished.usage.cached_prompt_tokens
        assert cached is None or 0 <= cached <= finished.usage.prompt_tokens
        spent = finished.durations
        assert spent.total_s is not None
        assert spent.prompt_eval_s is not None
        assert spent.eval_s is not None
        assert 0 <= spent.total_s <= took_s + 0.05
        assert 0 <= spent.prompt_eval_s + spent.eval_s <= spent.total_s + 0.05
        assert spent.slot_wait_s is not None

    async def test_the_same_question_twice(self, world: World) -> None:
        """A prompt as part of a conversation, or as one, is the same question to the same model."""
        told = Item(
            item_id="a", index=0, request=GenerateRequest(prompt="Tell me a story about the sea."), options=options()
        )
        told_text = [piece.content for piece in ended(await world.ask(told))[0]]
        assert "".join(told_text)
        assert len(told_text) == len(ended(await world.ask(chat()))[0])

    async def test_log_probabilities(self, world: World) -> None:
        """They come where they are asked for, one for each token, with as many alternatives as were asked for."""
        for make in (chat, raw):
            for top in (0, 2):
                spoken, _ = ended(await world.ask(make(num_predict=3, top_logprobs=top)))
                tokens = [token for piece in spoken for token in piece.logprobs]
                assert len(tokens) == 3
                assert "".join(token.token for token in tokens) == "".join(piece.content for piece in spoken)
                assert all(token.logprob <= 0 for token in tokens)
                assert {len(token.top) for token in tokens} == {top}
            assert not any(piece.logprobs for piece in ended(await world.ask(make(num_predict=3)))[0])

    async def test_held_time_is_not_in_the_durations(self, world: World) -> None:
        """However long a request was held, its durations begin with the release."""
        await world.backend.load(await world.runner(), keep_alive_s=KEEP_ALIVE_S)
        call = await world.stage(chat(num_predict=4))
        await asyncio.sleep(HOLD_S)  # what is measured, not what is waited for
        assert not call.is_closed
        began = time.monotonic()
        _ = world.backend.release([call])
        _, finished = ended(await answer_of(call))
        took_s = time.monotonic() - began
        assert finished.durations.total_s is not None
        assert finished.durations.total_s <= took_s + 0.05
        assert (finished.durations.load_s or 0.0) <= took_s + 0.05
        assert (finished.durations.slot_wait_s or 0.0) <= took_s + 0.05

    async def test_abort_while_held(self, world: World) -> None:
        """Its connection is closed, it has no answer, and nothing was computed for it."""
        call = await world.stage(chat(num_predict=200))
        waiting = asyncio.ensure_future(call.wait_closed())
        call.abort()
        call.abort()
        async with asyncio.timeout(LIMIT_S):
            await waiting
        assert call.is_closed
        with pytest.raises(UnisonoError):
            await answer_of(call)
        await needs(world.until_idle, "tell its busy slots")()

    async def test_abort_after_the_release(self, world: World) -> None:
        """Aborted before anybody reads, it gives its slot back."""
        until_idle = needs(world.until_idle, "tell its busy slots")
        call = await world.stage(chat(num_predict=500))
        _ = world.backend.release([call])
        await needs(world.until_busy, "tell its busy slots")()
        call.abort()
        await until_idle()
        with pytest.raises(UnisonoError):
            await answer_of(call)

    async def test_abort_while_it_speaks(self, world: World) -> None:
        """Aborted in the middle, the reader is told, and the slot is free again."""
        call = await world.stage(chat(num_predict=500))
        _ = world.backend.release([call])
        pieces = call.answer()
        async with asyncio.timeout(LIMIT_S):
            assert isinstance(await anext(pieces), Spoke)
        call.abort()
        with suppress(ConnectionLostError):
            async with asyncio.timeout(LIMIT_S):
                told = [piece async for piece in pieces]
            # Only where all of it had arrived before the abort.
            assert isinstance(told[-1], Finished)
        assert call.is_closed
        await needs(world.until_idle, "tell its busy slots")()

    async def test_closing_the_answer_early(self, world: World) -> None:
        """A reader that has read enough closes the iterator, and with it the connection."""
        call = await world.stage(chat(num_predict=500))
        _ = world.backend.release([call])
        pieces = call.answer()
        async with asyncio.timeout(LIMIT_S):
            assert isinstance(await anext(pieces), Spoke)
        await pieces.aclose()
        assert call.is_closed
        await needs(world.until_idle, "tell its busy slots")()

    async def test_cancelling_the_reader(self, world: World) -> None:
        """A reader that is cancelled closes the connection."""
        call = await world.stage(chat(num_predict=500))
        _ = world.backend.release([call])
        has_begun = asyncio.Event()

        async def read() -> None:
            async for _ in call.answer():
                has_begun.set()

        reader = asyncio.ensure_future(read())
        async with asyncio.timeout(LIMIT_S):
            await has_begun.wait()
        _ = reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert call.is_closed
        await needs(world.until_idle, "tell its busy slots")()

    async def test_a_second_answer_is_impossible(self, world: World) -> None:
        """An answer is read once: a second reader gets an error and not a word."""
        call = await world.stage(chat())
        _ = world.backend.release([call])
        _ = ended(await answer_of(call))
        pieces: list[Spoke | Finished] = []
        with pytest.raises(UnisonoError):
            pieces += await answer_of(call)
        assert pieces == []

    async def test_an_unknown_model_in_a_request(self, world: World) -> None:
        """A model that went away after it was found fails the item that asks for it."""
        _ = needs(world.looks_at_models, "look at the model's name in a request")
        runner = replace(await world.runner(), model="nothing-of-the-kind:latest", digest="none")
        call = await world.backend.stage(chat(), runner, {})
        _ = world.backend.release([call])
        with pytest.raises(ModelNotFoundError):
            await answer_of(call)
        with pytest.raises(ModelNotFoundError):
            await world.backend.load(runner, keep_alive_s=KEEP_ALIVE_S)

    async def test_a_prompt_that_is_too_long(self, world: World) -> None:
        """It is refused as what it is, and never silently cut."""
        for item in (chat(LONG_PROMPT), raw(LONG_PROMPT)):
            with pytest.raises(PromptTooLongError):
                await world.ask(item)

    async def test_a_wrong_schema(self, world: World) -> None:
        """A schema that is none fails its item, for good."""
        with pytest.raises(RefusedByBackendError):
            await world.ask(chat(format=Format(json_schema=world.wrong_schema)))

    async def test_an_answer_by_a_schema(self, world: World) -> None:
        """What a schema asks for can be parsed by it."""
        _ = needs(world.follows_schemas, "follow schemas")
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        }
        spoken, _ = ended(await world.ask(chat("Name a city.", 80, format=Format(json_schema=json.dumps(schema)))))
        assert set(json.loads("".join(piece.content for piece in spoken))) == {"city"}

    async def test_what_the_model_cannot_do(self, world: World) -> None:
        """A model that does not embed fails what wants an embedding, for good."""
        item = Item(item_id="a", index=0, request=EmbedRequest(input=("a",)))
        with pytest.raises(ModelLacksCapabilityError):
            await world.ask(item)

    async def test_headers_go_with_the_request(self, world: World) -> None:
        """The trace context that was given reaches the backend."""
        fake = needs(world.fake, "tell what it received")
        call = await world.stage(chat(), {"traceparent": "00-1234-5678-01"})
        _ = world.backend.release([call])
        _ = ended(await answer_of(call))
        assert fake.requests_to("/api/chat")[-1].traceparent == "00-1234-5678-01"

    async def test_requests_leave_in_the_order_of_the_release(self, world: World) -> None:
        """Whatever the order in which they were staged: the first is released first."""
        staged = [await world.stage(chat(num_predict=2)) for _ in range(4)]
        ordered = [staged[place] for place in (2, 0, 3, 1)]
        times = world.backend.release(ordered)
        left: list[float] = []
        for call in ordered:
            assert isinstance(call, OllamaCall | EmbeddedCall)
            assert call.exchange.released_at is not None
            left.append(call.exchange.released_at)
        assert left == sorted(left)
        assert len(set(left)) > 1
        assert left[-1] - left[0] <= times.spread_s + 0.001
        for pieces in await asyncio.gather(*map(answer_of, ordered)):
            _ = ended(pieces)

    async def test_requests_released_together_share_their_passes(self, world: World) -> None:
        """Two answers take fewer passes than they have tokens."""
        passes = needs(world.passes, "tell its forward passes")
        await world.backend.load(await world.runner(), keep_alive_s=KEEP_ALIVE_S)
        calls = [await world.stage(chat(text, 24)) for text in ("Count to ten.", "Name some colours.")]
        before = await passes()
        _ = world.backend.release(calls)
        answers = [ended(pieces) for pieces in await asyncio.gather(*map(answer_of, calls))]
        tokens = sum(finished.usage.completion_tokens for _, finished in answers)
        assert tokens > 24
        assert await passes() - before <= tokens * 0.75

    async def test_many_held_requests(self, world: World) -> None:
        """Far more requests than slots are held without harm to the short calls, and all are answered."""
        calls = [await world.stage(chat(num_predict=2)) for _ in range(40)]
        async with asyncio.timeout(LIMIT_S):
            assert await world.backend.version()
        _ = world.backend.release(calls)
        for pieces in await asyncio.gather(*map(answer_of, calls)):
            _, finished = ended(pieces)
            assert finished.usage.completion_tokens > 0


@pytest.mark.asyncio(loop_scope="session")
class TestStandIn(Contract):
    """Ollama's adapter, against the stand-in."""

    @pytest_asyncio.fixture(loop_scope="session")
    async def world(self) -> AsyncGenerator[World, None]:
        """A stand-in with four slots."""
        async with FakeOllama(num_parallel=4, pass_s=0.002) as fake:
            backend = OllamaBackend(url=fake.url)

            async def passes() -> int:
                return fake.passes

            yield World(
                backend=backend,
                model="fake",
                passes=passes,
                until_idle=lambda: fake.wait_for(lambda f: f.busy_slots == 0 and f.open_connections == 0, LIMIT_S),
                until_busy=lambda: fake.wait_for(lambda f: f.busy_slots > 0, LIMIT_S),
                follows_schemas=False,
                fake=fake,
            )
            await backend.close()
            await fake.wait_for(lambda f: f.open_connections == 0)

    async def test_a_backend_that_is_away(self, world: World) -> None:
        """Where nobody listens, everything says that the backend is unavailable."""
        fake = needs(world.fake, "go away")
        runner = await world.runner()
        await fake.go_away()
        for call in (
            world.backend.version(),
            world.backend.models(),
            world.backend.loaded(),
            world.backend.load(runner, keep_alive_s=KEEP_ALIVE_S),
            world.backend.stage(chat(), runner, {}),
        ):
            with pytest.raises(BackendUnavailableError):
                await call
        await fake.come_back()
        assert await world.backend.version()


@pytest.mark.embedded
@pytest.mark.asyncio(loop_scope="session")
class TestEmbedded(Contract):
    """The embedded engine, and with it the adapter of llama.cpp's server."""

    @pytest.fixture
    def world(self, embedded_backend: EmbeddedBackend) -> World:
        """The engine of this run of tests."""

        async def passes() -> int:
            return int((await embedded_backend.engine_counters())["n_decode_total"])

        async def until_busy() -> None:
            async with asyncio.timeout(LIMIT_S):
                while not await embedded_backend.busy_slots():
                    pass

        return World(
            backend=embedded_backend,
            model="smollm2:135m",
            passes=passes,
            until_idle=lambda: until_idle(embedded_backend),
            until_busy=until_busy,
            wrong_schema='{"type": "foo"}',
            looks_at_models=False,
            can_unload=False,
        )


@pytest.mark.live
@pytest.mark.asyncio(loop_scope="session")
class TestOllama(Contract):
    """Ollama's adapter, against a real Ollama."""

    @pytest_asyncio.fixture(loop_scope="session")
    async def world(self) -> AsyncGenerator[World, None]:
        """The Ollama whose address is in UNISONO_LIVE_OLLAMA."""
        url = os.environ.get("UNISONO_LIVE_OLLAMA", "")
        if not url:
            pytest.skip("UNISONO_LIVE_OLLAMA is not set")
        backend = OllamaBackend(url=url)
        yield World(backend=backend, model=os.environ.get("UNISONO_LIVE_MODEL", "smollm2:135m"))
        await backend.close()
