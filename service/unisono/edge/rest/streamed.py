"""Answers that are written as they come: each piece is made when the one before it was taken.

So a slow reader slows only itself, and one that goes away is noticed at once, also while nothing is to be said.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from unisono.core.errors import InternalError, UnisonoError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping

    from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class StreamedResponse(Response):
    """Sends what a generator makes; the generator is closed when the caller goes away."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        *,
        media_type: str,
        report_defect: Callable[[str, BaseException], None],
        on_end: Callable[[], object] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`on_end` is called when nothing more is sent, also where nothing ever was."""
        self._pieces = pieces
        self._on_end = on_end
        self._report_defect = report_defect
        self.status_code = 200
        self.background = None
        # Proxies that gather an answer before they pass it on would hold back all of it.
        fixed = {"content-type": media_type, "cache-control": "no-store", "x-accel-buffering": "no"}
        self.init_headers({**fixed, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await while_there(self._send(scope, send), receive)
        except ClientDisconnect:
            # Nobody reads the rest.
            return
        except Exception as defect:
            # The answer has begun: that it breaks off is all that its reader can be told. Errors of the house are no
            # defects: a service that is being stopped leaves its readers to the next one.
            if isinstance(defect, InternalError) or not isinstance(defect, UnisonoError):
                self._report_defect(f"{scope['method']} {scope['path']}", defect)
            raise
        finally:
            self._on_end()

    async def _send(self, scope: Scope, send: Send) -> None:
        headers: Any = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        async with aclosing(self._pieces) as pieces:
            if scope["method"] != "HEAD":
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_there(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Does something while the caller is there. Where it goes away that is cancelled: raises ClientDisconnect.

    The request's body must have been read.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        _ = await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        _ = leaving.cancel(), doing.cancel()
        _ = await asyncio.gather(leaving, doing, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
