"""The held transport: what a server sees of a request, and when."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.adapters.raw_server import LIMIT_S, STREAM_HEAD, Connection, RawServer, chunked, raw_server
from unisono.adapters.held import HeldExchange, HeldTransport, parse_endpoint, release
from unisono.adapters.held import connect as connect_module
from unisono.core.errors import BackendUnavailableError, ConnectionLostError, InternalError
from unisono.core.model import Forwarded

BODY = b'{"model":"m","messages":[]}'


def transport_to(server: RawServer, **settings: Any) -> HeldTransport:
    """A transport to the server."""
    endpoint = parse_endpoint(f"127.0.0.1:{server.port}", default_port=1)
    return HeldTransport(endpoint, backend="test", **settings)


async def read_all(exchange: HeldExchange) -> tuple[int, bytes]:
    """An exchange's status and body."""
    response = await exchange.response()
    return response.status, b"".join([chunk async for chunk in exchange.chunks()])


async def settle() -> None:
    """Lets everything happen that can happen without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    """A server that only listens."""
    async with raw_server() as running:
        yield running


# -- Holding and releasing ---------------------------------------------------------------------------------------


async def test_all_but_the_last_byte_is_sent_and_held(server: RawServer) -> None:
    """A staged request has arrived whole but for its `}`, which comes with the release and not before."""
    exchange = await transport_to(server).stage("/api/chat", BODY)
    seen = await server.connection()
    await seen.until(lambda: seen.body == BODY[:-1])
    await asyncio.sleep(0.2)  # the promise is that nothing happens in this time
    assert seen.body == BODY[:-1]
    assert not exchange.is_closed
    assert exchange.held_s == 0.0
    release([exchange])
    await seen.until_whole()
    assert seen.body == BODY
    assert exchange.held_s >= 0.2
    await seen.say_json(b"{}")
    assert await read_all(exchange) == (200, b"{}")
    exchange.abort()


async def test_the_request_is_framed_by_its_length_and_carries_the_headers(server: RawServer) -> None:
    """Content-Length, no chunks; configured headers, those of the call, and no use of the connection afterwards."""
    transport = transport_to(server, headers={"Authorization": "Bearer abc"})
    exchange = await transport.stage("/api/chat", BODY, {"traceparent": "00-1-2-01"})
    seen = await server.connection()
    await seen.until(lambda: seen.body == BODY[:-1])
    assert seen.head.split(b"\r\n") == [
        b"POST /api/chat HTTP/1.1",
        b"Host: 127.0.0.1:%d" % server.port,
        b"Authorization: Bearer abc",
        b"Content-Type: application/json",
        b"Connection: close",
        b"Content-Length: %d" % len(BODY),
        b"traceparent: 00-1-2-01",
    ]
    exchange.abort()


async def test_a_prefix_stands_before_every_path(server: RawServer) -> None:
    """An Ollama behind a path of a proxy is asked there, in held and in plain requests."""

    async def answer(seen: Connection) -> None:
        await seen.until_whole()
        await seen.say_json(b"{}")

    server.handler = answer
    endpoint = parse_endpoint(f"http://127.0.0.1:{server.port}/some/prefix/", default_port=1)
    transport = HeldTransport(endpoint, backend="test")
    exchange = await transport.stage("/api/chat", BODY)
    release([exchange])
    await read_all(exchange)
    async with httpx.AsyncClient(transport=transport, base_url=endpoint.url, trust_env=False) as client:
        await client.get("/api/tags")
    lines = [seen.head.split(b"\r\n")[0] for seen in server.connections]
    assert lines == [b"POST /some/prefix/api/chat HTTP/1.1", b"GET /some/prefix/api/tags HTTP/1.1"]
    exchange.abort()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"a":1}\n', b"x"])
async def test_a_body_that_does_not_end_in_a_brace_is_not_sent(server: RawServer, body: bytes) -> None:
    """Only a final `}` holds a request back, so nothing else is accepted."""
    with pytest.raises(ValueError, match="must end with }"):
        await transport_to(server).stage("/api/chat", body)
    await settle()
    assert not server.connections


async def test_a_header_that_cannot_be_sent(server: RawServer) -> None:
    """A header that would break the request's framing is a defect of this service, told before anything is opened."""
    transport = transport_to(server)
    forwarded = Forwarded(method="POST", target="/api/chat", body=BODY)
    for stage in (partial(transport.stage, "/api/chat", BODY), partial(transport.stage_forwarded, forwarded)):
        with pytest.raises(InternalError):
            await stage({"traceparent": "00\r\nX: y"})
    _ = await transport.stage("/api/chat", BODY)
    await server.connection()
    assert len(server.connections) == 1


