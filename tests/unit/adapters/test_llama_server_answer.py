"""Reading the answers of llama.cpp's server: recorded streams, cut and sliced in every way; when tokens were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.adapters import llama_wire
from unisono.adapters.llama_server.answer import EmbeddingReader, TextReader
from unisono.core.errors import (
    BackendFailedError,
    BadAnswerError,
    ConnectionLostError,
    ModelLacksCapabilityError,
    PromptTooLongError,
    UnisonoError,
)
from unisono.core.model import Durations, Finished, FinishReason, Spoke, TokenLogprob, ToolCall, Usage

NOW_NS = 1_000_000_000_000
MS = 1_000_000
END = b"data: [DONE]\n\n"


def text_reader(now_ns: Callable[[], int] = lambda: NOW_NS, *, top_logprobs: int = 2) -> TextReader:
    """A reader of text."""
    return TextReader(
        backend="here", model="m", since_release_s=lambda: 9.0, now_ns=now_ns, top_logprobs=top_logprobs
    )


def read(reader: TextReader | EmbeddingReader, *chunks: bytes) -> list[Spoke | Finished]:
    """All that is said."""
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)]
    if not reader.is_done:
        pieces += reader.end()
    return pieces


def read_stream(name: str, *, top_logprobs: int = 2) -> tuple[list[Spoke], Finished]:
    """A recorded stream: what was spoken, and the end."""
    *spoken, finished = read(text_reader(top_logprobs=top_logprobs), llama_wire.stream(name))
    assert isinstance(finished, Finished)
    return [piece for piece in spoken if isinstance(piece, Spoke)], finished


def text_of(pieces: Sequence[Spoke | Finished]) -> str:
    """The answer."""
    return "".join(piece.content for piece in pieces if isinstance(piece, Spoke))


def event(content: str | None = "x", *, ms: float | None = None, n: int = 1, **choice: Any) -> bytes:
    """An event of a chat; `ms` is the time that the engine says it has generated for."""
    data: dict[str, Any] = {"choices": [{"delta": {"content": content}, "finish_reason": None, **choice}]}
    if ms is not None:
        data["timings"] = {"predicted_ms": ms, "predicted_n": n, "prompt_ms": 5.0}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def last_event(reason: str = "stop") -> bytes:
    """The event that tells why it ended."""
    return b"data: " + json.dumps({"choices": [{"delta": {}, "finish_reason": reason}]}).encode() + b"\n\n"


# -- Recordings: what they say -----------------------------------------------------------------------------------


def test_a_chat_that_ends_by_itself() -> None:
    """Seven words and an end token, which has no event: eight tokens by the engine's count."""
    spoken, finished = read_stream("chat_stop")
    assert [piece.content for piece in spoken] == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert finished == Finished(
        at_ns=finished.at_ns,
        finish_reason=FinishReason.STOP,
        finish_reason_raw="stop",
        model="m",
        usage=Usage(prompt_tokens=43, cached_prompt_tokens=0, completion_tokens=8),
        durations=Durations(total_s=finished.durations.total_s, load_s=0.0, prompt_eval_s=0.101444, eval_s=0.132593),
    )


def test_a_chat_that_ends_by_its_length() -> None:
    """As many pieces as tokens; what was found in a cache is told."""
    spoken, finished = read_stream("chat_length")
    assert len(spoken) == finished.usage.completion_tokens == 6
    assert finished.finish_reason is FinishReason.LENGTH
    assert finished.usage.cached_prompt_tokens == 24
    assert finished.usage.prompt_tokens == 32


@pytest.mark.parametrize("name", llama_wire.STREAMS)
def test_every_recording_is_whole(name: str) -> None:
    """Each recording ends with Finished, in an order of time, and with at least as many tokens as pieces."""
    spoken, finished = read_stream(name)
    assert finished.usage.completion_tokens >= len([piece for piece in spoken if not piece.tool_calls])
    times = [*(piece.at_ns for piece in spoken), finished.at_ns]
    assert all(before <= after for before, after in pairwise(times))
    assert finished.finish_reason is not FinishReason.UNKNOWN
    assert finished.durations.eval_s is not None
    assert finished.durations.slot_wait_s is not None


def test_a_raw_prompt() -> None:
    """A completion speaks in `text`; its last event carries the reason, the usage and no token."""
    spoken, finished = read_stream("completion")
    assert [piece.content for piece in spoken] == [" Paris", ".", "\n", "\n"]
    assert finished.finish_reason is FinishReason.LENGTH
    assert finished.usage == Usage(prompt_tokens=5, cached_prompt_tokens=0, completion_tokens=4)


