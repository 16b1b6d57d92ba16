"""Reading Ollama's answers: times, durations, repetition, and what is wrong inside an answer that began well."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.adapters.ollama.answer import REPEATS, EmbeddingReader, TextReader, arrival_ns, corrected, parse_time_ns
from unisono.core.errors import (
    BadAnswerError,
    ConnectionLostError,
    RefusedByBackendError,
    RepetitionError,
    RunnerDiedError,
    UnisonoError,
)
from unisono.core.model import Durations, Finished, FinishReason, Spoke

NOW_NS = 5


def text_reader(held_s: float = 0.0) -> TextReader:
    """A reader of text."""
    return TextReader(backend="here", model="m", held_s=lambda: held_s, now_ns=lambda: NOW_NS)


def line(content: str = "", **more: Any) -> bytes:
    """A line of a chat."""
    return json.dumps({"message": {"content": content}, **more}).encode() + b"\n"


def read(reader: TextReader | EmbeddingReader, *chunks: bytes) -> list[Spoke | Finished]:
    """All that is said."""
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)]
    if not reader.is_done:
        pieces += reader.end()
    return pieces


# -- Times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01T00:00:01.000000001Z", 1_000_000_001),
        ("1970-01-01T01:00:00.25+01:00", 250_000_000),
        ("1969-12-31T19:00:00.1234567891-05:00", 123_456_789),
        ("2026-11-21T09:35:06.3562Z", 1_795_253_706_356_200_000),
        ("2318-03-04T19:12:30.123456789Z", 10987211550_123_456_789),
    ],
)
def test_times(text: str, ns: int) -> None:
    """Go leaves out trailing zeros, so that a second's fraction has any number of digits; offsets count."""
    assert parse_time_ns(text) == ns


