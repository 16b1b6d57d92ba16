"""Every recorded answer of a real Ollama is read rightly, and no cut of it is taken for a whole one."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.adapters.raw_server import STREAM_HEAD, Connection, RawServer, chunked, raw_server
from tests.unit.adapters.wire import NAMES, OWN, Recording, recording
from unisono.adapters.ollama import OllamaBackend
from unisono.adapters.ollama.answer import AnswerReader, EmbeddingReader, TextReader
from unisono.core.errors import (
    BackendBusyError,
    ConnectionLostError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    PromptTooLongError,
    RefusedByBackendError,
    RunnerDiedError,
    UnisonoError,
)
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Finished,
    FinishReason,
    GenerateRequest,
    Item,
    Message,
    Role,
    RunnerSpec,
    Spoke,
    ToolCall,
)

NOW_NS = 1_700_000_000_000_000_000
RUNNER = RunnerSpec(backend="here", model="smollm2:135m", digest="d")


@dataclass(frozen=True)
class Told:
    """What a recorded answer must be read as."""

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    pieces: int = 1
    reason: FinishReason = FinishReason.LENGTH
    raw: str = "length"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # total, load, prompt, eval; in nanoseconds as recorded; None where the recording has none
    durations: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    logprobs: int = 0
    embeddings: tuple[array[float], ...] = ()
    model: str = "smollm2:135m"


STOP: dict[str, Any] = {"reason": FinishReason.STOP, "raw": "stop"}
PARIS: dict[str, Any] = {"content": "The capital of France is Paris", "completion_tokens": 6}
WEATHER = (ToolCall(id="call_dszni8al", name="get_weather", arguments_json='{"city":"Paris"}'),)
HELLO = array("f", [7.021761e-05, 0.016019173, -0.015232605, 0.023397427])
WORLD = array("f", [0.021175582, 0.10222694, 0.0118161915, 0.100665525])

TOLD: dict[str, Told] = {
    "chat": Told(**PARIS, prompt_tokens=16, durations=(70220967, 1000845, 11415000, 54829000)),
    "chat_stream": Told(**PARIS, pieces=6, prompt_tokens=16, durations=(121838385, 1289873, 59010000, 58461000)),
    "chat_stop": Told(
        content="The capital of France is Paris.",
        **STOP,
        prompt_tokens=16,
        completion_tokens=8,
        durations=(97034468, 1541195, 12239000, 80327000),
    ),
    "chat_format_json": Told(
        content='{\n  "name": "Paris",\n  "population": 1,\n  "capital": "Paris",\n'
        '  "population_density": 1,\n  "population_density_per_square',
        prompt_tokens=17,
        completion_tokens=40,
        durations=(491551900, 1145884, 22080000, 465497000),
    ),
    "chat_format_schema": Told(
        content='{\n  "capital": "Paris"\n}',
        **STOP,
        prompt_tokens=17,
        completion_tokens=11,
        durations=(378055291, 1407892, 53364000, 114343000),
    ),
    "chat_logprobs": Told(
        content="Hello there",
        logprobs=2,
        prompt_tokens=12,
        completion_tokens=2,
        durations=(58482586, 1829992, 36891000, 11701000),
    ),
    "chat_thinking": Told(
        thinking="The answer is 4.",
        **STOP,
        model="t-think",
        prompt_tokens=20,
        completion_tokens=8,
        durations=(96292454, 772255, 12994000, 79887000),
    ),
    "chat_thinking_stream": Told(
        thinking="The answer is 4.",
        pieces=6,
        **STOP,
        model="t-think",
        prompt_tokens=20,
        completion_tokens=8,
        durations=(103599771, 1328785, 11974000, 84389000),
    ),
    "chat_tool_call": Told(
        tool_calls=WEATHER,
        reason=FinishReason.TOOL_CALLS,
        raw="stop",
        model="t-tools",
        prompt_tokens=199,
        completion_tokens=18,
        durations=(919619662, 23186745, 683193000, 206674000),
    ),
    "chat_tool_call_stream": Told(
        tool_calls=(ToolCall(id="call_dwmmm55f", name="get_weather", arguments_json='{"city":"Paris"}'),),
        reason=FinishReason.TOOL_CALLS,
        raw="stop",
        model="t-tools",
        prompt_tokens=199,
        completion_tokens=18,
        durations=(246946388, 1502075, 12363000, 225173000),
    ),
    "embed": Told(
        pieces=0,
        reason=FinishReason.EMBEDDED,
        raw="",
        model="t-emb",
        prompt_tokens=7,
        durations=(34194027, 1034347, None, None),
        embeddings=(HELLO, WORLD),
    ),
    "embed_one": Told(
        pieces=0,
        reason=FinishReason.EMBEDDED,
        raw="",
        model="t-emb",
        prompt_tokens=3,
        durations=(6412941, 1225470, None, None),
        embeddings=(HELLO,),
    ),
    "embed_dimensions": Told(
        pieces=0,
        reason=FinishReason.EMBEDDED,
        raw="",
        model="t-emb",
        prompt_tokens=3,
        durations=(9612670, 897682, None, None),
        embeddings=(array("f", [0.0021814595, 0.4976697, -0.47323328, 0.72689086]),),
    ),
    "embed_empty": Told(pieces=0, reason=FinishReason.EMBEDDED, raw="", model="t-emb"),
    "load_embed": Told(pieces=0, reason=FinishReason.EMBEDDED, raw="", model="t-emb"),
    "error_option_unknown": Told(
        content='"It', prompt_tokens=10, completion_tokens=2, durations=(49752339, 1691353, 29805000, 11604000)
    ),
    "error_role": Told(
        content="This behavior",
        prompt_tokens=10,
        completion_tokens=2,
        durations=(58888704, 4131903, 39285000, 12197000),
    ),
    "generate": Told(**PARIS, prompt_tokens=14, durations=(73235554, 1404589, 11775000, 57061000)),
    "generate_raw": Told(
        content=" Paris.\n\nThe United",
        prompt_tokens=5,
        completion_tokens=6,
        durations=(85543435, 1841305, 24698000, 56661000),
    ),
    "generate_stream": Told(**PARIS, pieces=6, prompt_tokens=14, durations=(108995349, 1631396, 42300000, 60870000)),
    # Its first line is empty: the token that opens the thinking, which counts as a piece.
    "generate_thinking_stream": Told(
        thinking="The answer is ",
        pieces=5,
        model="t-think",
        prompt_tokens=20,
        completion_tokens=5,
        durations=(64689041, 1309095, 11270000, 48868000),
    ),
    "load": Told(pieces=0, reason=FinishReason.UNKNOWN, raw="load"),
    "unload": Told(pieces=0, reason=FinishReason.UNKNOWN, raw="unload"),
    "ps_empty": Told(pieces=0, reason=FinishReason.UNKNOWN, raw="unload"),
    "long_prompt_truncated": Told(
        pieces=0,
        **STOP,
        prompt_tokens=258,
        completion_tokens=1,
        durations=(1449953948, 534371348, 896334000, 1000),
    ),
}

FAILED: dict[str, type[UnisonoError]] = {
    "embed_bad": RefusedByBackendError,
    "embed_unsupported": ModelLacksCapabilityError,
    "error_embedding_chat": ModelLacksCapabilityError,
    "error_empty": RefusedByBackendError,
    "error_format": RefusedByBackendError,
    "error_image": ModelLacksCapabilityError,
    "error_image_bad": RefusedByBackendError,
    "error_json": RefusedByBackendError,
    "error_method": RefusedByBackendError,
    "error_model_empty": RefusedByBackendError,
    "error_model_missing": ModelNotFoundError,
    "error_model_missing_stream": ModelNotFoundError,
    "error_model_name": ModelNotFoundError,
    "error_option_type": RefusedByBackendError,
    "error_path": RefusedByBackendError,
    "error_think": ModelLacksCapabilityError,
    "error_tools": ModelLacksCapabilityError,
    "long_prompt_refused": PromptTooLongError,
    "queue_full": BackendBusyError,
    "runner_killed": RunnerDiedError,
    "runner_killed_stream": RunnerDiedError,
}

# Read by the calls that tell of models: test_ollama_client.py.
OTHERS = {"ps_none", "ps_one", "show", "tags", "version"}


def test_every_recording_is_expected_here() -> None:
    """A recording that is added must be given a meaning."""
    assert {*TOLD, *FAILED, *OTHERS} == set(OWN)
    assert len(NAMES) > len(OWN)


def item(of: Recording) -> Item:
    """An item whose answer is of this recording's kind."""
    texts = of.request.get("input") if isinstance(of.request, dict) else None
    kinds: dict[str, ChatRequest | GenerateRequest | EmbedRequest] = {
        "/api/generate": GenerateRequest(prompt="p"),
        # As many texts as were sent: the answer has a vector for each.
        "/api/embed": EmbedRequest(input=(texts,) if isinstance(texts, str) else tuple(texts or ())),
    }
    chat = ChatRequest(messages=(Message(role=Role.USER, content="hi"),))
    return Item(item_id="a", index=0, request=kinds.get(of.path, chat))