def test_the_end_token_of_a_raw_prompt() -> None:
    """In a completion the end token has an event of its own, without text: a token like the others."""
    spoken, finished = read_stream("completion_stop")
    assert [piece.content for piece in spoken] == ["The", " capital", " of", " France", " is", " Paris", ".", ""]
    assert len(spoken) == finished.usage.completion_tokens
    assert finished.finish_reason is FinishReason.STOP


def test_an_empty_prompt() -> None:
    """The server answers an empty prompt with nothing: no token, and an end."""
    spoken, finished = read_stream("completion_empty")
    assert spoken == []
    assert finished.usage == Usage(prompt_tokens=0, cached_prompt_tokens=0, completion_tokens=0)
    assert finished.finish_reason is FinishReason.LENGTH


def test_characters_of_several_tokens() -> None:
    """A character comes whole, with the time of its last token; the tokens before it are known by the count alone."""
    spoken, finished = read_stream("chat_characters")
    assert text_of(spoken).startswith("Repeat exactly: 🎉🦄\n\n🎉🦄")
    assert len(spoken) == 16
    assert finished.usage.completion_tokens == 30


def test_an_answer_by_a_schema() -> None:
    """What a schema asks for can be parsed."""
    spoken, _ = read_stream("chat_json_schema")
    assert set(json.loads(text_of(spoken))) == {"colour", "number"}


@pytest.mark.parametrize("name", ["chat_logprobs", "completion_logprobs"])
def test_log_probabilities(name: str) -> None:
    """Each token comes with its bytes, its logarithm and as many alternatives as were asked for."""
    spoken, _ = read_stream(name)
    for piece in spoken:
        (token,) = piece.logprobs
        assert token.token == piece.content
        assert token.bytes == piece.content.encode()
        assert token.logprob <= 0
        assert [len(token.top), token.top[0].token] == [2, piece.content]
        assert all(other.top == () for other in token.top)
    assert [[len(token.top) for token in piece.logprobs] for piece in read_stream(name, top_logprobs=0)[0]] == [
        [0] for _ in spoken
    ]


def test_log_probabilities_to_the_letter() -> None:
    """Nothing is rounded."""
    told = [{"token": "�", "bytes": [240, 159], "logprob": -0.5, "top_logprobs": None}]
    (spoke, _) = read(text_reader(), event("x", ms=1, logprobs={"content": told}), last_event(), END)
    assert isinstance(spoke, Spoke)
    assert spoke.logprobs == (TokenLogprob(token="�", logprob=-0.5, bytes=b"\xf0\x9f", top=()),)


def test_a_tool_call() -> None:
    """A call is given once, whole, with its id and its arguments as text; each event with a time was a token.

    The first of them names the speaker: its text is a part of the call's beginning, which the parser keeps.
    """
    spoken, finished = read_stream("chat_tool_call")
    *parts, whole = spoken
    assert len(parts) == 1 + 8
    assert {(piece.content, piece.tool_calls) for piece in parts} == {("", ())}
    (call,) = whole.tool_calls
    assert call == ToolCall(id=call.id, name="weather", arguments_json='{"city": "Paris"}')
    assert len(call.id) == 32
    assert finished.finish_reason is FinishReason.TOOL_CALLS
    assert finished.usage.completion_tokens == 23


def test_several_tool_calls() -> None:
    """Calls whose parts come in turn are put together by their numbers."""

    def part(index: int, **function: str) -> bytes:
        called = {"index": index, "id": f"c{index}", "function": function}
        return event(None, ms=1, delta={"tool_calls": [called]})

    pieces = read(
        text_reader(),
        part(1, name="g", arguments=""),
        part(0, name="f", arguments='{"a"'),
        part(1, arguments="{}"),
        part(0, arguments=": 1}"),
        last_event("tool_calls"),
        END,
    )
    calls = [piece.tool_calls for piece in pieces if isinstance(piece, Spoke) and piece.tool_calls]
    assert calls == [
        (
            ToolCall(id="c0", name="f", arguments_json='{"a": 1}'),
            ToolCall(id="c1", name="g", arguments_json="{}"),
        )
    ]


def test_a_tool_call_that_was_cut_off_is_no_call() -> None:
    """Arguments that the length cut off are no JSON, and nobody is told to call anything with them."""
    called = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a'}}
    pieces = read(text_reader(), event(None, ms=1, delta={"tool_calls": [called]}), last_event("length"), END)
    assert [piece.tool_calls for piece in pieces if isinstance(piece, Spoke)] == [()]
    assert isinstance(pieces[-1], Finished)


