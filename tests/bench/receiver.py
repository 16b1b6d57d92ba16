"""The receiving end of the benches: a process of its own that says when requests were whole, and when closed.

One epoll loop over raw sockets; it parses no more than it must. A request's time is taken right after the `recv`
that brought its last byte, by the monotonic clock, which all processes of a machine share. Paths say what to do:

- `/wave/ID/N`: nothing is answered until N requests of this wave are whole; then each gets its own time.
- `/stream/ID/N`: one line is sent at once, and the answer never ends. Its close is noted, as that of `/wave`.
- `/closed/ID`: the times at which connections of this wave were closed by the other side.
"""

from __future__ import annotations

import contextlib
import gc
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

BACKLOG = 1024
_MISSING = -1


@dataclass(slots=True, eq=False)
class _Client:
    sock: socket.socket
    received: bytearray = field(default_factory=bytearray)
    # Bytes of the body that are still to come; -1 while the head is not whole.
    missing: int = _MISSING
    path: str = ""
    closes: bool = False


class Receiver:
    """The loop's state."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.listening.setblocking(False)  # noqa: FBT003 - socket's own
        self.poll = select.epoll()
        self.clients: dict[int, _Client] = {}
        self.waves: dict[str, list[tuple[_Client, int]]] = {}
        self.closed: dict[str, list[int]] = {}

    def run(self) -> None:
        """Serves until standard input is closed."""
        self.poll.register(self.listening.fileno(), select.EPOLLIN)
        self.poll.register(0, select.EPOLLIN | select.EPOLLHUP)
        clients, now = self.clients, time.monotonic_ns
        while True:
            for number, _ in self.poll.poll():
                client = clients.get(number)
                if client is None:
                    if number == 0:
                        return
                    self.accept()
                    continue
                try:
                    data = client.sock.recv(1 << 18)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                at_ns = now()
                if not data:
                    self.drop(client, at_ns)
                elif client.missing > 0:
                    client.missing -= len(data)
                    if client.missing == 0:
                        self.whole(client, at_ns)
                else:
                    self.head(client, data, at_ns)

    def accept(self) -> None:
        """Takes all connections that wait."""
        while True:
            try:
                sock, _ = self.listening.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)  # noqa: FBT003 - socket's own
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.clients[sock.fileno()] = _Client(sock)
            self.poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def drop(self, client: _Client, at_ns: int) -> None:
        """Forgets a connection that the other side has closed."""
        if client.path:
            self.closed.setdefault(client.path.split("/")[2], []).append(at_ns)
        self.poll.unregister(client.sock.fileno())
        del self.clients[client.sock.fileno()]
        client.sock.close()

    def head(self, client: _Client, data: bytes, at_ns: int) -> None:
        """Reads a request's head, when it is whole."""
        client.received += data
        head, separator, body = bytes(client.received).partition(b"\r\n\r\n")
        if not separator:
            return
        client.received.clear()
        client.path = head.split(b" ", 2)[1].decode()
        length = 0
        for line in head.lower().split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name == b"content-length":
                length = int(value)
            elif name == b"connection":
                client.closes = value.strip() == b"close"
        client.missing = length - len(body)
        if client.missing == 0:
            self.whole(client, at_ns)

    def whole(self, client: _Client, at_ns: int) -> None:
        """Does what the path of a whole request says."""
        client.missing = _MISSING
        parts = client.path.split("/")
        if parts[1] == "closed":
            self.answer(client, self.closed.get(parts[2], []))
            client.path = ""
        elif parts[1] == "stream":
            line = b'{"message":{"content":"a"},"done":false}\n'
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.sock.send(head + b"%x\r\n%s\r\n" % (len(line), line))
        else:
            wave = self.waves.setdefault(parts[2], [])
            wave.append((client, at_ns))
            if len(wave) == int(parts[3]):
                del self.waves[parts[2]]
                for one, its_ns in wave:
                    self.answer(one, its_ns)

    def answer(self, client: _Client, value: int | list[int]) -> None:
        """Sends a JSON value."""
        body = json.dumps(value).encode()
        client.sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        if client.closes:
            client.path = ""
            client.sock.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def receiver() -> Iterator[int]:
    """A receiver in a process of its own; gives its port on the loopback."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.receiver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(timeout=10)


if __name__ == "__main__":
    running = Receiver()
    print(running.listening.getsockname()[1], flush=True)
    gc.disable()
    running.run()
