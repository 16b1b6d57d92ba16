"""How an answer is written down: the lines of /api/chat and /api/generate, streamed or whole.

The order of the fields is that of the recordings and of api/types.go. A field that is empty is left out where Go's
`omitempty` does so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

from tests.fakes.ollama.answers import CONTENT, MARK, THINKING, TOOL, TOOL_END, Script, token_id
from tests.fakes.ollama.http import Exchange, fail
from tests.fakes.ollama.wire import WallClock, dumps, error_body, quote

NDJSON = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Final:
    """What the last message of an answer reports. Durations in nanoseconds."""

    reason: str  # stop or length
    total_ns: int
    load_ns: int
    prompt_tokens: int  # those found in the prefix count too
    prompt_eval_ns: int
    tokens: int  # the end token counts
    eval_ns: int

    def metrics(self) -> str:
        """The metrics as they stand at the end of an object."""
        values = (
            ("total_duration", self.total_ns),
            ("load_duration", self.load_ns),
            ("prompt_eval_count", self.prompt_tokens),
            ("prompt_eval_duration", self.prompt_eval_ns),
            ("eval_count", self.tokens),
            ("eval_duration", self.eval_ns),
        )
        return "".join(f',"{name}":{value}' for name, value in values if value)


class Voice(Protocol):
    """Writes one answer."""

    def begin(self) -> None:
        """Send the head of a stream, if it is one and has not begun."""

    def token(self, place: int) -> bool:
        """Say token number `place` of the script; whether anything was said."""

    def done(self, final: Final) -> None:
        """End the answer."""

    def cut(self) -> None:
        """End it without a done line."""

    def fail(self, status: int, message: str) -> None:
        """End it with an error: as a status where nothing was said yet, as a line otherwise."""

    def raw_line(self, line: bytes) -> None:
        """Write a line of a fault's own into a stream."""


