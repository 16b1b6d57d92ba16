"""Where a backend listens, as a value."""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

# What a server binds to in order to listen everywhere is no address that a client can connect to.
_CONNECTABLE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - replaced, not bound to
_WELL_KNOWN: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An HTTP server's address."""

    # "http" or "https".
    scheme: str
    # A name or an IP address; IPv6 without brackets.
    host: str
    port: int
    # What stands before every path: "" or "/some/prefix".
    prefix: str = ""
    # The path of a Unix socket, which is connected to instead of host and port.
    socket_path: str = ""
    # The value of an Authorization header, from a URL with a user in it.
    authorization: str = field(default="", repr=False)

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme == "https"

    @property
    def host_header(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _WELL_KNOWN[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL without credentials, and without a slash at its end."""
        if self.socket_path:
            return f"unix:{self.socket_path}"
        return f"{self.scheme}://{self.host_header}{self.prefix}"


def parse_endpoint(text: str, *, default_port: int, default_host: str = "127.0.0.1") -> Endpoint:
    """Reads an address as people write it: `host`, `host:port`, `:port`, `[::1]:port`, a URL, `unix:/path`.

    Without a scheme it is http on `default_port`; with one, the scheme's own port unless one is given. Addresses
    that mean "everywhere" become the loopback; "" is the default host and port. Raises ValueError, with what to
    write instead; the address itself, which may hold a password, is not repeated.
    """
    text = text.strip()
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path.startswith("/"):
            raise ValueError("the path of a Unix socket must begin with a slash, as in unix:/run/ollama.sock")
        return Endpoint(scheme="http", host="localhost", port=80, socket_path=path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    scheme = scheme.lower()
    if scheme not in _WELL_KNOWN:
        raise ValueError(f"the scheme must be http or https, not {scheme!r}")
    authority = rest.partition("/")[0].rpartition("@")[2]
    if _is_ipv6(authority):  # without brackets, as OLLAMA_HOST allows
        rest = rest.replace(authority, f"[{authority}]", 1)
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:
        raise ValueError("it cannot be read: write HOST:PORT, or a URL") from None
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("its port must be a number from 1 to 65535")
    if text and not parts.hostname and port is None:
        raise ValueError("it names neither a host nor a port: write HOST:PORT, or a URL")
    if parts.query or parts.fragment:
        raise ValueError("an address has no query and no fragment: leave out the ? or the # and what follows it")
    host = _ascii(parts.hostname or default_host)
    if not _is_visible(host + parts.path):
        raise ValueError("its host and path must be visible ASCII characters, others percent-encoded")
    return Endpoint(
        scheme=scheme,
        host=_CONNECTABLE.get(host, host),
        port=port or (_WELL_KNOWN[scheme] if separator else default_port),
        prefix=parts.path.rstrip("/"),
        authorization=_basic(parts.username, parts.password),
    )


def _ascii(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError(f"{host!r} cannot be the name of a host: write it as the name service knows it") from None


def _is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _basic(user: str | None, password: str | None) -> str:
    if user is None:
        return ""
    pair = f"{unquote(user)}:{unquote(password or '')}".encode()
    return "Basic " + base64.b64encode(pair).decode("ascii")
