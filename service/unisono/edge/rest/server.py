"""The HTTP server: uvicorn, in the event loop in which everything else happens, and without its signal handlers."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import uvicorn

from unisono.edge.rest.connections import MOST_HEAD_BYTES, BoundedProtocol

if TYPE_CHECKING:
    from collections.abc import Generator

    from starlette.applications import Starlette

# A caller that says nothing more, or reads nothing, is waited for so long at the end.
_LAST_WORDS_S = 2
_BACKLOG = 128
_LOOK_S = 0.01


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are the command's business."""
        yield


class RestServer:
    """Serves an application until it is stopped."""

    def __init__(self, server: _Server, listener: socket.socket) -> None:
        self._server = server
        host, port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._serving = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))

    @classmethod
    async def start(cls, app: Starlette, host: str, port: int) -> Self:
        """Begins to serve; port 0 is any that is free. Raises OSError where it cannot listen there."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        # With the protocol's number, by which asyncio knows that a connection is TCP's and may send small pieces at
        # once. Without it, each answer of two pieces waits 40 ms for the caller's acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        # What is wrong with an upload is told to whoever sent it, and is nobody else's business.
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
            ws="none",
            lifespan="off",
            # Its log would speak of every caller that breaks the protocol.
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        started = cls(_Server(config), listener)
        while not started._server.started and not started._serving.done():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(_LOOK_S)
        return started

    async def stop(self) -> None:
        """Ends; requests that are being answered have a moment."""
        self._server.should_exit = True
        await self._serving
