"""The endpoints under /api, each in the order of checks of its handler in Ollama's server/routes.go.

One difference is known: what only the runner finds out (a prompt too long, a format that is no schema, an image
for a model that sees none) is answered at once here; a real server waits for a slot first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.fakes.ollama import catalogue
from tests.fakes.ollama.answers import CONTENT, Answer, Script, tokenize, write_script
from tests.fakes.ollama.body import bind
from tests.fakes.ollama.embeddings import UNSUPPORTED, embed_body, inputs_of, legacy_body
from tests.fakes.ollama.faults import FaultKind
from tests.fakes.ollama.http import Exchange
from tests.fakes.ollama.models import FakeModel, Options, parse_name, resolve_options
from tests.fakes.ollama.runner import Runner
from tests.fakes.ollama.scheduler import Scheduler
from tests.fakes.ollama.turn import Turn
from tests.fakes.ollama.voices import ApiVoice, GenerateVoice, Voice
from tests.fakes.ollama.wire import ApiError, WallClock, dumps, quote

_IMAGE_TOKENS = 64  # invented: what an image costs
VoiceMaker = Callable[[Script, list[str]], Voice]


class Api:
    """Answers requests to /api with the models and runners of one server."""

    def __init__(
        self,
        models: Mapping[str, FakeModel],
        scheduler: Scheduler,
        clock: WallClock,
        answers: list[tuple[str, Answer]],
    ) -> None:
        self.models = models  # by short name, in lower case
        self.scheduler = scheduler
        self.clock = clock
        self._answers = answers

    # Names.

    def find(self, body: Mapping[str, Any], *, empty: tuple[int, str], missing: str = "") -> FakeModel:
        """The model that a request names; ApiError as the endpoint says it for none, a bad or an unknown name."""
        name = body.get("model") or ""
        if not name:
            raise ApiError(*empty)
        short = parse_name(name)
        if short is None:
            raise ApiError(400, "invalid model name")
        model = self.models.get(short.lower())
        if model is None:
            raise ApiError(404, missing or f"model '{name}' not found")
        return model

    # Endpoints.

    async def chat(self, exchange: Exchange) -> None:
        """POST /api/chat."""
        body = bind(exchange.body, "ChatRequest")
        await self.chat_body(exchange, body, None)

    async def chat_body(self, exchange: Exchange, body: dict[str, Any], voice: VoiceMaker | None) -> None:
        """A chat request that is parsed; with `voice`, written in another dialect."""
        _check_logprobs(body)
        model = self.find(body, empty=(400, "model is required"))
        messages: list[dict[str, Any]] = [message for message in body.get("messages") or () if message]
        name = body["model"]
        if not messages and body.get("keep_alive") == 0:
            self.scheduler.expire(model)
            exchange.answer(200, self._empty_chat(name, "unload"))
            return
        think = self._thinks(model, body)
        tools = body.get("tools") or []
        self._require(model, name, "chat", ["tools"] if tools else [])
        options = resolve_options(model, body.get("options"), shift=body.get("shift"))
        runner = await self._acquire(exchange, model, options, body)
        try:
            loaded_ns = time.monotonic_ns()
            if not messages:
                exchange.answer(200, self._empty_chat(name, "load"))
                return
            if model.system and messages[0].get("role") != "system":
                messages = [{"role": "system", "content": model.system}, *messages]
            stream = body.get("stream") is not False
            try:
                prompt = self._chat_prompt(model, runner, messages, options, body)
                script = self._script(prompt, messages, body, options, runner, thinks=think, tools=bool(tools))
            except ApiError as error:
                raise StreamError(error, stream=stream) from None
            speak = (
                voice(script, prompt)
                if voice is not None
                else ApiVoice(exchange, self.clock, name, script, stream=stream, logprobs=_logprobs(body))
            )
            await Turn(exchange, runner, prompt=prompt, script=script, voice=speak, loaded_ns=loaded_ns).run()
        finally:
            self.scheduler.release(runner)

    async def generate(self, exchange: Exchange) -> None:
        """POST /api/generate."""
        body = bind(exchange.body, "GenerateRequest")
        await self.generate_body(exchange, body, None)

    async def generate_body(self, exchange: Exchange, body: dict[str, Any], voice: VoiceMaker | None) -> None:
        """A generate request that is parsed; with `voice`, written in another dialect."""
        _check_logprobs(body)
        model = self.find(body, empty=(404, "model '' not found"))
        name, text, raw = body["model"], body.get("prompt") or "", bool(body.get("raw"))
        if not text and body.get("keep_alive") == 0:
            self.scheduler.expire(model)
            exchange.answer(200, self._empty_generate(name, "unload"))
            return
        if raw and (body.get("template") or body.get("system") or body.get("context")):
            raise ApiError(400, "raw mode does not support template, system, or context")
        think = self._thinks(model, body)
        self._require(model, name, "generate", ["insert"] if body.get("suffix") else [])
        options = resolve_options(model, body.get("options"), shift=body.get("shift"))
        runner = await self._acquire(exchange, model, options, body)
        try:
            loaded_ns = time.monotonic_ns()
            if not text:
                exchange.answer(200, self._empty_generate(name, "load"))
                return
            stream = body.get("stream") is not False
            messages = [{"role": "user", "content": text, "images": body.get("images") or []}]
            system = body.get("system") or model.system
            if system and not raw:
                messages.insert(0, {"role": "system", "content": system})
            try:
                if raw or body.get("suffix"):
                    self._check_images(model, messages)
                    whole = tokenize(text + (body.get("suffix") or ""))
                    prompt = self._fit(whole, runner, options, body)
                else:
                    prompt = self._chat_prompt(model, runner, messages, options, body)
                script = self._script(prompt, messages, body, options, runner, thinks=think, tools=False)
            except ApiError as error:
                raise StreamError(error, stream=stream) from None
            speak = (
                voice(script, prompt)
                if voice is not None
                else GenerateVoice(
                    exchange,
                    self.clock,
                    name,
                    script,
                    stream=stream,
                    logprobs=_logprobs(body),
                    prompt=None if raw else prompt,
                )
            )
            await Turn(exchange, runner, prompt=prompt, script=script, voice=speak, loaded_ns=loaded_ns).run()
        finally:
            self.scheduler.release(runner)

    async def embed(self, exchange: Exchange) -> None:
        """POST /api/embed."""
        body = bind(exchange.body, "EmbedRequest")
        texts = inputs_of(body) if body.get("model") else []
        exchange.answer(200, await self.embed_answer(exchange, body, texts))

    async def embed_answer(self, exchange: Exchange, body: dict[str, Any], texts: list[str]) -> bytes:
        """The answer of /api/embed to a request that is parsed."""
        model = self._find_embedding(body)
        options = resolve_options(model, body.get("options"), shift=None)
        runner = await self._acquire(exchange, model, options, body)
        try:
            return await embed_body(exchange, runner, body, texts, time.monotonic_ns())
        finally:
            self.scheduler.release(runner)

    async def embeddings(self, exchange: Exchange) -> None:
        """POST /api/embeddings, the older form."""
        body = bind(exchange.body, "EmbeddingRequest")
        if not body.get("model"):
            raise ApiError(400, "model is required")
        model = self._find_embedding(body)
        options = resolve_options(model, body.get("options"), shift=None)
        runner = await self._acquire(exchange, model, options, body)
        try:
            prompt = body.get("prompt") or ""
            if prompt and not model.can("embedding"):
                raise ApiError(500, UNSUPPORTED)
            if prompt:
                await embed_body(exchange, runner, body, [prompt], time.monotonic_ns())
            exchange.answer(200, legacy_body(model, prompt))
        finally:
            self.scheduler.release(runner)

    async def show(self, exchange: Exchange) -> None:
        """POST /api/show."""
        body = bind(exchange.body, "ShowRequest")
        body["model"] = body.get("model") or body.get("name")
        short = parse_name(body["model"] or "") or ""
        model = self.find(body, empty=(400, "model is required"), missing=f"model '{short}' not found")
        exchange.answer(200, dumps(catalogue.show(model, verbose=body.get("verbose") is True)).encode())

    async def tags(self, exchange: Exchange) -> None:
        """GET /api/tags."""
        models = [catalogue.tag(model) for model in self.models.values()]
        exchange.answer(200, dumps({"models": models}).encode())

    async def ps(self, exchange: Exchange) -> None:
        """GET /api/ps."""
        exchange.answer(200, dumps({"models": catalogue.running(self.scheduler, self.clock)}).encode())

    # Parts that the endpoints share.

    async def _acquire(
        self, exchange: Exchange, model: FakeModel, options: Options, body: Mapping[str, Any]
    ) -> Runner:
        fault = exchange.fault
        gate: asyncio.Event | None = None
        if fault is not None and fault.kind is FaultKind.SILENT_LOAD:
            gate = fault.released
        return await self.scheduler.acquire(model, options.runner, body.get("keep_alive"), gate)

    def _find_embedding(self, body: Mapping[str, Any]) -> FakeModel:
        name = body.get("model")
        return self.find(
            body,
            empty=(404, "model '' not found"),
            missing=f"model {quote(name or '')} not found, try pulling it first",
        )

    def _thinks(self, model: FakeModel, body: Mapping[str, Any]) -> bool:
        """Whether the answer thinks: a model that can does so unless told not to."""
        think = body.get("think")
        if model.can("thinking"):
            return think is not False
        if think:
            raise ApiError(400, f"{quote(body['model'])} does not support thinking")
        return False

    def _require(self, model: FakeModel, name: str, verb: str, capabilities: list[str]) -> None:
        if not model.can("completion"):
            raise ApiError(400, f"{quote(name)} does not support {verb}")
        for capability in capabilities:
            if not model.can(capability):
                raise ApiError(400, f"{model.full_name} does not support {capability}")

    def _check_images(self, model: FakeModel, messages: list[dict[str, Any]]) -> int:
        images = sum(len(message.get("images") or ()) for message in messages)
        if images and not model.can("vision"):
            text = "Multimodal data provided, but model does not support multimodal requests."
            raise ApiError(400, dumps({"error": {"code": 400, "message": text, "type": "invalid_request_error"}}))
        return images

    def _chat_prompt(
        self,
        model: FakeModel,
        runner: Runner,
        messages: list[dict[str, Any]],
        options: Options,
        body: Mapping[str, Any],
    ) -> list[str]:
        """The prompt's tokens, cut to the context where the request allows it.

        server/prompt.go, chatPrompt(): the oldest messages go first, system messages and the last one stay.
        """
        images = self._check_images(model, messages)
        tools = body.get("tools")
        parts = [(message.get("role") == "system", _rendered(message)) for message in messages]
        extra = (tokenize(dumps(tools)) if tools else []) + ["<image>"] * (_IMAGE_TOKENS * images)
        end = ["<|im_start|>", "assistant", "\n"]
        if body.get("truncate") is not False:
            total = sum(len(tokens) for _, tokens in parts) + len(extra) + len(end)
            while total > runner.num_ctx:
                old = next((at for at, (system, _) in enumerate(parts[:-1]) if not system), None)
                if old is None:
                    break
                total -= len(parts.pop(old)[1])
        prompt = [*extra]
        for _, tokens in parts:
            prompt += tokens
        prompt += end
        return self._fit(prompt, runner, options, body)

    def _fit(self, prompt: list[str], runner: Runner, options: Options, body: Mapping[str, Any]) -> list[str]:
        """The prompt, cut if it is longer than the context; ApiError(400) where it must not be cut.

        llm/llama_server.go, completionPromptForRequest() and contextShiftPromptLimit(): `num_keep` tokens at the
        begin stay, and so much of the end that half of the rest is free. Recorded: long_prompt_*.
        """
        num_ctx, count = runner.num_ctx, len(prompt)
        if body.get("truncate") is False:
            if count >= num_ctx:
                text = (
                    f"request ({count} tokens) exceeds the available context size ({num_ctx} tokens), "
                    "try increasing it"
                )
                error = {"code": 400, "message": text, "type": "exceed_context_size_error"}
                raise ApiError(400, dumps({"error": {**error, "n_prompt_tokens": count, "n_ctx": num_ctx}}))
            return prompt
        if count <= num_ctx - 1:
            return prompt
        if not options.runner.shift:
            raise ApiError(
                400,
                "the prompt is longer than the context length currently available to the model; shorten the prompt, "
                "adjust the context length in settings, or use a model with a longer context length",
            )
        keep = min(count if options.num_keep < 0 else options.num_keep, num_ctx - 1)
        limit = num_ctx - max((num_ctx - keep) // 2, 1)
        return prompt[:keep] + prompt[count - (limit - keep) :]

    def _script(
        self,
        prompt: list[str],
        messages: list[dict[str, Any]],
        body: Mapping[str, Any],
        options: Options,
        runner: Runner,
        *,
        thinks: bool,
        tools: bool,
    ) -> Script:
        form = body.get("format")
        if form not in (None, "", "json") and not isinstance(form, dict):
            wanted = 'expected "json" or a valid JSON Schema object'
            raise ApiError(500, f"invalid format: {quote(dumps(form))}; {wanted}")
        last = messages[-1].get("content") or ""
        answer = next((answer for text, answer in self._answers if text in last), None)
        script = write_script(
            "".join(prompt),
            answer=answer,
            num_predict=options.num_predict,
            num_ctx=runner.num_ctx,
            seed=options.seed,
            stop=options.stop,
            thinks=thinks,
            tools=tools,
            json_format=form or None,
        )
        room = runner.num_ctx - len(prompt)
        if not options.runner.shift and len(script.tokens) > room:
            # Without context shift an answer ends where the context ends (llama.cpp, process_token()).
            script.tokens = script.tokens[: max(room, 1)]
            script.kinds = script.kinds[: max(room, 1)] or CONTENT
            script.stops = False
        return script

    def _empty_chat(self, name: str, reason: str) -> bytes:
        return (
            f'{{"model":{quote(name)},"created_at":"{self.clock.stamp()}",'
            f'"message":{{"role":"assistant","content":""}},"done":true,"done_reason":"{reason}"}}'
        ).encode()

    def _empty_generate(self, name: str, reason: str) -> bytes:
        return (
            f'{{"model":{quote(name)},"created_at":"{self.clock.stamp()}","response":"",'
            f'"done":true,"done_reason":"{reason}"}}'
        ).encode()


class StreamError(ApiError):
    """An error of the runner: in a streamed request it is framed as a stream's first message."""

    def __init__(self, error: ApiError, *, stream: bool) -> None:
        super().__init__(error.status, error.message)
        self.stream = stream


def _rendered(message: Mapping[str, Any]) -> list[str]:
    """A message in the chat template's words: five tokens and those of the content."""
    tokens = ["<|im_start|>", message.get("role") or "", "\n", *tokenize(message.get("content") or "")]
    if message.get("tool_calls"):
        tokens += tokenize(dumps(message["tool_calls"]))
    tokens += ("<|im_end|>", "\n")
    return tokens


def _check_logprobs(body: Mapping[str, Any]) -> None:
    if not 0 <= (body.get("top_logprobs") or 0) <= 20:
        raise ApiError(400, "top_logprobs must be between 0 and 20")


def _logprobs(body: Mapping[str, Any]) -> int | None:
    return (body.get("top_logprobs") or 0) if body.get("logprobs") else None
