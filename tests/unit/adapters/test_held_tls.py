"""Held requests over TLS: the encrypted record of the last byte leaves as promptly as the plain byte."""

from __future__ import annotations

import ssl
from functools import partial

import pytest
import trustme

from tests.unit.adapters.raw_server import Connection, raw_server
from tests.unit.adapters.test_held_transport import BODY, read_all
from unisono.adapters.held import HeldTransport, parse_endpoint, release
from unisono.core.errors import BackendUnavailableError


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority of this test's own."""
    return trustme.CA()


@pytest.fixture
def server_side(authority: trustme.CA) -> ssl.SSLContext:
    """The server's side, with a certificate for localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


def lacks_one(seen: Connection, body: bytes) -> bool:
    """Whether all of the body but one byte has come."""
    return len(seen.body) == len(body) - 1


async def test_a_held_request_over_tls(authority: trustme.CA, server_side: ssl.SSLContext) -> None:
    """All but the last byte is there and held; it comes with the release; large bodies and answers pass."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    body = b'{"prompt":"' + b"x" * 5_000_000 + b'"}'
    async with raw_server(tls=server_side, host="localhost") as server:
        endpoint = parse_endpoint(f"https://localhost:{server.port}", default_port=1)
        transport = HeldTransport(endpoint, backend="test", ssl_context=trusting)
        exchanges = [await transport.stage("/api/generate", one) for one in (BODY, body)]
        for index, one in enumerate((BODY, body)):
            seen = await server.connection(index)
            await seen.until(partial(lacks_one, seen, one))
            assert seen.body == one[:-1]
        release(exchanges)
        for index, one in enumerate((BODY, body)):
            seen = await server.connection(index)
            await seen.until_whole()
            assert seen.body == one
            await seen.say_json(b"[" + b"1," * 500_000 + b"1]")
            assert await read_all(exchanges[index]) == (200, b"[" + b"1," * 500_000 + b"1]")
            await seen.until_closed()


async def test_abort_and_close_over_tls(authority: trustme.CA, server_side: ssl.SSLContext) -> None:
    """Closing works from both sides while a request is held."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with raw_server(tls=server_side, host="localhost") as server:
        endpoint = parse_endpoint(f"https://localhost:{server.port}", default_port=1)
        transport = HeldTransport(endpoint, backend="test", ssl_context=trusting)
        ours, theirs = [await transport.stage("/api/chat", BODY) for _ in range(2)]
        ours.abort()
        await (await server.connection(0)).until_closed()
        (await server.connection(1)).reset()
        await theirs.wait_closed()
        assert theirs.is_closed
        theirs.abort()


async def test_an_unknown_authority_is_refused(server_side: ssl.SSLContext) -> None:
    """A certificate that nobody vouches for makes the backend unavailable, and the message says why."""
    async with raw_server(tls=server_side, host="localhost") as server:
        endpoint = parse_endpoint(f"https://localhost:{server.port}", default_port=1)
        with pytest.raises(BackendUnavailableError, match="certificate verify failed"):
            await HeldTransport(endpoint, backend="test").stage("/api/chat", BODY)
