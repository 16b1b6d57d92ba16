"""The small parts of the held transport: addresses, lines, the stream's order, and the table of errors."""

from __future__ import annotations

import ssl

import h11
import httpcore
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.adapters.held import Endpoint, LineSplitter, TooLongError, parse_endpoint, translated
from unisono.adapters.held.stream import HeldStream
from unisono.core.errors import (
    BackendUnavailableError,
    BadAnswerError,
    ConnectionLostError,
    InternalError,
    RepetitionError,
    UnisonoError,
)

# -- Addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:7"),
        ("  somewhere ", "http://somewhere:7"),
        ("somewhere:8", "http://somewhere:8"),
        (":8", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:7"),
        ("[::]:8", "http://[::1]:8"),
        ("::1", "http://[::1]:7"),
        ("[::1]", "http://[::1]:7"),
        ("http://somewhere", "http://somewhere"),
        ("HTTP://Somewhere/", "http://somewhere"),
        ("https://somewhere", "https://somewhere"),
        ("https://somewhere:444/a/b/", "https://somewhere:444/a/b"),
        ("somewhere/a", "http://somewhere:7/a"),
        ("http://me:s%40cret@somewhere", "http://somewhere"),
        ("http://bücher.example", "http://xn--bcher-kva.example"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("unix:///run/x.sock", "unix:/run/x.sock"),
    ],
)
def test_addresses_as_people_write_them(text: str, url: str) -> None:
    """Each form is understood, and told without credentials."""
    assert parse_endpoint(text, default_port=7).url == url


@pytest.mark.parametrize(
    "text",
    [
        "ftp://x",
        "http://x:port",
        "x:99999",
        "x:0",
        "http://me:secret@x:99999",
        "http://x?a=b",
        "http://me:secret@x#y",
        "http://[x",
        "http://me:secret@x\u2100",
        "unix:relative",
        "unix:",
        # Whatever has neither a host nor a port would be the usual address.
        ":",
        "http://",
        "https:///a",
        "me:secret@",
        "/a",
        # No header and no line of a request can hold these.
        "some where",
        "http://x/a b",
        "http://x/\xe9",
        "\xe9..x",
    ],
)
def test_what_is_no_address(text: str) -> None:
    """What cannot be an address is refused, not guessed at; what may hold a password is not repeated."""
    with pytest.raises(ValueError) as caught:
        parse_endpoint(text, default_port=7)
    assert "codec" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_credentials_of_an_address() -> None:
    """A user in a URL becomes a header, and is never shown."""
    endpoint = parse_endpoint("http://me:s%40cret@somewhere", default_port=7)
    assert endpoint.authorization == "Basic bWU6c0BjcmV0"
    assert "bWU6" not in repr(endpoint)
    assert "cret" not in repr(endpoint)
    assert endpoint.is_tls is False
    assert Endpoint(scheme="https", host="h", port=443).is_tls


# -- Lines ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=8).map(lambda b: b.replace(b"\n", b"x")), max_size=8), st.data())
def test_lines_do_not_depend_on_chunks(lines: list[bytes], data: st.DataObject) -> None:
    """However a stream is cut, the lines are the same; the last needs no newline; empty ones are left out."""
    ends = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    whole = ends.join(lines)
    splitter, found = LineSplitter(), []
    rest = whole
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += splitter.feed(rest[:size])
        rest = rest[size:]
    if last := splitter.rest():
        found.append(last)
    assert found == [stripped for line in lines if (stripped := line.rstrip(b"\r"))]
    assert splitter.rest() == b""


def test_lines_are_bounded() -> None:
    """Neither one line nor the whole can fill the memory."""
    with pytest.raises(TooLongError, match="line"):
        LineSplitter(longest_line=10).feed(b"x" * 11)
    with pytest.raises(TooLongError, match="line"):
        LineSplitter(longest_line=10).feed(b"x" * 11 + b"\n")
    splitter = LineSplitter(longest_line=10, longest_whole=20)
    assert splitter.feed(b"x" * 10 + b"\n") == [b"x" * 10]
    with pytest.raises(TooLongError, match="answer"):
        splitter.feed(b"x" * 10)


# -- The stream ----------------------------------------------------------------------------------------------------