def reader_for(of: Recording, held_s: float = 0.0) -> AnswerReader:
    """A reader of this recording's kind."""
    kind = EmbeddingReader if of.path == "/api/embed" else TextReader
    return kind(backend="here", model="smollm2:135m", held_s=lambda: held_s, now_ns=lambda: NOW_NS)


def read(of: Recording, chunks: list[bytes]) -> list[Spoke | Finished]:
    """What a reader says that is fed with these chunks; raises what it raises."""
    reader = reader_for(of)
    pieces: list[Spoke | Finished] = []
    for chunk in chunks:
        pieces += reader.feed(chunk)
    pieces += reader.end() if not reader.is_done else ()
    return pieces


def check(pieces: list[Spoke | Finished], told: Told) -> None:
    """Holds what was read against what was recorded."""
    *spoken, last = pieces
    assert isinstance(last, Finished)
    said = [piece for piece in spoken if isinstance(piece, Spoke)]
    assert len(said) == len(spoken) == told.pieces
    assert "".join(s.content for s in said) == told.content
    assert "".join(s.thinking for s in said) == told.thinking
    assert tuple(call for s in said for call in s.tool_calls) == told.tool_calls
    assert sum(len(s.logprobs) for s in said) == told.logprobs
    assert (last.finish_reason, last.finish_reason_raw, last.model) == (told.reason, told.raw, told.model)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (told.prompt_tokens, told.completion_tokens)
    assert last.usage.cached_prompt_tokens is None
    spans = last.durations
    assert (spans.total_s, spans.load_s, spans.prompt_eval_s, spans.eval_s) == tuple(
        None if ns is None else pytest.approx(ns / 1e9) for ns in told.durations
    )
    assert last.embeddings == told.embeddings
    times = [piece.at_ns for piece in pieces]
    assert times == sorted(times)


