"""The drop-in says what the backend said: every recorded answer comes back byte for byte, as soon as it is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.replay import Recorded, Replay, recorded
from tests.integration.service import LIMIT_S
from unisono.bootstrap import running
from unisono.config import Settings

WIRE = Path(__file__).parent.parent / "fixtures" / "wire"
CASES = sorted(path.stem for path in WIRE.glob("*.json"))
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
# Of each answer, these are said anew for each connection.
OWN = {"date", "transfer-encoding", "content-length", "x-request-id"}


def case_of(name: str) -> dict[str, Any]:
    """A recording."""
    loaded: dict[str, Any] = json.loads((WIRE / f"{name}.json").read_text())
    return loaded


def stream(*pieces: bytes, **fields: Any) -> Recorded:
    """A streamed answer to CHAT."""
    usual: dict[str, Any] = {
        "method": "POST",
        "target": "/api/chat",
        "body": json.dumps(CHAT).encode(),
        "status": 200,
        "headers": {"content-type": "application/x-ndjson", "transfer-encoding": "chunked"},
        "pieces": list(pieces),
    }
    return Recorded(**{**usual, **fields})


def line(text: str, **fields: Any) -> bytes:
    """A line of a streamed chat."""
    whole = {"model": "m", "created_at": "2026-11-21T09:35:42.68Z", "message": {"role": "assistant", "content": text}}
    return json.dumps({**whole, "done": False, **fields}).encode() + b"\n"


@asynccontextmanager
async def drop_in(replay: Replay, **settings: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the HTTP port of a service in front of it."""
    usual = {"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", "state_dir": "none", "data_dir": "none"}
    made = Settings(**{**usual, "ollama_url": replay.url, "drain": 0.0, **settings})
    async with (
        running(made, with_http=True) as service,
        httpx.AsyncClient(base_url=service.http_url, timeout=LIMIT_S, trust_env=False) as client,
    ):
        yield client


async def ask(client: httpx.AsyncClient, answer: Recorded) -> httpx.Response:
    """Asks for a recorded answer, with the recorded bytes."""
    headers = {"content-type": "application/json"} if answer.body else {}
    # A path that Ollama does not have was recorded, which this service has.
    target = "/api/nothing" if answer.target == "/api/batch/chat" else answer.target
    return await client.request(answer.method, target, content=answer.body, headers=headers)


@pytest.mark.parametrize("is_known", [True, False], ids=["in_the_window", "plainly"])
@pytest.mark.parametrize("case", CASES)
async def test_every_recorded_answer_comes_back(case: str, is_known: bool) -> None:  # noqa: FBT001 - a parameter
    """Status, headers and every byte of the body, whether the house knows the model or not."""
    answer = recorded(case_of(case))
    body = case_of(case)["request"]["body"]
    model = body["model"] if isinstance(body, dict) and "model" in body else "m"
    async with Replay(answer, models=(model,) if is_known and model else ()) as replay, drop_in(replay) as client:
        got = await ask(client, answer)
    assert got.status_code == answer.status
    assert got.content == b"".join(answer.pieces)
    told = {name: value for name, value in got.headers.items() if name not in OWN}
    assert told == {name: value for name, value in answer.headers.items() if name not in OWN}
    is_ours = case in ("error_method", "error_path")
    # Asked once, and with the caller's own bytes. The service asks for the version and the models by itself, too.
    theirs = [one for one in replay.matching if one.header("accept-encoding") is None]
    assert len(theirs) == (0 if is_ours else 1)


async def test_a_request_goes_as_it_came() -> None:
    """Body, query and headers; Host, and what concerns one connection, are our own."""
    spaced = b'{ "model":"m",\n "messages":[{"role":"user","content":"hi"}], "unknown":{"a":[1,2.50]} }\n \n'
    answer = stream(line("a"), line("", done=True), target="/api/chat?x=%20y&x=2", body=spaced)
    headers = {
        "Content-Type": "text/plain",
        "Authorization": "Bearer mine",
        "X-Of-Mine": "a b",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "TE": "trailers",
        "User-Agent": "somebody/1",
        "Accept-Encoding": "gzip",
    }
    for token in ("", "configured"):
        async with Replay(answer, models=("m",)) as replay, drop_in(replay, backend_token=token) as client:
            got = await client.post(answer.target, content=spaced, headers=headers)
            assert got.status_code == 200
            (asked,) = replay.matching
        assert asked.header("content-type") == "text/plain"
        assert asked.header("x-of-mine") == "a b"
        assert asked.header("user-agent") == "somebody/1"
        assert asked.header("content-length") == str(len(spaced))
        assert asked.header("host") == replay.url.removeprefix("http://")
        assert asked.header("authorization") == ("Bearer configured" if token else "Bearer mine")
        assert [asked.header(name) for name in ("x-hop", "te", "accept-encoding")] == [None] * 3


