"""What the network and HTTP can do, as errors of this house: the one table for it."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Final

import h11
import httpcore
import httpx

from unisono.core.errors import (
    BackendUnavailableError,
    BadAnswerError,
    ConnectionLostError,
    InternalError,
    UnisonoError,
)

# h11 and httpcore say "the peer went away" and "the peer talks nonsense" with one class.
# Source: h11 0.16 _readers.py, _connection.py; httpcore 1.0.9 _async/http11.py.
_WENT_AWAY: Final = re.compile("peer closed connection|unexpectedly closed|disconnected without sending")

# (what was raised, while a connection is being opened, afterwards), most particular first.
_TABLE: Final[tuple[tuple[tuple[type[Exception], ...], type[UnisonoError], type[UnisonoError]], ...]] = (
    (
        (httpcore.ConnectError, httpcore.ConnectTimeout, httpx.ConnectError, httpx.ConnectTimeout),
        BackendUnavailableError,
        BackendUnavailableError,
    ),
    # A request that this service made wrong: its own mistake, which no retry mends.
    ((httpcore.LocalProtocolError, h11.LocalProtocolError, httpx.LocalProtocolError), InternalError, InternalError),
    (
        (httpcore.RemoteProtocolError, h11.RemoteProtocolError, httpx.RemoteProtocolError, httpx.DecodingError),
        BadAnswerError,
        BadAnswerError,
    ),
    (
        (httpcore.NetworkError, httpcore.TimeoutException, httpx.TransportError, OSError, EOFError),
        BackendUnavailableError,
        ConnectionLostError,
    ),
)


class translated:  # noqa: N801 - reads as a word: `with translated(…)`
    """Turns what the network, TLS and HTTP raise into classes of `core.errors`; other errors pass.

    `opening`: nothing was asked of the backend yet, so that what fails is no attempt.
    """

    __slots__ = ("_backend", "_opening")

    def __init__(self, backend: str, *, opening: bool = False) -> None:
        self._backend = backend
        self._opening = opening

    def __enter__(self) -> None:
        return

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, Exception) and (mine := self._translation(error)) is not None:
            raise mine from error

    def _translation(self, error: Exception) -> UnisonoError | None:
        for classes, while_opening, afterwards in _TABLE:
            if not isinstance(error, classes):
                continue
            kind = while_opening if self._opening else afterwards
            text = str(error) or type(error).__name__
            if kind is BadAnswerError and _WENT_AWAY.search(text):
                kind = BackendUnavailableError if self._opening else ConnectionLostError
            return kind(f"backend {self._backend}: {text}", metadata={"backend": self._backend})
        return None