@pytest.mark.parametrize("name", TOLD)
def test_recorded_answers_are_read(name: str) -> None:
    """Text, thinking, calls, counts, durations and reasons of each recording, in one chunk and in one-byte chunks."""
    of = recording(name)
    check(read(of, [of.body]), TOLD[name])
    check(read(of, [of.body[i : i + 1] for i in range(len(of.body))]), TOLD[name])


@pytest.mark.parametrize("name", ["chat_stream", "generate_thinking_stream", "chat_tool_call_stream", "embed"])
def test_answers_read_the_same_however_they_are_cut_into_chunks(name: str) -> None:
    """The network's cuts are no boundaries of anything."""
    of = recording(name)

    @given(st.lists(st.integers(0, len(of.body)), max_size=40))
    def any_slices(cuts: list[int]) -> None:
        edges = sorted({0, *cuts, len(of.body)})
        check(read(of, [of.body[a:b] for a, b in pairwise(edges)]), TOLD[name])

    any_slices()


@pytest.mark.parametrize("name", TOLD)
def test_no_cut_of_a_recorded_answer_is_whole(name: str) -> None:
    """Cut at any byte, an answer ends in an error, except where all of its last line was there."""
    of = recording(name)
    whole = len(of.body.rstrip(b"\n"))
    for length in range(len(of.body) + 1):
        reader = reader_for(of)
        pieces = [*reader.feed(of.body[:length])]
        if not reader.is_done:
            pieces += reader.cut()
        is_whole = length >= whole and of.path != "/api/embed"
        assert isinstance(pieces[-1] if pieces else None, Finished) == is_whole
        assert sum(isinstance(piece, Finished) for piece in pieces) == is_whole
        if is_whole:
            check(pieces, TOLD[name])


