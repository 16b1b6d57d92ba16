"""The OpenAI-compatible endpoints under /v1, as far as they were recorded.

Read in middleware/openai.go and openai/openai.go of Ollama's source.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from tests.fakes.ollama.answers import Script
from tests.fakes.ollama.api import Api
from tests.fakes.ollama.body import parse_json
from tests.fakes.ollama.http import Exchange
from tests.fakes.ollama.models import parse_name
from tests.fakes.ollama.voices import ApiVoice, Final
from tests.fakes.ollama.wire import ApiError, WallClock, dumps

_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_CREATED = 1_795_257_038
_OPTIONS = ("temperature", "seed", "top_p", "frequency_penalty", "presence_penalty")


def openai_error(error: ApiError) -> bytes:
    """An error in OpenAI's shape (openai/openai.go, NewError())."""
    kind = _TYPES.get(error.status, "api_error")
    return dumps({"error": {"message": error.message, "type": kind, "param": None, "code": None}}).encode()


class OpenAi:
    """Translates /v1 to the requests of /api."""

    def __init__(self, api: Api, clock: WallClock) -> None:
        self._api = api
        self._clock = clock

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""
        asked = _parse(exchange)
        if not asked.get("messages"):
            raise ApiError(400, "[] is too short - 'messages'")
        body = _common(asked, "max_tokens", "max_completion_tokens")
        body["messages"] = [_message(message) for message in asked["messages"]]
        body["tools"] = asked.get("tools")
        form = asked.get("response_format") or {}
        if form.get("type") == "json_object":
            body["format"] = "json"
        elif form.get("type") == "json_schema":
            body["format"] = (form.get("json_schema") or {}).get("schema")
        await self._api.chat_body(exchange, body, lambda script, _: _ChatVoice(exchange, self._clock, asked, script))

    async def completions(self, exchange: Exchange) -> None:
        """POST /v1/completions."""
        asked = _parse(exchange)
        body = _common(asked, "max_tokens")
        body["prompt"] = asked.get("prompt") or ""
        body["suffix"] = asked.get("suffix") or ""
        await self._api.generate_body(
            exchange, body, lambda script, _: _TextVoice(exchange, self._clock, asked, script)
        )

    async def embeddings(self, exchange: Exchange) -> None:
        """POST /v1/embeddings."""
        asked = _parse(exchange)
        given = asked.get("input")
        texts = [given] if isinstance(given, str) else given
        if not texts or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ApiError(400, "invalid input")
        body = {"model": asked.get("model"), "dimensions": asked.get("dimensions") or 0}
        answer = json.loads(await self._api.embed_answer(exchange, body, texts))
        data = [
            {"object": "embedding", "embedding": numbers, "index": at}
            for at, numbers in enumerate(answer["embeddings"])
        ]
        tokens = answer.get("prompt_eval_count", 0)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": data, "model": asked.get("model"), "usage": usage}
        exchange.answer(200, dumps(whole).encode() + b"\n", "application/json")

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models."""
        data = [_model(name) for name in (model.short_name for model in self._api.models.values())]
        exchange.answer(200, dumps({"object": "list", "data": data}).encode() + b"\n", "application/json")

    async def model(self, exchange: Exchange) -> bool:
        """GET /v1/models/NAME; False if it was asked for something else."""
        head, _, name = exchange.live.path.partition("/v1/models/")
        if head or not name or exchange.live.method != "GET":
            return False
        missing = f"model '{parse_name(name) or name}' not found"
        self._api.find({"model": name}, empty=(400, "model is required"), missing=missing)
        exchange.answer(200, dumps(_model(name)).encode() + b"\n", "application/json")
        return True


class _OpenAiVoice(ApiVoice):
    """What both dialects share."""

    media = "text/event-stream"
    kind = ""

    def __init__(self, exchange: Exchange, clock: WallClock, asked: Mapping[str, Any], script: Script) -> None:
        super().__init__(exchange, clock, asked["model"], script, stream=asked.get("stream") is True, logprobs=None)
        self._asked = asked
        self._created = int(time.time())
        self._usage = bool((asked.get("stream_options") or {}).get("include_usage"))

    def _object(self, kind: str, **more: Any) -> dict[str, Any]:
        head = {"id": f"{self.kind}-{self.exchange.live.id % 999}", "object": kind, "created": self._created}
        return head | {"model": self._asked["model"], "system_fingerprint": "fp_ollama"} | more

    def _event(self, value: Mapping[str, Any] | None) -> None:
        data = "[DONE]" if value is None else dumps(value)
        self.exchange.line(f"data: {data}\n\n".encode())

    def fail(self, status: int, message: str) -> None:
        """End it with an error, in OpenAI's shape where nothing was said yet."""
        if self.stream and self._begun:
            super().fail(status, message)
        else:
            body = openai_error(ApiError(status, message)) + b"\n"
            self.exchange.answer(status, body, "application/json", chunked=self.stream)

    @staticmethod
    def _used(final: Final) -> dict[str, int]:
        total = final.prompt_tokens + final.tokens
        return {"prompt_tokens": final.prompt_tokens, "completion_tokens": final.tokens, "total_tokens": total}