class ApiVoice:
    """/api/chat, and by its subclass /api/generate."""

    media = NDJSON

    def __init__(
        self, exchange: Exchange, clock: WallClock, model: str, script: Script, *, stream: bool, logprobs: int | None
    ) -> None:
        self.exchange = exchange
        self.script = script
        self.stream = stream
        self._clock = clock
        self._head = f'{{"model":{quote(model)},"created_at":"'
        self._logprobs = logprobs  # None: not asked for; else how many alternatives
        self._begun = False
        self._content: list[str] = []
        self._thinking: list[str] = []
        self._tool_text: list[str] = []  # held back until the call is whole
        self._calls: list[str] = []
        self._calls_said = 0
        self._probs: list[str] = []

    # What differs between chat and generate.

    silent_marks = True  # /api/chat says nothing for the tags of thinking, /api/generate an empty line (recorded)

    def object(
        self,
        content: str,
        thinking: str,
        calls: str,
        *,
        done: bool,
        reason: str = "",
        probs: str = "",
        tail: str = "",
    ) -> bytes:
        """One JSON object, without a line's end."""
        message = f'"message":{{"role":"assistant","content":{quote(content)}'
        if thinking:
            message += f',"thinking":{quote(thinking)}'
        if calls:
            message += f',"tool_calls":[{calls}]'
        end = f'"done":true,"done_reason":"{reason}"' if reason else f'"done":{"true" if done else "false"}'
        if probs:
            end += f',"logprobs":[{probs}]'
        return f'{self._head}{self._clock.stamp()}",{message}}},{end}{tail}}}'.encode()

    # What is common.

    def begin(self) -> None:
        """Send the head of a stream, once."""
        if self.stream and not self._begun:
            self._begun = True
            self.exchange.begin(200, self.media)

    def token(self, place: int) -> bool:
        """Say a token, or keep it for later."""
        script = self.script
        text, kind = script.tokens[place], script.kinds[place]
        content = thinking = calls = ""
        if kind == CONTENT:
            content = text
        elif kind == THINKING:
            thinking = text
        elif kind == MARK:
            if self.silent_marks:
                return False
        elif kind == TOOL:
            self._tool_text.append(text)
            return False
        elif kind == TOOL_END:
            self._tool_text.clear()
            calls = self._call()
        probs = self._prob(text) if self._logprobs is not None else ""
        if self.stream:
            self.begin()
            self.say(content, thinking, calls, probs)
        else:
            self._content.append(content)
            self._thinking.append(thinking)
            if calls:
                self._calls.append(calls)
            if probs:
                self._probs.append(probs)
        return True

    def say(self, content: str, thinking: str, calls: str, probs: str) -> None:
        """Write one line of the stream."""
        line = self.object(content, thinking, calls, done=False, probs=probs)
        self.exchange.line(line + b"\n")

    def done(self, final: Final) -> None:
        """End the answer."""
        # A tool call that was cut by its length comes out as text (routes.go, ChatHandler(): toolParser.Content()).
        left = "".join(self._tool_text)
        tail = self.context() + final.metrics()
        if self.stream:
            self.begin()
            self.exchange.line(self.object(left, "", "", done=True, reason=final.reason, tail=tail) + b"\n")
            self.exchange.end()
        else:
            self.exchange.answer(200, self._whole(left, done=True, reason=final.reason, tail=tail))

    def cut(self) -> None:
        """End it without a done line."""
        if self.stream:
            self.begin()
            self.exchange.end()
        else:
            self.exchange.answer(200, self._whole("", done=False))

    def fail(self, status: int, message: str) -> None:
        """End it with an error."""
        if self.stream and self._begun:
            self.exchange.line(error_body(message) + b"\n")
            self.exchange.end()
        else:
            fail(self.exchange, status, message, streaming=self.stream)

    def raw_line(self, line: bytes) -> None:
        """Write a line of a fault's own into a stream."""
        if self.stream:
            self.begin()
            self.exchange.line(line + b"\n")

    def context(self) -> str:
        """The field that /api/generate has before its metrics."""
        return ""

    def _whole(self, left: str, *, done: bool, reason: str = "", tail: str = "") -> bytes:
        return self.object(
            "".join(self._content) + left,
            "".join(self._thinking),
            ",".join(self._calls),
            done=done,
            reason=reason,
            probs=",".join(self._probs),
            tail=tail,
        )

    def _call(self) -> str:
        name, arguments = self.script.tool_calls[self._calls_said]
        # Ids are "call_" and eight of [a-z0-9] (routes.go, toolCallId()); here they follow from the request.
        number = crc32(f"{self.exchange.live.id} {self._calls_said}".encode())
        self._calls_said += 1
        return (
            f'{{"id":"call_{number:08x}","function":{{"index":{self._calls_said - 1},"name":{quote(name)},'
            f'"arguments":{dumps(dict(arguments))}}}}}'
        )

    def _prob(self, text: str) -> str:
        """Log probabilities; the numbers are invented."""
        own = _logprob(text, -0.5)
        if not self._logprobs:
            return f"{{{own}}}"
        others = [f"{{{_logprob(text if not n else f' other{n}', -0.5 - n)}}}" for n in range(self._logprobs)]
        return f'{{{own},"top_logprobs":[{",".join(others)}]}}'


class GenerateVoice(ApiVoice):
    """/api/generate."""

    silent_marks = False

    def __init__(
        self,
        exchange: Exchange,
        clock: WallClock,
        model: str,
        script: Script,
        *,
        stream: bool,
        logprobs: int | None,
        prompt: list[str] | None,
    ) -> None:
        super().__init__(exchange, clock, model, script, stream=stream, logprobs=logprobs)
        self._prompt = prompt  # None: raw, which reports no context

    def object(
        self,
        content: str,
        thinking: str,
        calls: str,
        *,
        done: bool,
        reason: str = "",
        probs: str = "",
        tail: str = "",
    ) -> bytes:
        """One JSON object, without a line's end."""
        body = f'"response":{quote(content)}'
        if thinking:
            body += f',"thinking":{quote(thinking)}'
        end = f'"done":true,"done_reason":"{reason}"' if reason else f'"done":{"true" if done else "false"}'
        if probs:
            tail += f',"logprobs":[{probs}]'
        return f'{self._head}{self._clock.stamp()}",{body},{end}{tail}}}'.encode()

    def context(self) -> str:
        """The ids of all tokens, of prompt and answer."""
        if self._prompt is None:
            return ""
        ids = [str(token_id(token)) for token in (*self._prompt, *self.script.tokens)]
        return f',"context":[{",".join(ids)}]'


def _logprob(text: str, value: float) -> str:
    return f'"token":{quote(text)},"logprob":{value},"bytes":{dumps(list(text.encode()))}'
