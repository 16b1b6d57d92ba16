"""The backend that all sides use: what it is, and how it is asked directly.

All sides send equal bodies: the same options, no silent cutting of prompts, whole answers in one piece unless passes
must be counted from their tokens. So a side differs from another by when and how it sends, and by nothing else.
"""

from __future__ import annotations

import calendar
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from unisono.bench.workloads import Ask

OLLAMA, LLAMA_SERVER = "ollama", "llama-server"
# What is asked of the backend besides its work takes no longer.
_LOOK_S = 10.0
_LOAD_S = 600.0


class BenchError(Exception):
    """Nothing can be measured; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An inference server."""

    url: str
    # OLLAMA or LLAMA_SERVER.
    kind: str
    version: str
    # Those that answer in words, the default first.
    models: tuple[str, ...]
    # How many requests it computes side by side; None where it does not tell.
    slots: int | None
    headers: dict[str, str] = field(default_factory=dict)
    # How many of the models the user has named.
    named: int = 0

    def model_of(self, ask: Ask) -> str:
        """The name of the model that a request is for."""
        return self.models[ask.model % len(self.models)]

    def client(self) -> httpx.AsyncClient:
        """A client without limits; proxies of the environment are for other machines."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # A bench waits as long as it takes.
        never = httpx.Timeout(None)
        return httpx.AsyncClient(
            base_url=self.url, headers=self.headers, limits=limits, timeout=never, trust_env=False
        )


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of one request."""

    name: str
    tokens: int = 0
    # All of its prompt, what was found in a cache too.
    prompt_tokens: int = 0
    latency_s: float = 0.0
    # When each token was made, where it was streamed, in nanoseconds since 1970.
    times_ns: list[int] = field(default_factory=list)
    # Why there is no answer; "" where there is one.
    error: str = ""


async def look(url: str, *, token: str = "", slots: int | None = None, models: tuple[str, ...] = ()) -> Backend:
    """Finds out what is at an address. Raises BenchError where it is nothing that can be measured."""
    address = url if "://" in url else f"http://{url}"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=_LOOK_S, trust_env=False) as client:
        try:
            version = await client.get("/api/version")
            if version.status_code == 200:
                found = await _look_at_ollama(client, address, version.json()["version"])
            else:
                found = await _look_at_llama_server(client, address)
        except httpx.HTTPError as error:
            raise BenchError(f"nothing answers at {address}: {type(error).__name__} {error}") from error
        except (KeyError, ValueError, TypeError) as error:
            raise BenchError(f"what answers at {address} is neither an Ollama nor a llama.cpp server") from error
    if unknown := [name for name in models if not any(_is_same(name, known) for known in found.models)]:
        raise BenchError(f"{address} has no model {', '.join(unknown)}; it has {', '.join(found.models)}")
    if not found.models:
        raise BenchError(f"{address} has no model that answers in words: `ollama pull NAME`")
    return Backend(
        url=found.url,
        kind=found.kind,
        version=found.version,
        models=models or found.models,
        slots=slots or found.slots,
        headers=headers,
        named=len(models),
    )


async def _look_at_ollama(client: httpx.AsyncClient, url: str, version: str) -> Backend:
    """The loaded model first, then the smallest: as `unisono run` chooses."""
    tags = (await client.get("/api/tags")).json()["models"]
    loaded = {each["name"] for each in (await client.get("/api/ps")).json()["models"]}
    tags.sort(key=lambda each: (each["name"] not in loaded, each["size"], each["name"]))
    names = []
    for each in tags:
        about = (await client.post("/api/show", json={"model": each["name"]})).json()
        if "completion" in (about.get("capabilities") or ["completion"]):
            names.append(each["name"])
    return Backend(url=url, kind=OLLAMA, version=version, models=tuple(names), slots=None)


async def _look_at_llama_server(client: httpx.AsyncClient, url: str) -> Backend:
    props = (await client.get("/props")).json()
    models = (await client.get("/v1/models")).json()["data"]
    return Backend(
        url=url,
        kind=LLAMA_SERVER,
        version=str(props.get("build_info", "")),
        models=tuple(each["id"] for each in models),
        slots=int(props["total_slots"]),
    )


def _is_same(name: str, known: str) -> bool:
    return name.removesuffix(":latest") == known.removesuffix(":latest")


# -- Asking it directly ----------------------------------------------------------------------------------------