def test_thoughts() -> None:
    """What a model thinks first comes apart from what it says."""
    thinks = event(None, ms=1, delta={"reasoning_content": "hm"})
    spoken = read(text_reader(), thinks, event("yes", ms=2), last_event(), END)[:-1]
    assert [(p.thinking, p.content) for p in spoken if isinstance(p, Spoke)] == [("hm", ""), ("", "yes")]


# -- Cut and sliced ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", llama_wire.STREAMS)
def test_cut_anywhere_it_is_not_whole(name: str) -> None:
    """Cut at any byte before the end mark, an answer is never called finished: it is a lost connection."""
    whole = llama_wire.stream(name)
    mark = whole.index(b"[DONE]")
    for cut in range(mark + len(b"[DONE]")):
        reader = text_reader()
        pieces = [*reader.feed(whole[:cut])]
        with pytest.raises(ConnectionLostError):
            pieces += reader.end()
        assert not reader.is_done
        assert not [piece for piece in pieces if isinstance(piece, Finished)]


@pytest.mark.parametrize("name", llama_wire.STREAMS)
def test_whole_without_its_last_newlines(name: str) -> None:
    """The end mark is the end, whether or not newlines follow."""
    whole = llama_wire.stream(name)
    for stream in (whole.rstrip(), whole, whole.replace(b"\n", b"\r\n")):
        assert read(text_reader(), stream) == read(text_reader(), whole)


@pytest.mark.parametrize("name", llama_wire.STREAMS)
def test_byte_by_byte(name: str) -> None:
    """The slowest of all networks changes nothing."""
    whole = llama_wire.stream(name)
    assert read(text_reader(), *(whole[i : i + 1] for i in range(len(whole)))) == read(text_reader(), whole)


@given(st.sampled_from(llama_wire.STREAMS), st.lists(st.integers(0, 30_000), max_size=30))
def test_sliced_anyhow(name: str, places: list[int]) -> None:
    """However the network slices an answer, it reads the same."""
    whole = llama_wire.stream(name)
    cuts = sorted({0, len(whole), *(place % len(whole) for place in places)})
    assert read(text_reader(), *(whole[a:b] for a, b in pairwise(cuts))) == read(text_reader(), whole)


@given(st.sampled_from(llama_wire.STREAMS), st.data())
def test_a_broken_byte_raises_nothing_foreign(name: str, data: st.DataObject) -> None:
    """Whatever a byte is changed into, the answer is read, or refused with an error of this house."""
    whole = bytearray(llama_wire.stream(name))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pieces = read(text_reader(), bytes(whole))
    except UnisonoError:
        return
    assert isinstance(pieces[-1], Finished)


@given(st.binary(max_size=200), st.booleans())
def test_garbage_raises_nothing_foreign(garbage: bytes, is_event: bool) -> None:  # noqa: FBT001 - drawn
    """Any bytes are refused with an error of this house."""
    with pytest.raises(UnisonoError):
        read(text_reader(), b"data: " + garbage if is_event else garbage)


def test_nothing_is_read_after_the_end_mark() -> None:
    """What follows is nobody's."""
    reader = text_reader()
    pieces = [*reader.feed(event(ms=1) + last_event() + END + b"nonsense\n" + event(ms=2))]
    assert [type(piece) for piece in pieces] == [Spoke, Finished]
    assert [*reader.feed(b"more")] == []


def test_comments_and_names_of_events_are_passed_over() -> None:
    """Comments keep a silent stream alive; every event is of one kind."""
    pieces = read(text_reader(), b": ping\n\nevent: message\n", event("a", ms=1), b":\n", last_event(), END)
    assert text_of(pieces) == "a"


def test_an_end_mark_without_a_reason() -> None:
    """A stream that ends in order but never said why has lost something on the way."""
    with pytest.raises(ConnectionLostError, match="without a reason"):
        read(text_reader(), event("a", ms=1), END)


def test_a_line_without_end_is_a_bad_answer() -> None:
    """A server that never ends its line cannot fill the memory."""
    with pytest.raises(BadAnswerError, match="too long"):
        read(text_reader(), *[b"x" * (1 << 20)] * 17)


def test_a_reason_that_nobody_knows() -> None:
    """It is kept as it was said."""
    finished = read(text_reader(), event("a", ms=1), last_event("vacation"), END)[-1]
    assert isinstance(finished, Finished)
    assert (finished.finish_reason, finished.finish_reason_raw) == (FinishReason.UNKNOWN, "vacation")


