"""Which part of the stand-in answers a request, by method and path; and what is said before any of them is asked."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Protocol

from tests.fakes.ollama.api import Api, StreamError
from tests.fakes.ollama.body import parse_json
from tests.fakes.ollama.faults import FaultKind, Faults
from tests.fakes.ollama.http import Exchange, fail
from tests.fakes.ollama.openai import OpenAi, openai_error
from tests.fakes.ollama.wire import ApiError, dumps


class Server(Protocol):
    """What the routes need of the server."""

    faults: Faults
    version: str
    passes: int
    prompt_tokens_computed: int
    loads: int


class Routes:
    """Answers whole requests."""

    def __init__(self, server: Server, api: Api, openai: OpenAi) -> None:
        self._server = server
        self._openai = openai
        self._routes = {
            ("POST", "/api/chat"): api.chat,
            ("POST", "/api/generate"): api.generate,
            ("POST", "/api/embed"): api.embed,
            ("POST", "/api/embeddings"): api.embeddings,
            ("POST", "/api/show"): api.show,
            ("GET", "/api/tags"): api.tags,
            ("GET", "/api/ps"): api.ps,
            ("GET", "/api/version"): self._say_version,
            ("GET", "/"): self._say_hello,
            ("GET", "/metrics"): self._say_metrics,
            ("POST", "/v1/chat/completions"): openai.chat,
            ("POST", "/v1/completions"): openai.completions,
            ("POST", "/v1/embeddings"): openai.embeddings,
            ("GET", "/v1/models"): openai.models,
        }
        for path in ("/", "/api/tags", "/api/version"):  # those that answer HEAD too
            self._routes["HEAD", path] = self._routes["GET", path]

    async def answer(self, exchange: Exchange) -> None:
        """One request: a fault, an answer, or an error in the manner of its API."""
        live = exchange.live
        if exchange.body:
            try:
                live.body = parse_json(exchange.body)
            except ApiError:
                live.body = None
            if isinstance(live.body, dict) and isinstance(live.body.get("model"), str):
                live.model = live.body["model"]
        exchange.fault = self._server.faults.take(live.path, live.body) if self._server.faults.all else None
        if exchange.fault is not None and await self._at_once(exchange):
            return
        if not _allowed(live.headers.get("host", "")):
            exchange.answer(403, b"", "")
            return
        is_openai = live.path.startswith("/v1/")
        try:
            handler = self._routes.get((live.method, live.path))
            if handler is not None:
                await handler(exchange)
            elif not await self._openai.model(exchange):
                self._no_route(exchange)
        except (AttributeError, KeyError, TypeError, ValueError) as wrong:
            if not is_openai or exchange.live.fault:
                raise
            # Go refuses a value of another type while it reads; the reader here stumbles over it later.
            error = ApiError(400, f"json: cannot unmarshal: {wrong}")
            exchange.answer(error.status, openai_error(error) + b"\n", "application/json")
        except ApiError as error:
            stream = isinstance(error, StreamError) and error.stream
            if is_openai:
                exchange.answer(error.status, openai_error(error) + b"\n", "application/json")
            else:
                fail(exchange, error.status, error.message, streaming=stream)

    async def _at_once(self, exchange: Exchange) -> bool:
        """Carry out a fault that needs no model; whether that was the answer."""
        fault = exchange.fault
        assert fault is not None
        exchange.live.fault = fault.kind.value
        match fault.kind:
            case FaultKind.ANSWER:
                body = fault.body if isinstance(fault.body, bytes) else dumps(fault.body).encode()
                exchange.answer(fault.status, body, headers=dict(fault.headers))
                return True
            case FaultKind.CLOSE:
                exchange.close()
                return True
            case FaultKind.RESET if not fault.after_lines and not fault.after_bytes:
                exchange.reset()
                return True
            case FaultKind.DELAY:
                if fault.until_released:
                    await fault.released.wait()
                if fault.delay_s > 0:
                    await asyncio.sleep(fault.delay_s)
            case _:
                pass
        return False

    def _no_route(self, exchange: Exchange) -> None:
        live = exchange.live
        allowed = [method for method in ("HEAD", "GET", "POST") if (method, live.path) in self._routes]
        if allowed:
            exchange.answer(405, b"405 method not allowed", "text/plain", headers={"Allow": ", ".join(allowed)})
        else:
            exchange.answer(404, b"404 page not found", "text/plain")

    async def _say_version(self, exchange: Exchange) -> None:
        exchange.answer(200, dumps({"version": self._server.version}).encode())

    async def _say_hello(self, exchange: Exchange) -> None:
        exchange.answer(200, b"Ollama is running", "text/plain; charset=utf-8")

    async def _say_metrics(self, exchange: Exchange) -> None:
        """Its counters under the names of llama.cpp's server, for benches. Ollama has no such page."""
        values = {
            "llamacpp:n_decode_total": self._server.passes,
            "llamacpp:prompt_tokens_total": self._server.prompt_tokens_computed,
            "ollama:loads_total": self._server.loads,
        }
        text = "".join(f"{name} {value}\n" for name, value in values.items())
        exchange.answer(200, text.encode(), "text/plain; version=0.0.4")


def _allowed(host: str) -> bool:
    """Whether a server on loopback takes requests for this Host (routes.go, allowedHostsMiddleware())."""
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.lower() in ("", "localhost") or name.lower().endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or address.is_private or address.is_unspecified
