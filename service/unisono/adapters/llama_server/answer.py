"""The answer of llama.cpp's server → pieces of it: readers that are fed with chunks and do no input or output.

An answer is whole when a finish reason *and* the end mark `[DONE]` came; before that, a stream that ends was cut.

When its tokens were made: the server tells no time of day, and what arrives here together may have been made apart.
But each event tells how long the item has been generating (`timings.predicted_ms`), by the engine's own clock. So a
token's time is that, on top of the earliest start that any of the item's arrivals allows: the smallest
(arrival - predicted_ms) so far. Of 160 passes, bare arrival counted up to 67 too many with an event loop that was
blocked for 30 of every 35 ms, and this 10 at most; where the loop was blocked for 10 ms at a time, or not at all,
both were right.

What an event is, by recordings of the server:

1. The first names the speaker. It is a token only if it has timings: one whose text a parser holds back.
2. One for each token; none for a token whose text is not whole yet (a part of a character) or that a parser eats,
   such as the end of a tool call. One token can give several, of which the last has the timings.
3. The end token gives none: then the last event counts one token more than there were events, and its timings go up
   to that token.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import msgspec

from unisono.adapters.held import LineSplitter, TooLongError
from unisono.adapters.llama_server.failures import failure
from unisono.core.errors import BadAnswerError, ConnectionLostError, UnisonoError
from unisono.core.model import Durations, Finished, FinishReason, Spoke, TokenLogprob, ToolCall, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONGEST_EMBEDDING: Final = 256 << 20
_END: Final = b"[DONE]"
_REASONS: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
}


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _CallPart(msgspec.Struct, gc=False):
    """A part of a tool call: the first names it, all add to its arguments."""

    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CallPart] | None = None


class _Token(msgspec.Struct, gc=False):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None
    top_logprobs: list[_Token] | None = None


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    # Of /v1/completions.
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Timings(msgspec.Struct, gc=False):
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0
    predicted_n: int = 0


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


class _Vector(msgspec.Struct, gc=False):
    embedding: msgspec.Raw
    index: int = 0


class _Embeddings(msgspec.Struct, gc=False):
    data: list[_Vector] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_decode_embeddings: Final = msgspec.json.Decoder(_Embeddings).decode
_decode_vector: Final = msgspec.json.Decoder(list[float]).decode


class TextReader:
    """Reads a stream of /v1/chat/completions or /v1/completions. Every method raises classes of `core.errors`."""

    def __init__(
        self,
        *,
        backend: str,
        model: str,
        since_release_s: Callable[[], float],
        now_ns: Callable[[], int],
        top_logprobs: int,
    ) -> None:
        """`since_release_s`: seconds since the release, for the total that the server does not tell."""
        self._backend, self._model = backend, model
        self._since_release_s, self._now_ns = since_release_s, now_ns
        self._top = top_logprobs
        self._lines = LineSplitter()
        # The earliest start of generation that the arrivals allow, and the last token's time.
        self._base_ns: int | None = None
        self._last_ns = 0
        # Of the token that is being told: what came without its time.
        self._content, self._thinking = "", ""
        self._logprobs: list[_Token] = []
        self._calls: dict[int, _CallPart] = {}
        self._reason: str | None = None
        self._usage = _Usage()
        self._timings: _Timings | None = None
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """What the events say that this chunk completes; nothing after the end mark."""
        try:
            lines = self._lines.feed(chunk)
        except TooLongError as error:
            raise self._bad(str(error)) from error
        arrived_ns = self._now_ns()
        for line in lines:
            if self.is_done:
                return
            yield from self._line(line, arrived_ns)

    def end(self) -> Iterator[Spoke | Finished]:
        """What the last line says, if it is whole without its newline; raises where the end mark is missing."""
        rest = b"" if self.is_done else self._lines.rest()
        text = rest.removeprefix(b"data:").strip()
        if text == _END:
            yield from self._finish(self._now_ns())
        elif _is_json(text.removeprefix(b"error:")):
            yield from self._line(rest, self._now_ns())
        if not self.is_done:
            raise ConnectionLostError(
                f"backend {self._backend} ended the answer without its end mark", metadata=self._where()
            )

    def _line(self, line: bytes, arrived_ns: int) -> Iterator[Spoke | Finished]:
        """A line is an event; comments, which keep a silent stream alive, and names of events say nothing."""
        if line.startswith(b"data:"):
            yield from self._read(line[5:].strip(), arrived_ns)
        elif line.startswith((b"error:", b"{")):
            raise failure(200, line, backend=self._backend, model=self._model)

    def _read(self, text: bytes, arrived_ns: int) -> Iterator[Spoke | Finished]:
        if text == _END:
            yield from self._finish(arrived_ns)
            return
        try:
            chunk = _decode_chunk(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._bad(f"an event of the answer cannot be read: {error}") from error
        if bytes(chunk.error) not in {b"", b"null"}:
            raise failure(200, text, backend=self._backend, model=self._model)
        if chunk.usage is not None:
            self._usage = chunk.usage
        if chunk.timings is not None:
            self._timings = chunk.timings
        for choice in chunk.choices:
            yield from self._said(choice, chunk.timings, arrived_ns)

    def _said(self, choice: _Choice, timings: _Timings | None, arrived_ns: int) -> Iterator[Spoke]:
        self._reason = choice.finish_reason or self._reason
        delta = choice.delta or _Delta()
        for part in delta.tool_calls or ():
            self._add(part)
        self._content += choice.text or delta.content or ""
        self._thinking += delta.reasoning_content or ""
        if choice.logprobs is not None:
            self._logprobs += choice.logprobs.content or ()
        said = bool(self._content or self._thinking or delta.tool_calls)
        if timings is not None:
            is_token = said or choice.finish_reason is None
        else:
            # From a server that tells no times, what arrives is a token; otherwise the time is still to come.
            is_token = said and (self._base_ns is None or choice.finish_reason is not None)
        if is_token:
            yield self._spoke(timings, arrived_ns)

    def _spoke(self, timings: _Timings | None, arrived_ns: int) -> Spoke:
        self._last_ns = self._made_at(timings, arrived_ns)
        spoke = Spoke(
            at_ns=self._last_ns,
            content=self._content,
            thinking=self._thinking,
            logprobs=_tokens(self._logprobs, self._top),
        )
        self._content, self._thinking, self._logprobs = "", "", []
        return spoke

    def _made_at(self, timings: _Timings | None, arrived_ns: int) -> int:
        if timings is None:
            return max(self._last_ns, arrived_ns) if self._base_ns is None else self._last_ns
        spent_ns = round(timings.predicted_ms * 1e6)
        base_ns = arrived_ns - spent_ns
        if self._base_ns is None or base_ns < self._base_ns:
            self._base_ns = base_ns
        return max(self._last_ns, self._base_ns + spent_ns)

    def _add(self, part: _CallPart) -> None:
        whole = self._calls.setdefault(part.index, _CallPart(index=part.index, function=_Function("", "")))
        whole.id = part.id or whole.id
        if part.function is not None and whole.function is not None:
            whole.function.name = (whole.function.name or "") + (part.function.name or "")
            whole.function.arguments = (whole.function.arguments or "") + (part.function.arguments or "")

    def _finish(self, arrived_ns: int) -> Iterator[Spoke | Finished]:
        if self._reason is None:
            raise ConnectionLostError(
                f"backend {self._backend} ended the answer without a reason", metadata=self._where()
            )
        timings = self._timings or _Timings()
        at_ns = self._made_at(self._timings, arrived_ns)
        calls = tuple(_call(self._calls[i]) for i in sorted(self._calls))
        if self._reason == "length":
            # The last one was cut off in the middle.
            calls = tuple(call for call in calls if _is_json(call.arguments_json))
        if calls:
            # It stands for the end token, whose pass gave no other sign.
            yield Spoke(at_ns=at_ns, tool_calls=calls)
        self.is_done = True
        details = self._usage.prompt_tokens_details
        yield Finished(
            at_ns=at_ns,
            finish_reason=_REASONS.get(self._reason, FinishReason.UNKNOWN),
            finish_reason_raw=self._reason,
            model=self._model,
            usage=Usage(
                prompt_tokens=self._usage.prompt_tokens,
                cached_prompt_tokens=details.cached_tokens if details else None,
                completion_tokens=self._usage.completion_tokens or timings.predicted_n,
            ),
            durations=Durations(
                # Up to when it ended there, and not up to when we came to read of it.
                total_s=max(0.0, self._since_release_s() - (self._now_ns() - at_ns) / 1e9),
                load_s=0.0,
                prompt_eval_s=timings.prompt_ms / 1e3 if self._timings else None,
                eval_s=timings.predicted_ms / 1e3 if self._timings else None,
            ),
        )

    def _bad(self, message: str) -> UnisonoError:
        return BadAnswerError(f"backend {self._backend}: {message}", metadata=self._where())

    def _where(self) -> dict[str, str]:
        return {"backend": self._backend, "model": self._model}


class EmbeddingReader:
    """Reads an answer of /v1/embeddings: one JSON object."""

    def __init__(
        self,
        *,
        backend: str,
        model: str,
        since_release_s: Callable[[], float],
        now_ns: Callable[[], int],
        texts: int | None = None,
    ) -> None:
        """As TextReader. `texts`: how many were sent, each of which has a vector."""
        self._backend, self._model = backend, model
        self._texts = texts
        self._since_release_s, self._now_ns = since_release_s, now_ns
        self._chunks: list[bytes] = []
        self._size = 0
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """Keeps the chunk; nothing is said before the end."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > LONGEST_EMBEDDING:
            raise BadAnswerError(f"backend {self._backend}: the answer is too long", metadata=self._where())
        yield from ()

    def end(self) -> Iterator[Spoke | Finished]:
        """The embeddings, in the order of the texts."""
        text = b"".join(self._chunks).strip()
        self._chunks = []
        try:
            answer = _decode_embeddings(text)
            if bytes(answer.error) not in {b"", b"null"}:
                raise failure(200, text, backend=self._backend, model=self._model)
            entries = sorted(answer.data or (), key=lambda entry: entry.index)
            vectors = tuple(array("f", _decode_vector(entry.embedding)) for entry in entries)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # A body whose length nobody told can only be seen to be cut by its text.
            is_cut = text[:1] in {b"", b"{"} and (not text.endswith(b"}") or "truncated" in str(error))
            kind = ConnectionLostError if is_cut else BadAnswerError
            raise kind(
                f"backend {self._backend}: the answer cannot be read: {error}", metadata=self._where()
            ) from error
        if answer.data is None:
            raise BadAnswerError(f"backend {self._backend}: an answer without embeddings", metadata=self._where())
        if self._texts is not None and len(vectors) != self._texts:
            what = f"{len(vectors):,} embeddings for {self._texts:,} texts"
            raise BadAnswerError(f"backend {self._backend}: {what}", metadata=self._where())
        self.is_done = True
        yield Finished(
            at_ns=self._now_ns(),
            finish_reason=FinishReason.EMBEDDED,
            model=self._model,
            usage=Usage(prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0),
            durations=Durations(total_s=self._since_release_s()),
            embeddings=vectors,
        )

    def _where(self) -> dict[str, str]:
        return {"backend": self._backend, "model": self._model}


def _call(part: _CallPart) -> ToolCall:
    function = part.function or _Function()
    return ToolCall(id=part.id or "", name=function.name or "", arguments_json=function.arguments or "{}")


def _is_json(text: str | bytes) -> bool:
    try:
        _ = msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True


def _tokens(tokens: list[_Token] | None, top: int) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token=token.token,
            logprob=token.logprob,
            bytes=bytes(token.bytes or ()),
            top=_tokens((token.top_logprobs or [])[:top], 0),
        )
        for token in tokens or ()
    )