# -- Errors inside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [b"data: ", b"error: ", b""])
@pytest.mark.parametrize("newline", [b"\n\n", b""])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("error_context", PromptTooLongError), ("error_embeddings", ModelLacksCapabilityError)],
)
def test_an_error_inside_a_stream(prefix: bytes, newline: bytes, name: str, kind: type[UnisonoError]) -> None:
    """An error object in a 200 ends the answer with what it means, and what was said before is given first.

    Not recorded: from llama.cpp's source, where a stream that has begun sends its error as an event; older servers
    sent it as `error: {…}`, and proxies send it bare.
    """
    reader = text_reader()
    pieces = reader.feed(event("a", ms=1) + prefix + llama_wire.body(name) + newline)
    assert isinstance(next(pieces), Spoke)
    with pytest.raises(kind):
        _ = [*pieces, *reader.end()]
    assert not reader.is_done


def test_an_error_that_says_nothing() -> None:
    """An error of null is none; one that nobody knows is the server's failure."""
    chunk = b'data: {"choices":[],"error":null}\n\n'
    assert isinstance(read(text_reader(), chunk, event("a", ms=1), last_event(), END)[-1], Finished)
    with pytest.raises(BackendFailedError, match="the sky fell"):
        read(text_reader(), b'data: {"error":{"message":"the sky fell","type":"server_error"}}\n\n')


# -- When tokens were made ---------------------------------------------------------------------------------------


class Clock:
    """Arrivals of one item whose tokens are made every 20 ms, read when the event loop comes to it."""

    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def read(self, made_ms: Sequence[float], arrived_ms: Sequence[float]) -> list[int]:
        """When each token was made, as far as the reader knows, in milliseconds after the start."""
        reader = text_reader(lambda: self.now_ns)
        times: list[int] = []
        for made, arrived in zip(made_ms, arrived_ms, strict=True):
            self.now_ns = NOW_NS + round(arrived * MS)
            times += [round((piece.at_ns - NOW_NS) / MS) for piece in reader.feed(event("x", ms=made))]
        return times


def test_tokens_of_an_idle_reader_keep_their_arrivals() -> None:
    """Where each is read at once, a token's time is that of its arrival."""
    made = [0.001, 20, 40, 60]
    assert Clock().read(made, [ms + 3 for ms in made]) == [3, 23, 43, 63]


def test_tokens_of_a_busy_reader_are_put_right() -> None:
    """Tokens that pile up while the loop is busy get back the times at which the engine made them."""
    made = [0.001, 20, 40, 60, 80, 100]
    assert Clock().read(made, [3, 95, 95, 95, 95, 103]) == [3, 23, 43, 63, 83, 103]


def test_a_first_token_that_came_late_is_put_right_from_then_on() -> None:
    """The earliest start that any arrival allows counts, and time never goes back."""
    made = [0.001, 20, 40, 60]
    assert Clock().read(made, [33, 34, 43, 63]) == [33, 34, 43, 63]


@given(
    st.lists(st.floats(1, 50), min_size=2, max_size=60),
    st.lists(st.floats(0, 40), min_size=60, max_size=60),
)
def test_times_lie_between_the_making_and_the_arrival(steps: list[float], delays: list[float]) -> None:
    """However late each is read: no token was made after it arrived, nor long before it could have been."""
    made = [sum(steps[:i]) for i in range(len(steps))]
    arrived: list[float] = []
    for ms, delay in zip(made, delays, strict=False):
        arrived.append(max(ms + delay, arrived[-1] if arrived else 0))
    times = Clock().read(made, arrived)
    assert times == sorted(times)
    for ms, at, seen in zip(made, times, arrived, strict=True):
        assert round(ms) - 1 <= at <= round(seen) + 1
    # Once one was read at once, every later one is right.
    for place, delay in enumerate(delays[: len(made)]):
        if delay == 0 and arrived[place] == made[place]:
            assert all(abs(at - ms) <= 1 for at, ms in zip(times[place:], made[place:], strict=True))
            break


def test_drafted_tokens_tell_one_duration() -> None:
    """What one pass gave is told by the server's own clock, however it arrives; a recording of drafts of three."""
    told = [(1, 0.001), (2, 207.181), (3, 463.785), (4, 463.785), (5, 743.476), (6, 743.476), (7, 743.476)]
    reader = text_reader()
    pieces = read(reader, *(event(ms=ms, n=n) for n, ms in told), last_event(), b"data: [DONE]\n\n")
    drafted = [piece.is_drafted for piece in pieces if isinstance(piece, Spoke)]
    assert drafted == [False, False, False, True, False, True, True]


@pytest.mark.parametrize("name", llama_wire.STREAMS)
def test_a_server_that_does_not_draft_says_so(name: str) -> None:
    """Each recorded token has a pass of its own."""
    spoken, _ = read_stream(name)
    assert not any(piece.is_drafted for piece in spoken)