@pytest.mark.parametrize("name", [name for name in TOLD if TOLD[name].pieces or "embed" in name])
def test_an_answer_that_ends_in_order_but_early_is_lost(name: str) -> None:
    """A body that is over at any byte before "done" is never an answer, and never anything but a known error."""
    of = recording(name)
    for length in range(len(of.body.rstrip(b"\n"))):
        with pytest.raises(UnisonoError) as caught:
            read(of, [of.body[:length]])
        assert caught.value.is_retryable


# -- Through a real connection -------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    """A server that says what a test gives it."""
    async with raw_server() as running:
        yield running


def http(of: Recording) -> bytes:
    """A recorded answer as it went over the wire: a stream in one chunk a line, anything else by its length."""
    if of.is_stream:
        return STREAM_HEAD + chunked(*of.body.splitlines(keepends=True))
    head = f"HTTP/1.1 {of.status} Whatever\r\nContent-Length: {len(of.body)}\r\n\r\n"
    return head.encode() + of.body


async def ask(server: RawServer, of: Recording, answer: bytes, *, then_reset: bool = False) -> list[Spoke | Finished]:
    """Asks the server, which gives this answer and closes."""
    pieces, error = await ask_or_fail(server, of, answer, then_reset=then_reset)
    if error is not None:
        raise error
    return pieces


async def ask_or_lose(
    server: RawServer, of: Recording, answer: bytes, *, then_reset: bool
) -> tuple[list[Spoke | Finished], bool]:
    """The pieces that came, and whether the connection was lost."""
    pieces, error = await ask_or_fail(server, of, answer, then_reset=then_reset)
    if error is not None and not isinstance(error, ConnectionLostError):
        raise error
    return pieces, error is not None


async def ask_or_fail(
    server: RawServer, of: Recording, answer: bytes, *, then_reset: bool = False
) -> tuple[list[Spoke | Finished], UnisonoError | None]:
    """The pieces that came, and the error that ended them."""

    async def say(seen: Connection) -> None:
        await seen.until_whole()
        await seen.say(answer)
        if then_reset:
            seen.reset()
        else:
            seen.close()

    server.handler = say
    backend = OllamaBackend(name="here", url=f"127.0.0.1:{server.port}", now_ns=lambda: NOW_NS)
    pieces: list[Spoke | Finished] = []
    try:
        call = await backend.stage(item(of), RUNNER, {})
        backend.release([call])
        async for piece in call.answer():
            pieces.append(piece)  # noqa: PERF401 - what came before an error is looked at
    except UnisonoError as error:
        return pieces, error
    finally:
        await backend.close()
    return pieces, None


@pytest.mark.parametrize("name", TOLD)
async def test_recorded_answers_over_a_connection(server: RawServer, name: str) -> None:
    """As above, through the whole of the adapter; held times are too short here to change a duration."""
    of = recording(name)
    pieces = await ask(server, of, http(of))
    assert isinstance(pieces[-1], Finished)
    assert (pieces[-1].finish_reason, len(pieces) - 1) == (TOLD[name].reason, TOLD[name].pieces)


