"""Ollama's answer → pieces of it: readers that are fed with chunks and do no input or output themselves.

A piece that ends with `"done":true` is the only proof that an answer is whole. Source: recordings of Ollama 0.32.15,
and its api/types.go.
"""

from __future__ import annotations

import time
from array import array
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from unisono.adapters.held import LineSplitter, TooLongError, WholeReader
from unisono.adapters.ollama.failures import failure
from unisono.core.errors import BadAnswerError, ConnectionLostError, RepetitionError, UnisonoError
from unisono.core.model import (
    Durations,
    Finished,
    FinishReason,
    Spoke,
    TokenLogprob,
    ToolCall,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Ollama ends a stream without a word after more than 30 tokens that repeat the one before them; the last is not
# passed on, and blanks at the very beginning count as repeated at once. Source: llm/llama_server.go, Completion.
REPEATS: Final = 30

# An error of this much between the held time here and there is the network's; beyond it, a proxy kept the request.
_CLOCK_TOLERANCE_S: Final = 0.25

# A field that is not there: msgspec does not take "anything or None".
_NOTHING: Final = msgspec.Raw(b"")

_REASONS: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class _Function(msgspec.Struct, gc=False):
    name: str = ""
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class _Call(msgspec.Struct, gc=False):
    function: _Function
    id: str = ""


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprob(msgspec.Struct, gc=False):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None
    top_logprobs: list[_Logprob] | None = None


class _Line(msgspec.Struct, gc=False):
    """A line of /api/chat (`message`) or /api/generate (`response`), or the only one of an answer not streamed."""

    model: str = ""
    created_at: str = ""
    message: _Message | None = None
    response: str | None = None
    thinking: str | None = None
    tool_calls: list[_Call] | None = None
    done: bool = False
    done_reason: str | None = None
    logprobs: list[_Logprob] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    error: msgspec.Raw = _NOTHING


class _Embeddings(msgspec.Struct, gc=False):
    """The answer of /api/embed. Vectors stay text until one after the other becomes an array."""

    model: str = ""
    embeddings: list[msgspec.Raw] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    error: msgspec.Raw = _NOTHING


_decode_line: Final = msgspec.json.Decoder(_Line).decode
_decode_embeddings: Final = msgspec.json.Decoder(_Embeddings).decode
_decode_vector: Final = msgspec.json.Decoder(list[float]).decode


class AnswerReader(Protocol):
    """Reads one answer. Every method raises classes of `core.errors`, after what was said before."""

    @property
    def is_done(self) -> bool:
        """Whether `Finished` was given."""
        ...

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """What this chunk says."""
        ...

    def end(self) -> Iterator[Spoke | Finished]:
        """What is left when the body is whole."""
        ...

    def cut(self) -> Iterator[Spoke | Finished]:
        """What is left when the connection was lost: at most a last line that is whole but for its newline."""
        ...


class TextReader:
    """Reads an answer of chat or generate, streamed or not."""

    def __init__(self, *, backend: str, model: str, held_s: Callable[[], float], now_ns: Callable[[], int]) -> None:
        """`held_s` tells for how long the request was held; `now_ns` stands in where a line has no time."""
        self._backend, self._model = backend, model
        self._held_s, self._now_ns = held_s, now_ns
        self._lines = LineSplitter()
        self._called_tools = False
        self._last_text = ""
        self._repeats = 0
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """What the lines say that this chunk completes; nothing after "done"."""
        try:
            lines = self._lines.feed(chunk)
        except TooLongError as error:
            raise self._bad(str(error)) from error
        for line in lines:
            if self.is_done:
                return
            yield from self._read(line)

    def end(self) -> Iterator[Spoke | Finished]:
        """What the last line says; raises where nobody has said "done"."""
        rest = self._lines.rest()
        if rest and not self.is_done:
            yield from self._read(rest)
        if self.is_done:
            return
        if self._repeats >= REPEATS:
            raise RepetitionError(
                f"the model repeated {self._last_text[:40]!r} without end, and backend {self._backend} stopped it",
                metadata=self._where(),
            )
        raise ConnectionLostError(
            f"backend {self._backend} ended the answer without saying that it is done", metadata=self._where()
        )

    def cut(self) -> Iterator[Spoke | Finished]:
        """The last line, if it is whole and says "done"."""
        rest = self._lines.rest()
        if not rest or self.is_done:
            return
        try:
            line = _decode_line(rest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if line.done and not _is_there(line.error):
            yield from self._said(line)

    def _read(self, text: bytes) -> Iterator[Spoke | Finished]:
        try:
            line = _decode_line(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._bad(f"a line of the answer cannot be read: {error}") from error
        if _is_there(line.error):
            raise failure(200, text, backend=self._backend, model=self._model)
        yield from self._said(line)

    def _said(self, line: _Line) -> Iterator[Spoke | Finished]:
        message = line.message
        if message is not None:
            content, thinking, calls = message.content or "", message.thinking or "", message.tool_calls
        else:
            content, thinking, calls = line.response or "", line.thinking or "", line.tool_calls
        at_ns = self._time(line.created_at)
        # A line without text is a token too (a parser keeps its text back); not so the last line.
        if not line.done or content or thinking or calls or line.logprobs:
            self._called_tools |= bool(calls)
            self._count_repeats(content or thinking)
            yield Spoke(
                at_ns=at_ns,
                content=content,
                thinking=thinking,
                tool_calls=_tool_calls(calls),
                logprobs=_logprobs(line.logprobs),
            )
        if line.done:
            self.is_done = True
            yield self._finished(line, at_ns)

    def _count_repeats(self, text: str) -> None:
        text = text.strip()
        if text == self._last_text:
            self._repeats += 1
        else:
            self._last_text, self._repeats = text, 0

    def _finished(self, line: _Line, at_ns: int) -> Finished:
        raw = line.done_reason or ""
        reason = FinishReason.TOOL_CALLS if self._called_tools else _REASONS.get(raw, FinishReason.UNKNOWN)
        return Finished(
            at_ns=at_ns,
            finish_reason=reason,
            finish_reason_raw=raw,
            model=line.model,
            usage=Usage(
                prompt_tokens=max(0, line.prompt_eval_count or 0), completion_tokens=max(0, line.eval_count or 0)
            ),
            durations=corrected(
                Durations(
                    total_s=_seconds(line.total_duration),
                    # Ollama leaves durations of zero out, and all of them where nothing was computed.
                    load_s=_seconds(line.load_duration, line.total_duration),
                    prompt_eval_s=_seconds(line.prompt_eval_duration, line.total_duration),
                    eval_s=_seconds(line.eval_duration, line.total_duration),
                ),
                self._held_s(),
            ),
        )

    def _time(self, text: str) -> int:
        if not text:
            return self._now_ns()
        try:
            return parse_time_ns(text)
        except ValueError as error:
            raise self._bad(f"{text[:40]!r} is no time") from error

    def _bad(self, message: str) -> UnisonoError:
        return BadAnswerError(f"backend {self._backend}: {message}", metadata=self._where())

    def _where(self) -> dict[str, str]:
        return {"backend": self._backend, "model": self._model}


class EmbeddingReader(WholeReader):
    """Reads an answer of embed: one JSON object, which tells no time of its own."""

    def __init__(
        self,
        *,
        backend: str,
        model: str,
        held_s: Callable[[], float],
        now_ns: Callable[[], int],
        texts: int | None = None,
    ) -> None:
        """As TextReader; `now_ns` gives `Finished.at_ns`. `texts`: see WholeReader."""
        super().__init__(backend=backend, model=model, texts=texts)
        self._held_s, self._now_ns = held_s, now_ns

    def end(self) -> Iterator[Spoke | Finished]:
        """The embeddings."""
        text = self._whole()
        try:
            answer = _decode_embeddings(text)
            if _is_there(answer.error):
                raise failure(200, text, backend=self._backend, model=self._model)
            vectors = tuple(array("f", _decode_vector(vector)) for vector in answer.embeddings or ())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # A body whose length nobody told can only be seen to be cut by its text.
            kind = ConnectionLostError if "truncated" in str(error) else BadAnswerError
            raise kind(
                f"backend {self._backend}: the answer cannot be read: {error}", metadata=self._where()
            ) from error
        if answer.embeddings is None:
            raise BadAnswerError(f"backend {self._backend}: an answer without embeddings", metadata=self._where())
        self._refuse_other_count(vectors)
        self.is_done = True
        yield Finished(
            at_ns=self._now_ns(),
            finish_reason=FinishReason.EMBEDDED,
            model=answer.model,
            usage=Usage(prompt_tokens=max(0, answer.prompt_eval_count or 0)),
            durations=corrected(
                Durations(
                    total_s=_seconds(answer.total_duration),
                    load_s=_seconds(answer.load_duration, answer.total_duration),
                ),
                self._held_s(),
            ),
            embeddings=vectors,
        )

    def cut(self) -> Iterator[Spoke | Finished]:
        """Nothing: half an answer says nothing."""
        yield from ()


def corrected(told: Durations, held_s: float) -> Durations:
    """These durations with the held time taken out of total and load; none is below zero.

    Ollama's clock starts when the headers arrive, before the body is whole (server/routes.go, checkpointStart).
    Where the total has no room for the held time, a proxy kept the request until it was whole: nothing is to be
    taken out.
    """
    if told.total_s is None:
        return told
    computing_s = (told.prompt_eval_s or 0.0) + (told.eval_s or 0.0)
    if told.total_s + _CLOCK_TOLERANCE_S < held_s + computing_s:
        held_s = 0.0
    return Durations(
        total_s=max(0.0, told.total_s - held_s),
        load_s=None if told.load_s is None else max(0.0, told.load_s - held_s),
        prompt_eval_s=told.prompt_eval_s,
        eval_s=told.eval_s,
    )


def parse_time_ns(text: str) -> int:
    """RFC 3339 with any number of digits of a second, in nanoseconds since 1970. Raises ValueError."""
    whole, dot, rest = text.partition(".")
    if not dot:
        return _whole_seconds(text) * 1_000_000_000
    digits = len(rest) - len(rest.lstrip("0123456789"))
    if not digits:
        raise ValueError(f"no digits after the dot: {text!r}")
    fraction = int(rest[:digits][:9].ljust(9, "0"))
    return _whole_seconds(whole + rest[digits:]) * 1_000_000_000 + fraction


@lru_cache(maxsize=256)  # all tokens of a second share this
def _whole_seconds(text: str) -> int:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"a time without a zone: {text!r}")
    return int((moment - _EPOCH).total_seconds())


_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def arrival_ns() -> int:
    """The time of day, for answers that tell none."""
    return time.time_ns()


def _is_there(field: msgspec.Raw) -> bool:
    return bytes(field) not in {b"", b"null"}


def _seconds(duration_ns: int | None, needs: int | None = 0) -> float | None:
    """Seconds; a duration that was left out is 0 where `needs` was told."""
    if duration_ns is None:
        return None if needs is None or needs == 0 else 0.0
    return max(0.0, duration_ns / 1e9)


def _tool_calls(calls: list[_Call] | None) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(id=call.id, name=call.function.name, arguments_json=bytes(call.function.arguments).decode())
        for call in calls or ()
    )


def _logprobs(tokens: list[_Logprob] | None) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token=t.token,
            logprob=t.logprob,
            bytes=bytes(t.bytes) if t.bytes else b"",
            top=_logprobs(t.top_logprobs),
        )
        for t in tokens or ()
    )