class FakeTransport:
    """Remembers what was written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.changes: list[bool] = []

    def write(self, data: bytes) -> None:
        """Remembers."""
        self.written.append(data)

    def pause_reading(self) -> None:
        """Remembers."""
        self.changes.append(False)

    def resume_reading(self) -> None:
        """Remembers."""
        self.changes.append(True)

    def abort(self) -> None:
        """Nothing to do."""

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0


class FakeSocket:
    """A socket whose queue cannot be seen."""

    def fileno(self) -> int:
        """Not a file."""
        return -1

    def shutdown(self, _: int) -> None:
        """Fails, like that of a closed socket."""
        raise OSError("not connected")


def stream() -> tuple[HeldStream, FakeTransport]:
    """A stream over a transport that remembers."""
    held, transport = HeldStream(), FakeTransport()
    held.attach(transport, transport, FakeSocket())  # type: ignore[arg-type]
    return held, transport


async def test_what_is_written_goes_out_at_once() -> None:
    """Each piece as it comes, but for one that is empty."""
    held, transport = stream()
    await held.send_first(b"headbody", 1.0)
    assert transport.written == [b"headbody"]
    held.send_last(b"}")
    assert transport.written == [b"headbody", b"}"]
    await held.write(b"")
    await held.write(b"more")
    assert transport.written == [b"headbody", b"}", b"more"]


async def test_reading_pauses_above_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is slow makes the other side wait instead of filling the memory; nothing is lost by it."""
    monkeypatch.setattr("unisono.adapters.held.stream.READ_LIMIT", 100)
    held, transport = stream()
    held.data_received(b"a" * 80)
    assert transport.changes == []
    held.data_received(b"b" * 80)
    assert transport.changes == [False]
    assert await held.read(50) == b"a" * 50
    assert transport.changes == [False]
    assert await held.read(100) == b"a" * 30 + b"b" * 70
    assert transport.changes == [False, True]
    held.eof_received()
    assert await held.read(100) == b"b" * 10
    assert await held.read(100) == b""


async def test_what_arrived_is_read_before_an_error() -> None:
    """A reset does not take away what had come; writing after it is an error, sending the last byte is none."""
    held, transport = stream()
    held.data_received(b"abc")
    held.connection_lost(ConnectionResetError("reset by peer"))
    held.connection_lost(None)
    assert await held.read(10) == b"abc"
    with pytest.raises(httpcore.ReadError, match="reset by peer"):
        await held.read(10)
    with pytest.raises(httpcore.WriteError):
        await held.write(b"x")
    held.send_last(b"}")
    assert transport.written == []
    await held.aclose()


# -- The table of errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "opening", "afterwards"),
    [
        (httpcore.ConnectError("refused"), BackendUnavailableError, BackendUnavailableError),
        (httpcore.ConnectTimeout("5 s"), BackendUnavailableError, BackendUnavailableError),
        (httpx.ConnectError("refused"), BackendUnavailableError, BackendUnavailableError),
        (httpx.ConnectTimeout("5 s"), BackendUnavailableError, BackendUnavailableError),
        (httpcore.ReadError("reset"), BackendUnavailableError, ConnectionLostError),
        (httpcore.WriteError("reset"), BackendUnavailableError, ConnectionLostError),
        (httpcore.ReadTimeout("30 s"), BackendUnavailableError, ConnectionLostError),
        (httpx.ReadTimeout("30 s"), BackendUnavailableError, ConnectionLostError),
        (httpx.ReadError(""), BackendUnavailableError, ConnectionLostError),
        (ConnectionResetError("reset"), BackendUnavailableError, ConnectionLostError),
        (BrokenPipeError(), BackendUnavailableError, ConnectionLostError),
        (ssl.SSLError("bad record"), BackendUnavailableError, ConnectionLostError),
        (EOFError(), BackendUnavailableError, ConnectionLostError),
        (TimeoutError(), BackendUnavailableError, ConnectionLostError),
        (httpcore.RemoteProtocolError("illegal status line"), BadAnswerError, BadAnswerError),
        (h11.RemoteProtocolError("illegal status line"), BadAnswerError, BadAnswerError),
        (httpx.RemoteProtocolError("illegal status line"), BadAnswerError, BadAnswerError),
        (httpx.DecodingError("not gzip"), BadAnswerError, BadAnswerError),
        (
            httpcore.RemoteProtocolError("peer closed connection without sending complete message body"),
            BackendUnavailableError,
            ConnectionLostError,
        ),
        (
            httpcore.RemoteProtocolError("Server disconnected without sending a response."),
            BackendUnavailableError,
            ConnectionLostError,
        ),
        (httpcore.LocalProtocolError("illegal header value"), InternalError, InternalError),
        (h11.LocalProtocolError("illegal header value"), InternalError, InternalError),
    ],
)
def test_foreign_errors_are_translated(
    error: Exception, opening: type[UnisonoError], afterwards: type[UnisonoError]
) -> None:
    """Whatever the network, TLS or HTTP raises is an error of this house, by whether anything was asked yet."""
    for is_opening, kind in ((True, opening), (False, afterwards)):
        with pytest.raises(UnisonoError) as caught, translated("here", opening=is_opening):
            raise error
        assert type(caught.value) is kind
        assert caught.value.__cause__ is error
        assert caught.value.metadata == {"backend": "here"}
        assert "here" in caught.value.message
        assert not caught.value.message.endswith(": ")


def test_other_errors_pass() -> None:
    """Errors of this house, defects and cancellation are not translated."""
    for error in (RepetitionError("again and again"), ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, translated("here"):
            raise error
        assert caught.value is error
