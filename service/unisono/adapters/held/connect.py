"""Opens connections: names resolved once a while, TCP without delay, TLS, Unix sockets."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, Final

import httpcore

from unisono.adapters.held.stream import HeldStream

if TYPE_CHECKING:
    from unisono.adapters.held.endpoint import Endpoint

# For how long an answer of the name service is used.
NAME_KEPT_S: Final = 5.0

# A host that vanished without a word is noticed after about a minute instead of never.
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))

# Family and socket address, as `getaddrinfo` gives them.
_Address = tuple[int, Any]


def _reason(error: OSError) -> str:
    """The system's own words, where the number is the system's: "Connection refused"."""
    if error.errno is None or isinstance(error, (ssl.SSLError, socket.gaierror)):
        return str(error)
    return os.strerror(error.errno)


def _numeric(endpoint: Endpoint) -> _Address | None:
    """The socket address of an endpoint that is an IP address; None for a name."""
    host, port = endpoint.host, endpoint.port
    try:
        version = ipaddress.ip_address(host.partition("%")[0]).version
    except ValueError:
        return None
    if version == 4:
        return socket.AF_INET, (host, port)
    # What stands behind the % is looked up.
    return (socket.AF_INET6, (host, port, 0, 0)) if "%" not in host else None


async def _reach(sock: socket.socket, where: Any) -> None:
    """Connects. A machine that is near has accepted by the second look, which saves a round of the loop."""
    if not sock.connect_ex(where) or _has_peer(sock):
        return
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
    except OSError as error:
        # It has accepted since; on Linux, that is no error.
        if error.errno != errno.EISCONN:
            raise


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


class Connector:
    """Opens connections to one endpoint."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float, ssl_context: ssl.SSLContext | None = None) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._ssl_context = ssl_context
        if endpoint.is_tls and ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        # An endpoint that is an address needs no look-up.
        self._fixed = _numeric(endpoint)
        self._addresses: list[_Address] = []
        self._resolved_at = 0.0
        self._resolving = asyncio.Lock()

    async def open(self) -> HeldStream:
        """Opens a connection. Raises ConnectTimeout and ConnectError, with the address in the message."""
        where = self._endpoint.url
        stream = HeldStream()
        try:
            async with asyncio.timeout(self._timeout_s):
                sock = await self._connect()
                await self._attach(stream, sock)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"{where} did not accept a connection in {self._timeout_s} s") from error
        except OSError as error:  # ssl.SSLError and socket.gaierror are such
            raise httpcore.ConnectError(f"{where}: {_reason(error)}") from error
        return stream

    async def _attach(self, stream: HeldStream, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            carrier, _ = await loop.create_connection(lambda: stream, sock=sock)
        except BaseException:
            sock.close()
            raise
        transport: asyncio.Transport | None = carrier
        if self._endpoint.is_tls and self._ssl_context is not None:
            try:
                transport = await loop.start_tls(
                    carrier, stream, self._ssl_context, server_hostname=self._endpoint.host
                )
            except BaseException:
                carrier.abort()
                raise
            if transport is None:  # asyncio's answer where the connection is lost during the handshake
                raise ConnectionResetError("the connection was lost during the TLS handshake")
        stream.attach(transport or carrier, carrier, sock)

    async def _connect(self) -> socket.socket:
        if self._endpoint.socket_path:
            return await self._connect_to((socket.AF_UNIX, self._endpoint.socket_path))
        failure: OSError | None = None
        for address in await self._resolve():
            try:
                sock = await self._connect_to(address)
            except OSError as error:
                failure = failure or error
                continue
            if self._addresses and self._addresses[0] != address:  # the one that answers comes first next time
                self._addresses.sort(key=lambda known: known != address)
            return sock
        raise failure or OSError("the name has no address")

    async def _connect_to(self, address: _Address) -> socket.socket:
        family, where = address
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)  # noqa: FBT003 - socket's own
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEPALIVE:
                    if hasattr(socket, name):
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            await _reach(sock, where)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _resolve(self) -> tuple[_Address, ...]:
        """The endpoint's addresses; a burst of connections asks the name service once."""
        if self._fixed is not None:
            return (self._fixed,)
        host, port = self._endpoint.host, self._endpoint.port
        async with self._resolving:
            if not self._addresses or time.monotonic() - self._resolved_at > NAME_KEPT_S:
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
                fresh: list[_Address] = list(dict.fromkeys((family, where) for family, _, _, _, where in found))
                if set(fresh) != set(self._addresses):
                    self._addresses = fresh
                self._resolved_at = time.monotonic()
            return tuple(self._addresses)
