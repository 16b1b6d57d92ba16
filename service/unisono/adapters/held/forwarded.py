"""Answers that are passed on byte for byte, and read beside that as far as figures need it.

Theory of operation. Every byte goes to the relay as it comes; then a reader has a look at it, which tells when tokens
came and when the answer was done, and keeps nothing of the content. What a reader cannot make sense of is the
caller's to judge: it has it already. So whatever is wrong, the answer is passed on to its end, and only then it is
said what was wrong.

Which reader it is follows from the answer's own content type. A body that comes in one piece says nothing before its
end, and its figures stand there: only its beginning and its end are kept.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from unisono.adapters.held.call import LONGEST_REFUSAL, ExchangeCall
from unisono.adapters.held.errors import translated
from unisono.adapters.held.lines import LineSplitter, TooLongError
from unisono.core.errors import BackendFailedError, BadAnswerError, ConnectionLostError, UnisonoError
from unisono.core.model import Durations, Finished, FinishReason, Spoke, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    import httpcore

    from unisono.adapters.held.exchange import Head, HeldExchange
    from unisono.adapters.held.stream import HeldStream
    from unisono.app.ports import Relay

# Kept of a body that comes in one piece: an answer's time is at its beginning, and its figures at its end.
_FIRST_BYTES: Final = 1 << 10
_LAST_BYTES: Final = 8 << 10
_OK: Final = 200
_REASONS: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "completed": FinishReason.STOP,
    "incomplete": FinishReason.LENGTH,
}


class Reader(Protocol):
    """Reads one answer; every method raises classes of `core.errors`."""

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


class ForwardedCall(ExchangeCall):
    """A held request whose answer goes to a relay. See the port `HeldCall`."""

    def __init__(
        self,
        exchange: HeldExchange,
        relay: Relay,
        *,
        reader_of: Callable[[str], Reader],
        failure: Callable[[Head, bytes], UnisonoError],
        backend: str,
        model: str,
    ) -> None:
        """`reader_of`: who reads an answer of this content type. `failure`: what a refusal means."""
        super().__init__(exchange, backend=backend, model=model)
        self._relay = relay
        self._reader_of = reader_of
        self._failure = failure

    async def answer(self) -> AsyncGenerator[Spoke | Finished, None]:
        """See the port. `Finished` comes when the body is whole and was passed on."""
        relay = self._relay
        last: Finished | None = None
        try:
            head = await self.exchange.response()
            is_refusal = head.status != _OK
            reader = _Nobody() if is_refusal else self._reader_of(_content_type(head))
            refusal = bytearray()
            wrong: UnisonoError | None = None
            relay.begin(head.status, head.headers)
            async with contextlib.aclosing(self.exchange.chunks()) as chunks:
                async for chunk in chunks:
                    await relay.pass_on(chunk)
                    if is_refusal:
                        refusal += chunk[: max(0, LONGEST_REFUSAL - len(refusal))]
                    elif wrong is None and last is None:
                        try:
                            for piece in reader.feed(chunk):
                                if isinstance(piece, Finished):
                                    last = _bare(piece)
                                else:
                                    yield Spoke(at_ns=piece.at_ns, is_drafted=piece.is_drafted)
                        except UnisonoError as error:
                            wrong = error
            relay.end()
            if is_refusal:
                raise self._failure(head, bytes(refusal))
            if wrong is not None:
                raise wrong
            if last is None:
                for piece in reader.end():
                    if isinstance(piece, Finished):
                        last = _bare(piece)
            if last is not None:
                yield last
        finally:
            self.exchange.abort()


class _Nobody:
    """Reads nothing."""

    is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """Nothing."""
        del chunk
        yield from ()

    def end(self) -> Iterator[Spoke | Finished]:
        """Nothing."""
        yield from ()


def _bare(piece: Finished) -> Finished:
    """The end of an answer without its vectors."""
    return replace(piece, embeddings=()) if piece.embeddings else piece


def _content_type(head: Head) -> str:
    found = [value for name, value in head.headers if name.lower() == b"content-type"]
    return found[0].decode("latin-1").partition(";")[0].strip().lower() if found else ""


# -- Bodies in one piece -----------------------------------------------------------------------------------------

_NUMBER: Final = rb'"%s"\s*:\s*(\d+)'
# What is escaped inside a text has a backslash before its closing quote, so that only fields are found.
_PATTERNS: Final = {
    name: re.compile(_NUMBER % name.encode())
    for name in (
        *("prompt_eval_count", "eval_count", "prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"),
        *("cached_tokens", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"),
    )
}
_REASON: Final = re.compile(rb'"(?:done_reason|finish_reason|status)"\s*:\s*"(\w+)"')
_MODEL: Final = re.compile(rb'"model"\s*:\s*"([^"\\]+)"')


class WholeBodyReader:
    """Reads a body that comes in one piece: chat, completion or embeddings, of Ollama's API or OpenAI's."""

    def __init__(
        self,
        *,
        is_embedding: bool,
        at_ns: Callable[[bytes], int] = lambda _: time.time_ns(),
        corrected: Callable[[Durations], Durations] = lambda durations: durations,
    ) -> None:
        """`at_ns`: when it was made, by its beginning. `corrected`: see adapters/ollama/answer.py."""
        self._is_embedding = is_embedding
        self._at_ns = at_ns
        self._corrected = corrected
        self._first = b""
        self._last = b""
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """Keeps its beginning and its end; nothing is said before that."""
        if len(self._first) < _FIRST_BYTES:
            self._first += chunk[: _FIRST_BYTES - len(self._first)]
        self._last = (self._last + chunk[-_LAST_BYTES:])[-_LAST_BYTES:]
        yield from ()

    def end(self) -> Iterator[Spoke | Finished]:
        """Its figures; what is not told is absent."""
        self.is_done = True
        reasons = _REASON.findall(self._last)
        raw = reasons[-1].decode() if reasons else ""
        model = _MODEL.search(self._first)
        reason = FinishReason.EMBEDDED if self._is_embedding else _REASONS.get(raw, FinishReason.UNKNOWN)
        prompt = self._number("prompt_eval_count", "prompt_tokens", "input_tokens")
        yield Finished(
            at_ns=self._at_ns(self._first),
            finish_reason=reason,
            finish_reason_raw="" if self._is_embedding else raw,
            model=model[1].decode("utf-8", errors="replace") if model else "",
            usage=Usage(
                prompt_tokens=prompt or 0,
                cached_prompt_tokens=self._number("cached_tokens"),
                completion_tokens=self._number("eval_count", "completion_tokens", "output_tokens") or 0,
            ),
            durations=self._corrected(
                Durations(
                    total_s=self._seconds("total_duration"),
                    load_s=self._seconds("load_duration"),
                    prompt_eval_s=self._seconds("prompt_eval_duration"),
                    eval_s=self._seconds("eval_duration"),
                )
            ),
        )

    def _number(self, *names: str) -> int | None:
        for name in names:
            found = _PATTERNS[name].findall(self._last)
            if found:
                return int(found[-1])
        return None

    def _seconds(self, name: str) -> float | None:
        nanoseconds = self._number(name)
        return None if nanoseconds is None else nanoseconds / 1e9


# -- OpenAI's streams --------------------------------------------------------------------------------------------


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Response(msgspec.Struct, gc=False):
    status: str | None = None
    usage: _Usage | None = None


class _Event(msgspec.Struct, gc=False):
    """A chunk of chat or completions; or an event of responses, which has a `type`."""

    model: str = ""
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    type: str = ""
    response: _Response | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode: Final = msgspec.json.Decoder(_Event).decode
_DATA: Final = b"data:"
_END: Final = b"[DONE]"


class StreamReader:
    """Reads OpenAI's server-sent events: of chat, completions and responses."""

    def __init__(self, *, backend: str, model: str) -> None:
        self._backend, self._model = backend, model
        self._lines = LineSplitter()
        self._spoken = 0
        self._reason = ""
        self._usage = _Usage()
        self._named = ""
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """What the events say that this chunk completes. The end is the body's: figures come after the last word."""
        try:
            lines = self._lines.feed(chunk)
        except TooLongError as error:
            raise self._bad(BadAnswerError, str(error)) from error
        at_ns = time.time_ns()
        for line in lines:
            data = line.removeprefix(_DATA).strip() if line.startswith(_DATA) else b""
            if data and data != _END and self._read(data):
                self._spoken += 1
                yield Spoke(at_ns=at_ns)

    def end(self) -> Iterator[Spoke | Finished]:
        """That it is done, where somebody has said so."""
        if not self._reason:
            what = "ended the answer without saying that it is done"
            raise self._bad(ConnectionLostError, what)
        self.is_done = True
        usage = self._usage
        prompt = usage.input_tokens if usage.prompt_tokens is None else usage.prompt_tokens
        told = usage.output_tokens if usage.completion_tokens is None else usage.completion_tokens
        details = usage.prompt_tokens_details
        yield Finished(
            at_ns=time.time_ns(),
            finish_reason=_REASONS.get(self._reason, FinishReason.UNKNOWN),
            finish_reason_raw=self._reason,
            model=self._named,
            usage=Usage(
                prompt_tokens=max(0, prompt or 0),
                cached_prompt_tokens=details.cached_tokens if details is not None else None,
                # Where nobody tells, each event was a token.
                completion_tokens=max(0, self._spoken if told is None else told),
            ),
        )

    def _read(self, data: bytes) -> bool:
        """Takes in an event; whether it has text."""
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._bad(BadAnswerError, f"an event of the answer cannot be read: {error}") from error
        if bytes(event.error) not in {b"", b"null"}:
            raise self._bad(BackendFailedError, bytes(event.error)[:500].decode("utf-8", errors="replace"))
        self._named = event.model or self._named
        answer = event.response
        self._usage = event.usage or (answer.usage if answer is not None else None) or self._usage
        if event.type:
            if answer is not None and event.type in {"response.completed", "response.incomplete"}:
                self._reason = answer.status or "completed"
            return event.type.endswith(".delta")
        has_text = False
        for choice in event.choices or ():
            self._reason = choice.finish_reason or self._reason
            delta = choice.delta or _Delta()
            has_text |= bool(
                choice.text or delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls
            )
        return has_text

    def _bad(self, kind: type[UnisonoError], message: str) -> UnisonoError:
        return kind(f"backend {self._backend}: {message}", metadata={"backend": self._backend, "model": self._model})


# -- Requests that were not held ---------------------------------------------------------------------------------


class PassedAnswer:
    """The answer to a request that was sent at once. See the port `PlainAnswer`."""

    def __init__(self, response: httpcore.Response, stream: HeldStream, *, backend: str) -> None:
        self._response = response
        self._stream = stream
        self._backend = backend
        self.status = response.status
        self.headers: Sequence[tuple[bytes, bytes]] = response.headers

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """See the port."""
        try:
            with translated(self._backend):
                async for chunk in self._response.aiter_stream():
                    yield chunk
        finally:
            await self.close()

    async def close(self) -> None:
        """See the port."""
        self._stream.abort()