async def ask(client: httpx.AsyncClient, backend: Backend, one: Ask, *, streams: bool) -> Answer:
    """Sends one request and reads its answer; never raises, what went wrong is in the answer."""
    path, body = request_of(backend, one, streams=streams)
    answer = Answer(name=one.name)
    began = time.perf_counter()
    try:
        if streams:
            async with client.stream("POST", path, json=body) as response:
                if response.status_code == 200:
                    async for line in response.aiter_lines():
                        _read_line(backend, line, answer)
                else:
                    answer.error = _error_of(response.status_code, await response.aread())
        else:
            response = await client.post(path, json=body)
            if response.status_code == 200:
                _read_whole(backend, response.json(), answer)
            else:
                answer.error = _error_of(response.status_code, response.content)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.latency_s = time.perf_counter() - began
    if not answer.error and not answer.tokens:
        answer.error = "an answer without an end"
    return answer


def request_of(backend: Backend, one: Ask, *, streams: bool) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request."""
    body: dict[str, Any] = {"model": backend.model_of(one), "messages": messages_of(one), "stream": streams}
    if backend.kind == OLLAMA:
        return "/api/chat", body | {"truncate": False, "options": options_of(one)}
    if streams:
        body["stream_options"] = {"include_usage": True}
    return "/v1/chat/completions", body | {
        "max_tokens": one.num_predict,
        "temperature": 0,
        "cache_prompt": True,
        **EXTRA,
    }


# What only llama.cpp's server knows: no answer ends before its length, so that all sides have equal work.
EXTRA: dict[str, Any] = {"ignore_eos": True}


def messages_of(one: Ask) -> list[dict[str, str]]:
    """A request's messages."""
    system = [{"role": "system", "content": one.system}] if one.system else []
    return [*system, {"role": "user", "content": one.user}]


def options_of(one: Ask) -> dict[str, Any]:
    """A request's options, as Ollama names them."""
    options: dict[str, Any] = {"temperature": 0, "num_predict": one.num_predict}
    return options | ({"num_ctx": one.num_ctx} if one.num_ctx else {})


def _read_whole(backend: Backend, found: dict[str, Any], answer: Answer) -> None:
    if backend.kind == OLLAMA:
        answer.tokens = found["eval_count"]
        answer.prompt_tokens = found.get("prompt_eval_count", 0)
    else:
        answer.tokens = found["usage"]["completion_tokens"]
        answer.prompt_tokens = found["usage"]["prompt_tokens"]


def _read_line(backend: Backend, line: str, answer: Answer) -> None:
    text = line.removeprefix("data: ")
    if not text.startswith("{"):
        return
    found = json.loads(text)
    if "error" in found:
        answer.error = str(found["error"])
    elif found.get("done") or found.get("usage"):
        _read_whole(backend, found, answer)
    elif backend.kind == LLAMA_SERVER:
        answer.times_ns.append(time.time_ns())
    else:
        answer.times_ns.append(_nanoseconds(found["created_at"]))


def _nanoseconds(stamp: str) -> int:
    """Nanoseconds since 1970 of Go's RFC 3339 in UTC: "2026-11-21T09:34:30.841237365Z"."""
    seconds, _, fraction = stamp.rstrip("Z").partition(".")
    whole = calendar.timegm(time.strptime(seconds, "%Y-%m-%dT%H:%M:%S"))
    return whole * 1_000_000_000 + int(fraction[:9].ljust(9, "0") or 0)


def _error_of(status: int, content: bytes) -> str:
    return f"{status} {content[:200].decode(errors='replace')}"


# -- Its models ------------------------------------------------------------------------------------------------


async def warm(backend: Backend, model: str) -> None:
    """Has an Ollama load a model with its default options. Raises BenchError."""
    if backend.kind == OLLAMA:
        await _command(backend, {"model": model, "messages": [], "keep_alive": 600})


async def unload(backend: Backend, model: str) -> None:
    """Has an Ollama forget a model, and waits until it has. Raises BenchError."""
    if backend.kind != OLLAMA:
        return
    await _command(backend, {"model": model, "messages": [], "keep_alive": 0})
    async with backend.client() as client:
        until = time.monotonic() + _LOOK_S
        while any(_is_same(each["name"], model) for each in (await client.get("/api/ps")).json()["models"]):
            if time.monotonic() > until:
                raise BenchError(f"{model} is not unloaded after {_LOOK_S:.0f} s: somebody else uses it")


async def _command(backend: Backend, body: dict[str, Any]) -> None:
    async with backend.client() as client:
        response = await client.post("/api/chat", json=body, timeout=_LOAD_S)
        if response.status_code != 200:
            raise BenchError(f"{body['model']}: {_error_of(response.status_code, response.content)}")
