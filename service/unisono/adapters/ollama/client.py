"""The backend port, for Ollama."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import httpx
import msgspec

from unisono.adapters.held import ExchangeCall, HeldExchange, HeldTransport, read_all, release, translated
from unisono.adapters.ollama.answer import AnswerReader, EmbeddingReader, TextReader, arrival_ns
from unisono.adapters.ollama.failures import failure, retry_after_s
from unisono.adapters.ollama.forwarded import forwarded_call
from unisono.adapters.ollama.host import normalised, parse_host
from unisono.adapters.ollama.models import Shown, read_runners, read_show, read_shown, read_tags, read_version
from unisono.adapters.ollama.request import build_load, build_request
from unisono.app.ports import HeldCall, LoadOutcome, PlainAnswer, Relay, ReleaseTimes
from unisono.core.errors import (
    BadAnswerError,
    ConnectionLostError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    UnisonoError,
)
from unisono.core.model import EmbedRequest, PassMethod

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence

    from unisono.core.model import Finished, Forwarded, Item, LoadedRunner, ModelInfo, RunnerSpec, Spoke

_T = TypeVar("_T")

# A load that found its runner there answers within this; starting a runner takes longer, even for a tiny model.
_QUICK_LOAD_S: Final = 0.25
# Models of which something is remembered.
_MOST_REMEMBERED: Final = 1000


class OllamaCall(ExchangeCall):
    """A held request to Ollama. See the port `HeldCall`."""

    def __init__(self, exchange: HeldExchange, reader: AnswerReader, *, backend: str, model: str) -> None:
        super().__init__(exchange, backend=backend, model=model)
        self._reader = reader

    async def answer(self) -> AsyncGenerator[Spoke | Finished, None]:
        """See the port."""
        reader = self._reader
        try:
            response = await self.exchange.response()
            async with contextlib.aclosing(self.exchange.chunks()) as chunks:
                if response.status != 200:
                    raise failure(
                        response.status,
                        await self._refusal(chunks),
                        backend=self._backend,
                        model=self._model,
                        retry_after_s=retry_after_s(response.headers),
                    )
                while not reader.is_done:
                    try:
                        chunk = await anext(chunks, None)
                    except ConnectionLostError:
                        last = None
                        for last in reader.cut():
                            yield last
                        if last is None:
                            raise
                        return
                    for piece in reader.end() if chunk is None else reader.feed(chunk):
                        yield piece
        finally:
            self.exchange.abort()


class OllamaBackend:
    """One Ollama host. See the port `Backend`."""

    def __init__(
        self,
        *,
        name: str = "ollama",
        url: str = "",
        headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = 5.0,
        answer_timeout_s: float = 30.0,
        load_timeout_s: float = 600.0,
        send_timeout_s: float = 30.0,
        ssl_context: ssl.SSLContext | None = None,
        now_ns: Callable[[], int] = arrival_ns,
    ) -> None:
        """Opens nothing yet; must be made inside the event loop.

        `url` is anything that OLLAMA_HOST may be; `headers` go with every request (a token). `answer_timeout_s`
        is for the short calls (version, models, …), `load_timeout_s` for loading a model, `send_timeout_s` for
        how long sending a request may stand still. Raises ValueError for an address that is none.
        """
        self._endpoint = parse_host(url)
        self._name = name
        self._now_ns = now_ns
        self._load_timeout_s = load_timeout_s
        # By digest, what /api/show told.
        self._shown: dict[str, Shown] = {}
        self._transport = HeldTransport(
            self._endpoint,
            backend=name,
            headers=headers,
            connect_timeout_s=connect_timeout_s,
            patience_s=send_timeout_s,
            ssl_context=ssl_context,
        )
        own = dict(headers or {})
        if self._endpoint.authorization:
            own.setdefault("Authorization", self._endpoint.authorization)
        base = "http://localhost" if self._endpoint.socket_path else self._endpoint.url
        self._http = httpx.AsyncClient(
            transport=self._transport,
            base_url=base,
            headers=own | {"Connection": "close"},
            timeout=answer_timeout_s,
            trust_env=False,
        )

    @property
    def name(self) -> str:
        """See the port."""
        return self._name

    @property
    def kind(self) -> str:
        """See the port."""
        return "ollama"

    @property
    def url(self) -> str:
        """See the port."""
        return self._endpoint.url

    @property
    def pass_method(self) -> PassMethod:
        """See the port: Ollama stamps each chunk when its token is there."""
        return PassMethod.CREATED_AT

    async def version(self) -> str:
        """See the port."""
        return self._read(read_version, await self._call("GET", "/api/version"))

    async def models(self) -> tuple[ModelInfo, ...]:
        """See the port."""
        text = await self._call("GET", "/api/tags")
        return self._read(lambda t: read_tags(t, self._name), text)

    async def find_model(self, name: str) -> ModelInfo:
        """See the port."""
        known = await self.models()
        if not name.strip():
            if len(known) == 1:
                return await self._as_shown(known[0])
            names = ", ".join(model.name for model in known[:10]) or "none"
            raise ModelNotFoundError(
                f"no model was named, and backend {self._name} does not have exactly one; it has: {names}",
                metadata={"backend": self._name},
            )
        wanted = normalised(name)
        for model in known:
            if normalised(model.name) == wanted:
                return await self._as_shown(model)
        return self._read(lambda t: read_show(t, self._name, name), await self._show(name))

    async def _as_shown(self, model: ModelInfo) -> ModelInfo:
        """The model with what only /api/show tells of it, which is asked once for each digest.

        Nothing depends on it but an estimate and how passes are counted: where it is not told, the model is as good
        without.
        """
        if model.digest not in self._shown:
            try:
                told = self._read(read_shown, await self._show(model.name))
            except UnisonoError:
                return model
            if len(self._shown) >= _MOST_REMEMBERED:
                self._shown.clear()
            self._shown[model.digest] = told
        return self._shown[model.digest].of(model)

    async def _show(self, name: str) -> bytes:
        return await self._call("POST", "/api/show", msgspec.json.encode({"model": name}), model=name)

    async def loaded(self) -> tuple[LoadedRunner, ...]:
        """See the port."""
        return self._read(read_runners, await self._call("GET", "/api/ps"))

    async def load(self, runner: RunnerSpec, *, keep_alive_s: float) -> LoadOutcome:
        """See the port. What /api/ps does not tell (num_batch, …) is judged by how long the load took."""
        seen = any(
            held.digest == runner.digest and runner.options.num_ctx in {None, held.context_length}
            for held in await self.loaded()
        )
        began = time.monotonic()
        try:
            await self._load(runner, keep_alive_s, as_embedding=runner.is_embedding)
        except ModelLacksCapabilityError:
            if runner.is_embedding:
                raise
            await self._load(runner, keep_alive_s, as_embedding=True)
        took_s = time.monotonic() - began
        return LoadOutcome(
            was_loaded=seen and took_s < _QUICK_LOAD_S, duration_s=took_s, context_tokens=await self._context(runner)
        )

    async def _context(self, runner: RunnerSpec) -> int:
        """Tokens of context that a runner was given; 0 where that cannot be had, which is no reason to fail."""
        with contextlib.suppress(UnisonoError):
            return next((held.context_length for held in await self.loaded() if held.digest == runner.digest), 0)
        return 0

    async def _load(self, runner: RunnerSpec, keep_alive_s: float, *, as_embedding: bool) -> None:
        path, body = build_load(runner, keep_alive_s=keep_alive_s, as_embedding=as_embedding)
        await self._call("POST", path, body, model=runner.model, timeout_s=self._load_timeout_s, is_loading=True)

    async def unload(self, runner: RunnerSpec) -> None:
        """See the port. An empty chat unloads embedding models too (server/routes.go, ChatHandler)."""
        path, body = build_load(runner, keep_alive_s=0, as_embedding=False)
        await self._call("POST", path, body, model=runner.model)

    async def stage(
        self, item: Item, runner: RunnerSpec, headers: Mapping[str, str], relay: Relay | None = None
    ) -> HeldCall:
        """See the port."""
        if item.forwarded is not None and relay is not None:
            exchange = await self._transport.stage_forwarded(item.forwarded, headers)
            return forwarded_call(exchange, relay, item, backend=self._name, model=runner.model, now_ns=self._now_ns)
        path, body = build_request(item, runner)
        exchange = await self._transport.stage(path, body, headers)
        kind: Callable[..., AnswerReader] = TextReader
        if isinstance(item.request, EmbedRequest):
            kind = partial(EmbeddingReader, texts=len(item.request.input))
        reader = kind(backend=self._name, model=runner.model, held_s=lambda: exchange.held_s, now_ns=self._now_ns)
        return OllamaCall(exchange, reader, backend=self._name, model=runner.model)

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

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        model: str = "",
        timeout_s: float | None = None,
        is_loading: bool = False,
    ) -> bytes:
        """A plain request; returns the answer's body."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else httpx.Timeout(timeout_s)
        with translated(self._name):
            async with self._http.stream(method, path, content=body, headers=headers, timeout=timeout) as answer:
                content = await read_all(answer, self._name)
        if answer.status_code == 200:
            return content
        raise failure(
            answer.status_code,
            content,
            backend=self._name,
            model=model,
            is_loading=is_loading,
            retry_after_s=retry_after_s(answer.headers.raw),
        )

    def _read(self, reader: Callable[[bytes], _T], text: bytes) -> _T:
        try:
            return reader(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadAnswerError(
                f"backend {self._name}: the answer cannot be read, is it an Ollama? {error}",
                metadata={"backend": self._name},
            ) from error