@given(
    st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)),  # noqa: DTZ001 - zones are drawn beside it
    st.integers(0, 999_999_999),
    st.integers(-14 * 60, 14 * 60),
)
def test_any_time(moment: datetime, nanoseconds: int, offset_min: int) -> None:
    """No nanosecond is lost on the way through text."""
    zone = timezone(timedelta(minutes=offset_min))
    at = moment.replace(microsecond=0, tzinfo=zone)
    offset = at.strftime("%z")
    text = f"{at:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}".rstrip("0").rstrip(".") + f"{offset[:3]}:{offset[3:]}"
    assert parse_time_ns(text) == round((at - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 10**9 + nanoseconds


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-21T09:35:06", "2026-11-21T09:35:06.Z", "12.5"])
def test_what_is_no_time(text: str) -> None:
    """A time without a zone is no time."""
    with pytest.raises(ValueError):
        parse_time_ns(text)


def test_a_line_without_a_time_takes_that_of_its_arrival() -> None:
    """Servers that are only like Ollama may leave it out."""
    assert [piece.at_ns for piece in read(text_reader(), line("a"), line(done=True))] == [NOW_NS, NOW_NS]
    assert arrival_ns() > 1_700_000_000_000_000_000


# -- Durations -----------------------------------------------------------------------------------------------------


def test_held_time_is_taken_out() -> None:
    """Ollama's clock runs while a request is held; total and load are told without it."""
    told = Durations(total_s=3.5, load_s=2.01, prompt_eval_s=0.5, eval_s=0.9)
    right = corrected(told, held_s=2.0)
    assert right.total_s == pytest.approx(1.5)
    assert right.load_s == pytest.approx(0.01)
    assert (right.prompt_eval_s, right.eval_s) == (0.5, 0.9)
    assert right.slot_wait_s == pytest.approx(0.09)


def test_held_time_that_a_proxy_swallowed_stays_in() -> None:
    """Where the total has no room for the held time, the server's clock cannot have run meanwhile."""
    told = Durations(total_s=1.5, load_s=0.01, prompt_eval_s=0.5, eval_s=0.9)
    assert corrected(told, held_s=2.0) == told


@given(*[st.floats(0, 1e4) for _ in range(5)])
def test_no_duration_is_below_zero(total: float, load: float, prompt: float, answer: float, held: float) -> None:
    """However the clocks differ."""
    right = corrected(Durations(total_s=total, load_s=load, prompt_eval_s=prompt, eval_s=answer), held)
    assert all(span is not None and span >= 0 for span in (right.total_s, right.load_s, right.slot_wait_s))


def test_durations_that_are_not_told() -> None:
    """Ollama leaves out zeros: beside a total they are zero, without one they are unknown."""
    (cached,) = read(text_reader(), line(done=True, total_duration=5_000_000_000))
    assert isinstance(cached, Finished)
    assert cached.durations == Durations(total_s=5.0, load_s=0.0, prompt_eval_s=0.0, eval_s=0.0)
    (silent,) = read(text_reader(), line(done=True, done_reason="load"))
    assert isinstance(silent, Finished)
    assert silent.durations == Durations()
    (negative,) = read(text_reader(), line(done=True, total_duration=-1, prompt_eval_count=-1))
    assert isinstance(negative, Finished)
    assert negative.durations.total_s == 0.0
    assert negative.usage.prompt_tokens == 0


# -- Repetition ----------------------------------------------------------------------------------------------------


def test_endless_repetition_is_told_from_a_lost_stream() -> None:
    """Ollama ends a stream without a word after more than 30 repeats of a token, of which it passes on 30."""
    repeated = [line("Well"), line(" ha"), *[line("ha " if i % 2 else " ha") for i in range(REPEATS)]]
    with pytest.raises(RepetitionError, match="'ha'"):
        read(text_reader(), *repeated)
    with pytest.raises(ConnectionLostError):
        read(text_reader(), *repeated[:-1])
    with pytest.raises(ConnectionLostError):
        read(text_reader(), *repeated, line("!"))
    assert isinstance(read(text_reader(), *repeated, line(done=True))[-1], Finished)


def test_blanks_from_the_beginning_are_repetition() -> None:
    """Blanks count as a repetition of nothing from the first one on."""
    with pytest.raises(RepetitionError):
        read(text_reader(), *[line("\n") for _ in range(REPEATS)])


def test_repetition_in_thinking() -> None:
    """A model may repeat itself in its thoughts as well."""
    with pytest.raises(RepetitionError):
        read(text_reader(), *[b'{"response":"","thinking":" so"}\n' for _ in range(REPEATS + 1)])


def test_a_connection_that_is_cut_is_no_repetition() -> None:
    """What repeats may still be cut off by the network; then another attempt is right."""
    reader = text_reader()
    assert len([*reader.feed(line("ha") * 100)]) == 100
    assert [*reader.cut()] == []
    assert not reader.is_done


# -- Inside an answer ----------------------------------------------------------------------------------------------


def test_an_error_line_comes_after_what_was_said() -> None:
    """An error line inside a 200 ends the answer, and what was said in the same chunk is given first."""
    reader = text_reader()
    pieces = reader.feed(line("a") + b'{"error":"an error was encountered while running the model: EOF"}\n')
    assert isinstance(next(pieces), Spoke)
    with pytest.raises(RunnerDiedError):
        next(pieces)


@pytest.mark.parametrize("error", ['"invalid format: yaml"', '{"message":"invalid format: yaml","code":500}'])
def test_an_error_as_text_or_object(error: str) -> None:
    """An error may be a text or an object with a message, with or without a newline after it."""
    for end in (b"\n", b""):
        with pytest.raises(RefusedByBackendError, match="invalid format: yaml"):
            read(text_reader(), f'{{"error":{error}}}'.encode() + end)


def test_an_error_of_null_is_none() -> None:
    """A field that says nothing says nothing."""
    assert len(read(text_reader(), line("a", error=None), line(done=True, error=None))) == 2


def test_nothing_is_read_after_done() -> None:
    """What follows "done" is not looked at."""
    reader = text_reader()
    assert [type(p) for p in reader.feed(line("a") + line(done=True) + b"nonsense\n")] == [Spoke, Finished]
    assert [*reader.feed(b"more nonsense\n")] == []
    assert [*reader.cut()] == []


def test_the_last_line_may_speak_and_call() -> None:
    """Parsers let go of what they kept back in the last line; fields of null are empty."""
    calls = [{"function": {"name": "f", "arguments": {"b": 1, "a": 1.0}}}]
    spoke, finished = read(
        text_reader(),
        json.dumps({"message": {"content": None, "thinking": None, "tool_calls": calls}, "done": True}).encode(),
    )
    assert isinstance(spoke, Spoke)
    assert spoke.tool_calls[0].arguments_json == '{"b": 1, "a": 1.0}'
    assert isinstance(finished, Finished)
    assert finished.finish_reason is FinishReason.TOOL_CALLS


def test_logprobs() -> None:
    """Tokens with their bytes, logarithms and alternatives; bytes may be missing."""
    told = [
        {"token": "\ufffd", "logprob": -0.5, "bytes": [240, 159], "top_logprobs": [{"token": "b", "logprob": -1}]}
    ]
    spoke = read(text_reader(), line("x", logprobs=told), line(done=True))[0]
    assert isinstance(spoke, Spoke)
    (token,) = spoke.logprobs
    assert (token.token, token.logprob, token.bytes) == ("\ufffd", -0.5, b"\xf0\x9f")
    assert [(t.token, t.logprob, t.bytes, t.top) for t in token.top] == [("b", -1.0, b"", ())]


def test_a_line_without_end_is_a_bad_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never ends its line cannot fill the memory."""
    with pytest.raises(BadAnswerError, match="too long"):
        read(text_reader(), *[b"x" * (1 << 20)] * 17)
    monkeypatch.setattr("unisono.adapters.held.embeddings.LONGEST_EMBEDDING", 10)
    with pytest.raises(BadAnswerError, match="too long"):
        read(embedding_reader(), b"x" * 11)


def embedding_reader(texts: int | None = None) -> EmbeddingReader:
    """A reader of the embeddings of so many texts."""
    return EmbeddingReader(backend="here", model="m", held_s=lambda: 0.0, now_ns=lambda: NOW_NS, texts=texts)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", ConnectionLostError),
        (b'{"embeddings":[[1', ConnectionLostError),
        (b"<html>", BadAnswerError),
        (b'{"embeddings":[["a"]]}', BadAnswerError),
        (b'{"model":"m"}', BadAnswerError),
        (b'{"error":"do embedding request: EOF"}', RunnerDiedError),
    ],
)
def test_embeddings_that_are_none(body: bytes, kind: type[UnisonoError]) -> None:
    """Half a body is a lost connection, anything else that is no answer a bad one."""
    with pytest.raises(kind):
        read(embedding_reader(), body)


def test_embeddings_take_an_eighth_of_the_memory() -> None:
    """Vectors are arrays of 32-bit floats, whole numbers among them."""
    (finished,) = read(embedding_reader(), b'{"embeddings":[[1,0.5],[]],"error":null}')
    assert isinstance(finished, Finished)
    assert [vector.typecode for vector in finished.embeddings] == ["f", "f"]
    assert [list(vector) for vector in finished.embeddings] == [[1.0, 0.5], []]
    assert finished.at_ns == NOW_NS


@pytest.mark.parametrize(("body", "texts"), [(b'{"embeddings":[[1]]}', 2), (b'{"embeddings":[[1],[2]]}', 1)])
def test_each_text_has_a_vector(body: bytes, texts: int) -> None:
    """With one too few or too many, nobody knows whose they are."""
    with pytest.raises(BadAnswerError, match=r"embeddings for \d texts"):
        read(embedding_reader(texts), body)


def test_as_many_vectors_as_texts_are_right() -> None:
    """None for none, too."""
    assert len(read(embedding_reader(2), b'{"embeddings":[[1],[2]]}')) == 1
    assert len(read(embedding_reader(0), b'{"embeddings":[]}')) == 1