@pytest.mark.parametrize("name", FAILED)
async def test_recorded_failures_over_a_connection(server: RawServer, name: str) -> None:
    """Each recorded failure is the error that it means, whatever its status, and names backend and model."""
    of = recording(name)
    with pytest.raises(FAILED[name]) as caught:
        await ask(server, of, http(of))
    assert type(caught.value) is FAILED[name]
    assert caught.value.metadata["backend"] == "here"
    assert caught.value.metadata["model"] == "smollm2:135m"
    assert caught.value.metadata.get("http_status", "200") == str(of.status)


async def test_what_was_said_before_a_failure_is_given(server: RawServer) -> None:
    """A runner that dies leaves what it had said, then its error."""
    of = recording("runner_killed_stream")
    pieces, error = await ask_or_fail(server, of, http(of))
    assert isinstance(error, RunnerDiedError)
    assert [piece.content for piece in pieces if isinstance(piece, Spoke)] == [
        "There", " are", " many", " stories", " about", " cats", ","
    ]  # fmt: skip


async def test_a_missing_model_says_how_to_get_it(server: RawServer) -> None:
    """The message holds the command that mends it."""
    of = recording("error_model_missing")
    with pytest.raises(ModelNotFoundError, match="ollama pull smollm2:135m"):
        await ask(server, of, http(of))


async def test_a_long_prompt_tells_its_numbers(server: RawServer) -> None:
    """How long the prompt is and how long it may be are found inside JSON inside a JSON string."""
    of = recording("long_prompt_refused")
    with pytest.raises(PromptTooLongError, match="exceeds the available context size") as caught:
        await ask(server, of, http(of))
    assert caught.value.metadata["n_prompt_tokens"] == "3010"
    assert caught.value.metadata["n_ctx"] == "512"


async def cut_everywhere(server: RawServer, name: str, *, then_reset: bool, step: int = 1) -> int:
    """Cuts an answer at every byte (or each `step`th), and checks what was made of it; with how many cuts."""
    of = recording(name)
    answer = http(of)
    done_at = answer.index(of.body[-40:].rstrip(b"\n")) + len(of.body[-40:].rstrip(b"\n"))
    lengths = range(0, len(answer) + 1, step)
    for length in lengths:
        pieces, lost = await ask_or_lose(server, of, answer[:length], then_reset=then_reset)
        if lost:
            assert not any(isinstance(piece, Finished) for piece in pieces)
            # A reset may overtake what was sent before it.
            assert length < done_at or then_reset or of.path == "/api/embed"
        else:
            assert length >= done_at
            assert [type(piece) for piece in pieces] == [Spoke] * TOLD[name].pieces + [Finished]
    assert not [error for error in server.failures if not isinstance(error, ConnectionError)]
    return len(lengths)


@pytest.mark.parametrize("then_reset", [False, True])
@pytest.mark.parametrize(
    "name", ["chat_stream", "chat_thinking_stream", "chat_tool_call", "chat_tool_call_stream", "generate", "embed"]
)
async def test_a_connection_that_is_cut_at_any_byte(server: RawServer, name: str, then_reset: bool) -> None:  # noqa: FBT001
    """Cut in the head, between chunks, in a chunk's length: the answer is whole only where "done" had come.

    `make faults` cuts all recorded answers so.
    """
    assert await cut_everywhere(server, name, then_reset=then_reset, step=7 if then_reset else 1) > 0


@pytest.mark.parametrize(
    "nonsense",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        STREAM_HEAD + b"zz\r\n",
        STREAM_HEAD + chunked(b"no json\n"),
        STREAM_HEAD + chunked(b'{"message":5}\n'),
        STREAM_HEAD + chunked(b'{"created_at":"yesterday","done":false}\n'),
        STREAM_HEAD + chunked(b'{"message":{"content":"\xff"}}\n'),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    ],
)
async def test_nonsense_is_a_bad_answer(server: RawServer, nonsense: bytes) -> None:
    """Whatever answers there, it is an error of ours that says so."""
    with pytest.raises(UnisonoError) as caught:
        await ask(server, recording("chat_stream"), nonsense)
    assert caught.value.reason == "BAD_ANSWER"