def test_a_server_without_timings() -> None:
    """Another server tells no times: then the arrivals are all there is, and nothing of the text is lost."""
    spoken, finished = read_stream("chat_no_timings")
    assert text_of(spoken) == "I'm glad you"
    assert {piece.at_ns for piece in spoken} == {NOW_NS}
    assert finished.usage.completion_tokens == 4


def test_no_timings_at_all() -> None:
    """What nobody told stays unknown."""
    *_, finished = read(text_reader(), event("a"), last_event(), END)
    assert isinstance(finished, Finished)
    assert (finished.durations.prompt_eval_s, finished.durations.eval_s) == (None, None)
    assert finished.usage.cached_prompt_tokens is None


def test_the_total_ends_with_the_answer() -> None:
    """An end that was read late does not make the answer longer."""
    clock = Clock()
    reader = text_reader(lambda: clock.now_ns)
    clock.now_ns = NOW_NS + 10 * MS
    _ = [*reader.feed(event("a", ms=0.001))]
    clock.now_ns = NOW_NS + 500 * MS
    *_, finished = [*reader.feed(event("b", ms=20) + last_event() + END)]
    assert isinstance(finished, Finished)
    assert finished.at_ns == pytest.approx(NOW_NS + 30 * MS, abs=MS)
    assert finished.durations.total_s == pytest.approx(9.0 - 0.470, abs=0.001)


# -- Embeddings --------------------------------------------------------------------------------------------------


def embedding_reader(texts: int | None = None) -> EmbeddingReader:
    """A reader of the embeddings of so many texts."""
    return EmbeddingReader(backend="here", model="m", since_release_s=lambda: 1.5, now_ns=lambda: NOW_NS, texts=texts)


def test_recorded_embeddings() -> None:
    """One vector of 32-bit floats for each text."""
    (finished,) = read(embedding_reader(), llama_wire.body("embeddings"))
    assert isinstance(finished, Finished)
    assert [(vector.typecode, len(vector)) for vector in finished.embeddings] == [("f", 576)] * 2
    assert finished.finish_reason is FinishReason.EMBEDDED
    assert finished.usage.prompt_tokens > 0
    assert finished.durations == Durations(total_s=1.5)
    assert finished.at_ns == NOW_NS


def test_embeddings_come_in_the_order_of_the_texts() -> None:
    """The server numbers them; their order in the answer counts for nothing."""
    body = b'{"data":[{"index":1,"embedding":[2]},{"index":0,"embedding":[1,0.5]}]}'
    (finished,) = read(embedding_reader(), body)
    assert isinstance(finished, Finished)
    assert [list(vector) for vector in finished.embeddings] == [[1.0, 0.5], [2.0]]


@pytest.mark.parametrize("texts", [1, 3])
def test_each_text_has_a_vector(texts: int) -> None:
    """With too few or too many, nobody knows whose they are."""
    body = b'{"data":[{"index":1,"embedding":[2]},{"index":0,"embedding":[1,0.5]}]}'
    assert len(read(embedding_reader(2), body)) == 1
    with pytest.raises(BadAnswerError, match=f"2 embeddings for {texts} texts"):
        read(embedding_reader(texts), body)


def test_embeddings_cut_anywhere() -> None:
    """Half a body is a lost connection, at every byte; sliced anyhow it reads the same."""
    whole = b'{"data":[{"index":0,"embedding":[1,0.5]}],"usage":{"prompt_tokens":3}}'
    for cut in range(len(whole)):
        with pytest.raises(ConnectionLostError):
            read(embedding_reader(), whole[:cut])
        assert read(embedding_reader(), whole[:cut], whole[cut:]) == read(embedding_reader(), whole)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>", BadAnswerError),
        (b"{}", BadAnswerError),
        (b'{"data":[{"index":0,"embedding":["a"]}]}', BadAnswerError),
        (b'{"data":[{"index":0}]}', BadAnswerError),
        (llama_wire.body("error_embeddings"), ModelLacksCapabilityError),
        (llama_wire.body("error_embedding_length"), PromptTooLongError),
    ],
)
def test_embeddings_that_are_none(body: bytes, kind: type[UnisonoError]) -> None:
    """What holds no vectors is no answer; an error inside a 200 is what it says."""
    with pytest.raises(kind):
        read(embedding_reader(), body)


def test_embeddings_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless answer cannot fill the memory."""
    monkeypatch.setattr("unisono.adapters.held.embeddings.LONGEST_EMBEDDING", 10)
    with pytest.raises(BadAnswerError, match="too long"):
        read(embedding_reader(), b"x" * 11)