async def test_a_wave_is_released_in_its_order(server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bytes leave in the order of the calls, in one go: nothing else runs between the first and the last."""
    transport = transport_to(server)
    exchanges = await asyncio.gather(*[transport.stage("/api/chat", BODY) for _ in range(16)])
    order: list[int] = []
    others: list[int] = []
    for index, exchange in enumerate(exchanges):

        def record(index: int = index, send: Callable[[], None] = exchange.send_last) -> None:
            order.append(index)
            send()

        monkeypatch.setattr(exchange, "send_last", record)
    asyncio.get_running_loop().call_soon(lambda: others.append(len(order)))
    wanted = exchanges[::-1]
    first_ns, last_ns = release(wanted)
    assert order == list(range(15, -1, -1))
    assert not others
    assert 0 <= last_ns - first_ns < 1_000_000_000
    times = [exchange.released_at for exchange in wanted]
    assert times == sorted(times, key=lambda t: t or 0.0)
    for index in range(16):
        seen = await server.connection(index)
        await seen.until_whole()
    for exchange in exchanges:
        exchange.abort()


async def test_a_release_leaves_out_what_is_closed_and_what_was_released(server: RawServer) -> None:
    """Releasing twice sends nothing twice; a closed call does not disturb the others."""
    transport = transport_to(server)
    gone, kept = [await transport.stage("/api/chat", BODY) for _ in range(2)]
    gone.abort()
    release([gone, kept])
    released_at = kept.released_at
    release([gone, kept])
    seen = await server.connection(1)
    await seen.until_whole()
    assert seen.body == BODY
    assert kept.released_at == released_at
    assert gone.released_at is None
    first_ns, last_ns = release([])
    assert first_ns == last_ns
    kept.abort()


async def test_a_body_of_five_megabytes_is_staged(server: RawServer) -> None:
    """What is larger than every buffer on the way arrives, and is held like anything else."""
    body = b'{"prompt":"' + b"x" * 5_000_000 + b'"}'
    async with asyncio.timeout(LIMIT_S):
        exchange = await transport_to(server).stage("/api/generate", body)
    seen = await server.connection()
    await seen.until(lambda: len(seen.body) == len(body) - 1)
    release([exchange])
    await seen.until_whole()
    assert seen.body == body
    exchange.abort()


async def test_staging_waits_for_a_server_that_does_not_read(server: RawServer) -> None:
    """Staged means that the other machine has the bytes; one that takes none in time is unavailable."""
    server.reads = False
    with pytest.raises(BackendUnavailableError, match=r"took nothing for 0\.2 s"):
        await transport_to(server, patience_s=0.2).stage("/api/generate", b'{"p":"' + b"x" * 20_000_000 + b'"}')


# -- The other side closes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_close_while_held_is_told(server: RawServer, how: str) -> None:
    """wait_closed returns when the server closes a held connection, so that it can be staged again."""
    exchange = await transport_to(server).stage("/api/chat", BODY)
    waiting = asyncio.create_task(exchange.wait_closed())
    seen = await server.connection()
    await seen.until(lambda: seen.body == BODY[:-1])
    assert not waiting.done()
    getattr(seen, how)()
    async with asyncio.timeout(LIMIT_S):
        await waiting
    assert exchange.is_closed
    release([exchange])
    assert exchange.released_at is None
    exchange.abort()
    with pytest.raises(ConnectionLostError):
        await exchange.response()


async def test_a_close_while_held_leaves_nothing_to_clean_up(server: RawServer) -> None:
    """A held call that the server closed may simply be forgotten: no task of it is left."""
    transport = transport_to(server)
    exchange = await transport.stage("/api/chat", BODY)
    (await server.connection()).close()
    await exchange.wait_closed()
    del exchange
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert all("RawServer" in repr(task.get_coro()) for task in others)
    assert not transport._open


async def test_waiting_for_a_close_ends_with_the_release(server: RawServer) -> None:
    """Nobody waits on for the close of a call that is no longer held."""
    exchange = await transport_to(server).stage("/api/chat", BODY)
    waiting = asyncio.create_task(exchange.wait_closed())
    await settle()
    release([exchange])
    async with asyncio.timeout(LIMIT_S):
        await waiting
    assert not exchange.is_closed
    exchange.abort()


async def test_an_early_answer_waits_for_its_reader(server: RawServer) -> None:
    """A proxy that refuses before the body is whole, and closes, is read as a refusal, not as a lost connection."""
    exchange = await transport_to(server).stage("/api/chat", BODY)
    seen = await server.connection()
    await seen.say_json(b'{"error":"no"}', status=401)
    seen.close()
    await asyncio.sleep(0.05)
    assert not exchange.is_closed
    release([exchange])
    assert await read_all(exchange) == (401, b'{"error":"no"}')
    exchange.abort()


async def test_an_early_answer_ends_the_staging_of_a_large_body(server: RawServer) -> None:
    """A server that refuses a large body unread is heard at once."""
    server.reads = False

    async def refuse(seen: Connection) -> None:
        await seen.say_json(b'{"error":"too large"}', status=413)

    server.handler = refuse
    async with asyncio.timeout(LIMIT_S):
        exchange = await transport_to(server).stage("/api/chat", b'{"p":"' + b"x" * 20_000_000 + b'"}')
    release([exchange])
    assert await read_all(exchange) == (413, b'{"error":"too large"}')
    exchange.abort()


async def test_a_close_while_the_request_is_sent_costs_nothing(server: RawServer) -> None:
    """A backend that closes before it has the request has done nothing for it: unavailable, not a failed attempt."""

    async def slam(seen: Connection) -> None:
        seen.reset()

    server.handler = slam
    server.reads = False
    with pytest.raises(BackendUnavailableError):
        await transport_to(server).stage("/api/chat", b'{"p":"' + b"x" * 20_000_000 + b'"}')


# -- abort -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["held", "released", "streaming", "over"])
async def test_abort_closes_the_connection_at_every_stage(server: RawServer, stage: str) -> None:
    """It closes at once, needs no waiting, and can be called again and again."""
    exchange = await transport_to(server).stage("/api/chat", BODY)
    seen = await server.connection()
    reading: asyncio.Task[Any] | None = None
    if stage != "held":
        release([exchange])
        await seen.until_whole()
    if stage in {"streaming", "over"}:
        await seen.say(STREAM_HEAD + chunked(b"{}\n", ends=stage == "over"))
        chunks = exchange.chunks()
        assert await anext(chunks) == b"{}\n"
        reading = asyncio.ensure_future(anext(chunks, None))
        await settle()
    exchange.abort()
    exchange.abort()
    await seen.until_closed()
    assert exchange.is_closed
    if reading is None:
        with pytest.raises(ConnectionLostError, match="closed on this side"):
            await exchange.response()
    else:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.wait([reading])
        assert (reading.exception() is None) == (stage == "over")
    exchange.abort()


async def test_a_cancelled_staging_leaves_no_connection(server: RawServer) -> None:
    """A caller who goes away while a request is being sent takes its connection with it."""
    server.reads = False
    staging = asyncio.create_task(transport_to(server).stage("/api/chat", b'{"p":"' + b"x" * 20_000_000 + b'"}'))
    seen = await server.connection()
    await settle()
    staging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await staging
    server.reads = True
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(LIMIT_S):
            while await seen.reader.read(1 << 20):
                pass


async def test_a_cancelled_plain_request_leaves_no_connection() -> None:
    """Whenever its caller goes away, in each round of the loop up to its end."""

    async def answer(seen: Connection) -> None:
        await seen.say_json(b"{}")

    cancelled = 0
    async with raw_server(answer) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(transport=transport_to(server), base_url=url) as client:
            for rounds in itertools.count():
                asking = asyncio.create_task(client.get("/api/version"))
                for _ in range(rounds):
                    await asyncio.sleep(0)
                if asking.done():
                    break
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                cancelled += 1
                await settle()
                for seen in server.connections:
                    await seen.until_closed()
    assert cancelled > 5


async def test_closing_the_transport_closes_held_calls(server: RawServer) -> None:
    """Nothing stays open behind a service that ends."""
    transport = transport_to(server)
    exchanges = [await transport.stage("/api/chat", BODY) for _ in range(3)]
    await transport.aclose()
    for index in range(3):
        await (await server.connection(index)).until_closed()
    assert all(exchange.is_closed for exchange in exchanges)


# -- Connections -------------------------------------------------------------------------------------------------


async def test_each_request_has_a_connection_of_its_own(server: RawServer) -> None:
    """No connection is used twice, and none is left open behind an answer."""
    transport = transport_to(server)
    for index in range(3):
        exchange = await transport.stage("/api/chat", BODY)
        release([exchange])
        seen = await server.connection(index)
        await seen.until_whole()
        await seen.say_json(b"{}")
        await read_all(exchange)
        await seen.until_closed()
    assert len(server.connections) == 3
    assert not transport._open


async def test_small_requests_go_out_without_delay(server: RawServer) -> None:
    """TCP_NODELAY is set: the kernel must not keep the last byte back as well."""
    exchange = await transport_to(server).stage("/api/chat", BODY)
    sock = exchange._stream.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    exchange.abort()


@pytest.mark.parametrize("has_accepted_since", [False, True])
async def test_a_machine_that_is_far(
    server: RawServer, monkeypatch: pytest.MonkeyPatch, *, has_accepted_since: bool
) -> None:
    """A connection that is not there at once is waited for."""
    waited_for: list[Any] = []
    loop = asyncio.get_running_loop()
    wait = loop.sock_connect

    async def sock_connect(sock: socket.socket, where: Any) -> None:
        waited_for.append(where)
        await wait(sock, where)
        if has_accepted_since:
            raise OSError(errno.EISCONN, "Transport endpoint is already connected")

    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    monkeypatch.setattr(connect_module, "_has_peer", lambda _: False)
    exchange = await transport_to(server).stage("/api/chat", BODY)
    assert waited_for == [("127.0.0.1", server.port)]
    exchange.abort()


async def test_nobody_listens() -> None:
    """A refused connection is an unavailable backend, and the message says where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        transport = HeldTransport(parse_endpoint(f"127.0.0.1:{port}", default_port=1), backend="test")
        with pytest.raises(BackendUnavailableError, match=f"127.0.0.1:{port}.*refused"):
            await transport.stage("/api/chat", BODY)


async def test_a_connection_that_takes_too_long(server: RawServer) -> None:
    """The time limit covers the TLS handshake too: this server never answers it."""
    endpoint = parse_endpoint(f"https://127.0.0.1:{server.port}", default_port=1)
    transport = HeldTransport(endpoint, backend="test", connect_timeout_s=0.1)
    with pytest.raises(BackendUnavailableError, match=r"did not accept a connection in 0\.1 s"):
        await transport.stage("/api/chat", BODY)
    await (await server.connection()).until_closed()


async def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve is an unavailable backend."""

    async def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    transport = HeldTransport(parse_endpoint("no.such.host", default_port=11434), backend="test")
    with pytest.raises(BackendUnavailableError, match="Name or service not known"):
        await transport.stage("/api/chat", BODY)


async def test_a_burst_asks_the_name_service_once(server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look-up serves a wave; an address that does not answer is passed over and comes last the next time."""
    loop = asyncio.get_running_loop()
    asked: list[str] = []
    tcp = (socket.AF_INET, socket.SOCK_STREAM, 6, "")

    async def lookup(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(*tcp, ("127.0.0.1", 9)), (*tcp, ("127.0.0.1", port))]

    monkeypatch.setattr(loop, "getaddrinfo", lookup)
    endpoint = parse_endpoint(f"some.host:{server.port}", default_port=1)
    transport = HeldTransport(endpoint, backend="test")
    exchanges = await asyncio.gather(*[transport.stage("/api/chat", BODY) for _ in range(8)])
    assert asked == ["some.host"]
    assert transport._connector._addresses[0][1] == ("127.0.0.1", server.port)
    for exchange in exchanges:
        exchange.abort()
    monkeypatch.setattr(connect_module, "NAME_KEPT_S", -1.0)
    (await transport.stage("/api/chat", BODY)).abort()
    assert len(asked) == 2
    assert transport._connector._addresses[0][1] == ("127.0.0.1", server.port)


async def test_a_unix_socket(tmp_path: Path) -> None:
    """A backend on a Unix socket is held and released like any other."""
    path = str(tmp_path / "s")
    async with raw_server(socket_path=path) as server:
        exchange = await HeldTransport(parse_endpoint(f"unix:{path}", default_port=1), backend="test").stage(
            "/x", BODY
        )
        seen = await server.connection()
        await seen.until(lambda: seen.body == BODY[:-1])
        release([exchange])
        await seen.until_whole()
        await seen.say_json(b"{}")
        assert await read_all(exchange) == (200, b"{}")
        exchange.abort()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_an_ipv6_address() -> None:
    """A backend on an IPv6 address is held and released like any other."""
    async with raw_server(host="::1") as server:
        transport = HeldTransport(parse_endpoint(f"[::1]:{server.port}", default_port=1), backend="test")
        exchange = await transport.stage("/x", BODY)
        seen = await server.connection()
        await seen.until(lambda: seen.body == BODY[:-1])
        assert b"Host: [::1]:%d\r\n" % server.port in seen.head
        exchange.abort()


# -- Plain requests ----------------------------------------------------------------------------------------------


async def test_plain_requests_of_an_httpx_client(server: RawServer) -> None:
    """The same transport serves an httpx client: requests with and without a body, answers in one piece or many."""

    async def answer(seen: Connection) -> None:
        await seen.until_whole()
        await seen.say(STREAM_HEAD + chunked(b"got ", seen.head.split()[0], b" ", seen.body or b"nothing"))

    server.handler = answer
    transport = transport_to(server)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(transport=transport, base_url=url, trust_env=False) as client:
        assert (await client.get("/a")).text == "got GET nothing"
        assert (await client.post("/a", content=b"hello")).text == "got POST hello"
    for index in range(2):
        await (await server.connection(index)).until_closed()


async def test_plain_requests_fail_by_httpx_names(server: RawServer) -> None:
    """An httpx client meets httpx's own errors: a silent server, one that closes, one that is not there."""
    transport = transport_to(server)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(transport=transport, base_url=url, timeout=0.1, trust_env=False) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/a")

        async def slam(seen: Connection) -> None:
            await seen.until_whole()
            seen.close()

        server.handler = slam
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/a")
    gone = HeldTransport(parse_endpoint("127.0.0.1:9", default_port=1), backend="test")
    async with httpx.AsyncClient(transport=gone, base_url="http://127.0.0.1:9", trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/a")