async def test_what_is_held_is_the_end_of_the_body() -> None:
    """Blanks behind the object are held with its last byte: a backend that reads up to there does not begin early."""
    body = json.dumps(CHAT).encode() + b"\n\n"
    answer = stream(line("a"), line("", done=True), body=body)
    async with Replay(answer, models=("m",)) as replay, drop_in(replay) as client:
        assert (await ask(client, answer)).status_code == 200
        assert len(replay.matching) == 1


async def test_pieces_come_as_they_are_made() -> None:
    """Each is there before the next is made; and the chunk that ends it comes after the last."""
    gate = asyncio.Semaphore(0)
    pieces = [line(text) for text in "abc"] + [line("", done=True)]
    answer = stream(*pieces, gate=gate)
    async with (
        Replay(answer, models=("m",)) as replay,
        drop_in(replay) as client,
        asyncio.timeout(LIMIT_S),
        client.stream("POST", "/api/chat", content=answer.body) as got,
    ):
        chunks = got.aiter_raw()
        for piece in pieces:
            assert await anext(chunks) == piece
            gate.release()
        assert await anext(chunks, None) is None


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_cut_answer_is_cut(is_known: bool) -> None:  # noqa: FBT001 - a parameter
    """What had come is passed on, then the connection ends as the backend's did; nothing is asked twice."""
    answer = stream(line("a"), line("b"), is_cut=True)
    async with Replay(answer, models=("m",) if is_known else ()) as replay, drop_in(replay) as client:
        async with client.stream("POST", "/api/chat", content=answer.body) as got:
            assert got.status_code == 200
            seen = bytearray()
            with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 - what came before is kept
                async for chunk in got.aiter_raw():
                    seen += chunk
        assert b"".join(answer.pieces).startswith(seen)
        assert len(replay.matching) == 1


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_caller_that_leaves_frees_the_slot(is_known: bool) -> None:  # noqa: FBT001 - a parameter
    """The connection to the backend is closed at once, before the head of an answer or in its middle."""
    gate = asyncio.Semaphore(0)
    answer = stream(line("a"), line("b"), line("", done=True), gate=gate)
    async with Replay(answer, models=("m",) if is_known else ()) as replay, drop_in(replay) as client:
        async with asyncio.timeout(LIMIT_S):
            async with client.stream("POST", "/api/chat", content=answer.body) as got:
                assert await anext(got.aiter_raw()) == answer.pieces[0]
                assert replay.open == 1
            while replay.open:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.005)


async def test_a_slow_reader_slows_itself_only() -> None:
    """Of a large answer that nobody reads, only so much is taken from the backend; others are answered meanwhile."""
    piece = line("x" * 100_000)
    answer = stream(*[piece] * 400, line("", done=True))
    async with Replay(answer, models=("m",)) as replay, drop_in(replay) as client:
        async with client.stream("POST", "/api/chat", content=answer.body) as got:
            chunks = got.aiter_raw()
            first = await anext(chunks)
            # 40 MB would have been through in this time many times over.
            await asyncio.sleep(0.5)
            assert replay.open == 1
            assert (await client.get("/api/tags")).status_code == 200
            rest = [chunk async for chunk in chunks]
        assert first + b"".join(rest) == b"".join(answer.pieces)


async def test_nobody_s_status_is_changed() -> None:
    """Refusals and failures that no table of ours knows, with their headers."""
    for status in (401, 403, 418, 429, 499, 500, 502, 503, 504, 529):
        headers = {"content-type": "text/x", "retry-after": "7", "x-theirs": "1"}
        answer = stream(b"what it says", status=status, headers=headers)
        async with Replay(answer, models=("m",)) as replay, drop_in(replay) as client:
            got = await ask(client, answer)
        assert (got.status_code, got.content) == (status, b"what it says")
        assert {name: got.headers[name] for name in headers} == headers
        assert len(replay.matching) == 1
