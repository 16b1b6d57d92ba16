"""The backend port, for a llama.cpp server.

A held request occupies one of the server's HTTP threads until it is released; it makes new ones as it needs them (80
held requests delayed no other).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx
import msgspec

from unisono.adapters.held import (
    ExchangeCall,
    ForwardedCall,
    HeldExchange,
    HeldTransport,
    StreamReader,
    WholeBodyReader,
    parse_endpoint,
    read_all,
    release,
    translated,
)
from unisono.adapters.llama_server.answer import EmbeddingReader, TextReader
from unisono.adapters.llama_server.failures import failure
from unisono.adapters.llama_server.props import Models, Props, model_info
from unisono.adapters.llama_server.request import build_request, refuse_other_runner, refuse_shift
from unisono.app.ports import HeldCall, LoadOutcome, PlainAnswer, Relay, ReleaseTimes
from unisono.core.errors import (
    BackendBusyError,
    BadAnswerError,
    CallerError,
    LoadFailedError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
)
from unisono.core.model import EmbedRequest, LoadedRunner, PassMethod

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence

    from unisono.core.model import Finished, Forwarded, Item, ModelInfo, RunnerSpec, Spoke

_T = TypeVar("_T")

PORT: Final = 8080
# To learn whether it embeds: a server that does refuses the empty text, any other refuses the whole idea.
_NO_TEXT: Final = b'{"input":""}'
# How often a server that is loading its model is asked again.
_LOOK_AGAIN_S: Final = 0.1


class LlamaServerCall(ExchangeCall):
    """A held request to a llama.cpp server. See the port `HeldCall`."""

    def __init__(
        self, exchange: HeldExchange, reader: TextReader | EmbeddingReader, *, backend: str, model: str
    ) -> None:
        super().__init__(exchange, backend=backend, model=model)
        self._reader = reader

    async def answer(self) -> AsyncGenerator[Spoke | Finished, None]:
        """See the port."""
        reader = self._reader
        try:
            response = await self.exchange.response()
            async with contextlib.aclosing(self.exchange.chunks()) as chunks:
                if response.status != 200:
                    body = await self._refusal(chunks)
                    raise failure(response.status, body, backend=self._backend, model=self._model)
                async for chunk in chunks:
                    for piece in reader.feed(chunk):
                        yield piece
                    if reader.is_done:
                        return
                for piece in reader.end():
                    yield piece
        finally:
            self.exchange.abort()


class LlamaServerBackend:
    """One llama.cpp server. See the port `Backend`."""

    def __init__(
        self,
        *,
        name: str = "llama-server",
        url: str,
        headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = 5.0,
        answer_timeout_s: float = 30.0,
        load_timeout_s: float = 600.0,
        send_timeout_s: float = 30.0,
    ) -> None:
        """Opens nothing yet; must be made inside the event loop. Raises ValueError for an address that is none."""
        self._endpoint = parse_endpoint(url, default_port=PORT)
        self._name = name
        self._load_timeout_s = load_timeout_s
        self._transport = HeldTransport(
            self._endpoint,
            backend=name,
            headers=headers,
            connect_timeout_s=connect_timeout_s,
            patience_s=send_timeout_s,
        )
        own = dict(headers or {})
        if self._endpoint.authorization:
            own.setdefault("Authorization", self._endpoint.authorization)
        self._http = httpx.AsyncClient(
            transport=self._transport,
            base_url="http://localhost" if self._endpoint.socket_path else self._endpoint.url,
            headers=own | {"Connection": "close"},
            timeout=answer_timeout_s,
            trust_env=False,
        )
        # Tokens of context of each slot, once the server has told; 0 before.
        self._slot_context = 0
        # Whether it embeds, by the build and model that were asked.
        self._embeds: dict[tuple[str, str], bool] = {}

    @property
    def name(self) -> str:
        """See the port."""
        return self._name

    @property
    def kind(self) -> str:
        """See the port."""
        return "llama-server"

    @property
    def url(self) -> str:
        """See the port."""
        return self._endpoint.url

    @property
    def pass_method(self) -> PassMethod:
        """See the port: the server tells no time of day; see answer.py."""
        return PassMethod.ARRIVAL

    async def version(self) -> str:
        """See the port: the server's build. A server that is loading its model answers too."""
        try:
            return (await self._props()).build_info
        except BackendBusyError:
            return ""

    async def models(self) -> tuple[ModelInfo, ...]:
        """See the port: the one that the server was started with."""
        found = self._read(Models, await self._get("/v1/models"))
        props = await self._props()
        embeds = await self._can_embed(props)
        return tuple(model_info(model, props, backend=self._name, embeds=embeds) for model in found.data)

    async def find_model(self, name: str) -> ModelInfo:
        """See the port. A server with one model answers to its name, and to none."""
        known = await self.models()
        wanted = _comparable(name)
        if not wanted and len(known) == 1:
            return known[0]
        for model in known:
            if wanted == _comparable(model.name):
                return model
        has = ", ".join(model.name for model in known) or "none"
        raise ModelNotFoundError(
            f"backend {self._name} has no model {name!r}; it was started with: {has}. Ask for that, or for none",
            metadata={"backend": self._name, "model": name},
        )

    async def loaded(self) -> tuple[LoadedRunner, ...]:
        """See the port: what it was started with is always loaded."""
        slots = (await self._props()).total_slots or None
        return tuple(
            LoadedRunner(
                model=model.name,
                digest=model.digest,
                context_length=self._slot_context,
                size_bytes=model.size_bytes,
                slots=slots,
            )
            for model in await self.models()
        )

    async def load(self, runner: RunnerSpec, *, keep_alive_s: float) -> LoadOutcome:  # noqa: ARG002 - the port's
        """See the port: waits until the server has loaded its model, which it keeps whatever `keep_alive_s` says."""
        began = time.monotonic()
        was_loaded = True
        props: Props | None = None
        while props is None:
            try:
                props = await self._props()
            except BackendBusyError as error:
                was_loaded = False
                if time.monotonic() - began > self._load_timeout_s:
                    raise LoadFailedError(
                        f"backend {self._name} is still loading its model after {self._load_timeout_s:g} s",
                        metadata={"backend": self._name},
                    ) from error
                await asyncio.sleep(_LOOK_AGAIN_S)
        refuse_other_runner(runner.options, self._slot_context)
        refuse_shift(runner.shift, "shift")
        return LoadOutcome(
            was_loaded=was_loaded,
            duration_s=time.monotonic() - began,
            slots=props.total_slots or None,
            context_tokens=self._slot_context,
        )

    async def unload(self, runner: RunnerSpec) -> None:
        """See the port: it cannot."""

    async def stage(
        self, item: Item, runner: RunnerSpec, headers: Mapping[str, str], relay: Relay | None = None
    ) -> LlamaServerCall | ForwardedCall:
        """See the port."""
        if item.forwarded is not None and relay is not None:
            return self._forwarded(await self._transport.stage_forwarded(item.forwarded, headers), relay, item)
        path, body = build_request(item, model=runner.model, slot_context=self._slot_context)
        exchange = await self._transport.stage(path, body, headers)

        def since_release_s() -> float:
            return 0.0 if exchange.released_at is None else time.monotonic() - exchange.released_at

        reader: TextReader | EmbeddingReader
        if isinstance(item.request, EmbedRequest):
            reader = EmbeddingReader(
                backend=self._name,
                model=runner.model,
                since_release_s=since_release_s,
                now_ns=time.time_ns,
                texts=len(item.request.input),
            )
        else:
            reader = TextReader(
                backend=self._name,
                model=runner.model,
                since_release_s=since_release_s,
                now_ns=time.time_ns,
                top_logprobs=item.request.top_logprobs or 0,
            )
        return LlamaServerCall(exchange, reader, backend=self._name, model=runner.model)

    def _forwarded(self, exchange: HeldExchange, relay: Relay, item: Item) -> ForwardedCall:
        """The call of a request that was staged as it came: one of OpenAI's API, which is what it speaks."""

        def reader_of(content_type: str) -> StreamReader | WholeBodyReader:
            if content_type == "text/event-stream":
                return StreamReader(backend=self._name, model=item.model)
            return WholeBodyReader(is_embedding=isinstance(item.request, EmbedRequest))

        return ForwardedCall(
            exchange,
            relay,
            reader_of=reader_of,
            failure=lambda head, body: failure(head.status, body, backend=self._name, model=item.model),
            backend=self._name,
            model=item.model,
        )

    async def pass_on(self, request: Forwarded, body: AsyncIterable[bytes] | None = None) -> PlainAnswer:
        """See the port."""
        return await self._transport.pass_on(request, body)

    def release(self, calls: Sequence[HeldCall]) -> ReleaseTimes:
        """See the port."""
        first_ns, last_ns = release([call.exchange for call in calls if isinstance(call, ExchangeCall)])
        return ReleaseTimes(first_ns=first_ns, last_ns=last_ns)

    async def close(self) -> None:
        """Closes every connection, those of held calls too."""
        await self._http.aclose()

    async def engine_counters(self) -> dict[str, float]:
        """The engine's own counters from /metrics, without their prefix, to check what was counted from outside."""
        text = (await self._get("/metrics")).decode()
        found = re.findall(r"^llamacpp:(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    async def busy_slots(self) -> int:
        """How many slots are computing, from /slots. For tests."""
        slots: list[dict[str, Any]] = msgspec.json.decode(await self._get("/slots"))
        return sum(1 for slot in slots if slot["is_processing"])

    async def _props(self) -> Props:
        props = self._read(Props, await self._get("/props"))
        self._slot_context = props.default_generation_settings.n_ctx
        return props

    async def _can_embed(self, props: Props) -> bool:
        """Whether the server was started with `--embeddings`, which nothing but its answer tells."""
        asked = (props.build_info, props.model_path)
        if asked not in self._embeds:
            try:
                _ = await self._get("/v1/embeddings", _NO_TEXT)
            except ModelLacksCapabilityError:
                self._embeds[asked] = False
            except CallerError:
                self._embeds[asked] = True
        return self._embeds.setdefault(asked, True)

    async def _get(self, path: str, body: bytes | None = None) -> bytes:
        """A plain request; a body makes it a POST."""
        with translated(self._name):
            async with self._http.stream("GET" if body is None else "POST", path, content=body) as answer:
                content = await read_all(answer, self._name)
        if answer.status_code == 200:
            return content
        raise failure(answer.status_code, content, backend=self._name, model="")

    def _read(self, kind: type[_T], text: bytes) -> _T:
        try:
            return msgspec.json.decode(text, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadAnswerError(
                f"backend {self._name}: the answer cannot be read, is it a llama.cpp server? {error}"
            ) from error


def _comparable(name: str) -> str:
    return name.strip().lower().removesuffix(":latest")