class _ChatVoice(_OpenAiVoice):
    """/v1/chat/completions."""

    kind = "chatcmpl"
    _first = True
    _called = False

    def say(self, content: str, thinking: str, calls: str, probs: str) -> None:
        """Write one event."""
        delta: dict[str, Any] = {}
        if self._first:
            delta["role"] = "assistant"
            self._first = False
        if content or not (thinking or calls):
            delta["content"] = content
        if thinking:
            delta["reasoning"] = thinking
        if calls:
            self._called = True
            delta["tool_calls"] = _calls(calls)
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        self._event(self._object("chat.completion.chunk", choices=[choice]))

    def done(self, final: Final) -> None:
        """End the answer."""
        left = "".join(self._tool_text)
        reason = "tool_calls" if final.reason == "stop" and (self._calls or self._called) else final.reason
        if not self.stream:
            message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content) + left}
            if any(self._thinking):
                message["reasoning"] = "".join(self._thinking)
            if self._calls:
                message["tool_calls"] = _calls(",".join(self._calls))
            choice = {"index": 0, "message": message, "finish_reason": reason}
            whole = self._object("chat.completion", choices=[choice], usage=self._used(final))
            self.exchange.answer(200, dumps(whole).encode() + b"\n", "application/json")
            return
        self.begin()
        if self._first or left:
            self.say(left, "", "", "")
        choice = {"index": 0, "delta": {}, "finish_reason": reason}
        self._event(self._object("chat.completion.chunk", choices=[choice]))
        if self._usage:
            self._event(self._object("chat.completion.chunk", choices=[], usage=self._used(final)))
        self._event(None)
        self.exchange.end()


class _TextVoice(_OpenAiVoice):
    """/v1/completions."""

    kind = "cmpl"

    def say(self, content: str, thinking: str, calls: str, probs: str) -> None:
        """Write one event."""
        self._event(self._object("text_completion", choices=[self._choice(content, None)]))

    def done(self, final: Final) -> None:
        """End the answer."""
        if not self.stream:
            choice = self._choice("".join(self._content), final.reason)
            whole = self._object("text_completion", choices=[choice], usage=self._used(final))
            self.exchange.answer(200, dumps(whole).encode() + b"\n", "application/json")
            return
        self.begin()
        self._event(self._object("text_completion", choices=[self._choice("", final.reason)]))
        if self._usage:
            self._event(self._object("text_completion", choices=[], usage=self._used(final)))
        self._event(None)
        self.exchange.end()

    @staticmethod
    def _choice(text: str, reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": 0, "finish_reason": reason}


def _parse(exchange: Exchange) -> dict[str, Any]:
    try:
        asked = parse_json(exchange.body)
    except ApiError as error:
        # The middleware hands on the decoder's own word for an empty body.
        message = "EOF" if error.message == "missing request body" else error.message
        raise ApiError(error.status, message) from None
    if not isinstance(asked, dict):
        raise ApiError(400, "json: cannot unmarshal into Go value of type openai.ChatCompletionRequest")
    return asked


def _common(asked: Mapping[str, Any], *limits: str) -> dict[str, Any]:
    options = {name: asked[name] for name in _OPTIONS if asked.get(name) is not None}
    for name in limits:
        if asked.get(name) is not None:
            options["num_predict"] = asked[name]
    stop = asked.get("stop")
    if stop:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    return {"model": asked.get("model"), "options": options, "stream": asked.get("stream") is True}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return {"role": message.get("role"), "content": content or ""}


def _calls(text: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape (openai/openai.go, ToToolCalls()): the arguments are text."""
    return [
        {
            "id": call["id"],
            "index": call["function"]["index"],
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": dumps(call["function"]["arguments"]),
            },
        }
        for call in json.loads(f"[{text}]")
    ]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _CREATED, "owned_by": "library"}
