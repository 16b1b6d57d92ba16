"""Who may ask the HTTP port: no web page that happens to be open in a browser on this machine.

Theory of operation. There is no authentication, so that a page from anywhere could ask what listens on loopback. Two
headers that a page cannot choose tell it apart:

1. `Host` is the name by which the page reached us. One that its author has made to point here (DNS rebinding) is a
   name of his; so those names are answered that nobody can own elsewhere: addresses, names without a dot, this
   machine's own, and those below localhost, local and internal. Others must be set.
2. `Origin` is where a page comes from that asks another host than its own. Pages of this machine may, and programs
   that are built of pages; others must be set. A form that is posted has it too, and so is refused: what it would
   have done is not done. Programs that are no browsers send none.
"""

from __future__ import annotations

import ipaddress
import re
from fnmatch import translate
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

# As Ollama answers them.
_OWN_DOMAINS: Final = (".localhost", ".local", ".internal")
_OWN_HOSTS: Final = ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")  # noqa: S104 - a name
_OWN_ORIGINS: Final = (
    *(f"{scheme}://{host}" for scheme in ("http", "https") for host in _OWN_HOSTS),
    *(f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
    *(f"{scheme}-extension://*" for scheme in ("chrome", "moz", "safari", "safari-web")),
)
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", re.ASCII)
_PORT: Final = re.compile(r":[0-9]{0,5}", re.ASCII)


class Guard:
    """Says who may ask."""

    def __init__(self, *, own_name: str = "", hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        """`own_name`: this machine's. `hosts`, `origins`: allowed beside the usual ones; * stands for any text."""
        self._own_name = own_name.lower()
        self._hosts = _any_of([host.lower() for host in hosts])
        # Without a port, any will do.
        self._origins = _any_of([
            pattern
            for origin in (*_OWN_ORIGINS, *(one.lower() for one in origins))
            for pattern in ((origin, f"{origin}:*") if origin.startswith("http") else (origin,))
        ])  # fmt: skip

    def takes_host(self, written: str) -> bool:
        """Whether a request may be for this Host; an empty one, of a program that is no browser, may."""
        if not written:
            return True
        host = host_of(written)
        if host is None:
            return False
        if host.startswith("["):
            return True
        try:
            _ = ipaddress.ip_address(host)
        except ValueError:
            return (
                "." not in host
                or host == self._own_name
                or host.endswith(_OWN_DOMAINS)
                or self._hosts.fullmatch(host) is not None
            )
        return True

    def takes_origin(self, origin: str, host: str) -> bool:
        """Whether a page from there may ask this Host; pages of that host itself may."""
        origin = origin.lower()
        if self._origins.fullmatch(origin) is not None:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(host) and parts.netloc == host.lower()


def host_of(written: str) -> str | None:
    """The name or address in a Host header, in small letters and without its port; None: there is none.

    An IPv6 address keeps its brackets.
    """
    written = written.lower()
    if written.startswith("["):
        address, bracket, port = written[1:].partition("]")
        try:
            _ = ipaddress.IPv6Address(address)
        except ValueError:
            return None
        return f"[{address}]" if bracket and (not port or _PORT.fullmatch(port)) else None
    name, colon, port = written.partition(":")
    if colon and not _PORT.fullmatch(f":{port}"):
        return None
    # A dot at the end is that of the root: the same name.
    name = name.removesuffix(".")
    return name if _NAME.fullmatch(name) else None


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    """What fits one of these, in which * stands for any text, and nothing else is special."""
    # "[" begins a set of characters for fnmatch.
    written = [translate(pattern.replace("[", "[[]").replace("?", "[?]")) for pattern in patterns]
    return re.compile("|".join(written) or r"(?!)")
