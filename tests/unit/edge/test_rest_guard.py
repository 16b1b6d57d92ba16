"""By which names the HTTP port may be asked, and by pages from where."""

from __future__ import annotations

import pytest

from unisono.edge.rest.guard import Guard, host_of

OWN_HOSTS = [
    *(
        "",
        "localhost",
        "LOCALHOST:4080",
        "localhost.",
        "a.localhost",
        "a.b.localhost:1",
        "printer.local",
        "x.internal",
    ),
    *(
        "127.0.0.1",
        "127.0.0.1:4080",
        "10.1.2.3:80",
        "203.0.113.9",
        "[::1]",
        "[::1]:4080",
        "[fe80::1]:80",
        "0.0.0.0:1",
    ),
    # Names that nobody can own elsewhere: a machine's beside this one, a container's.
    *("unisono", "unisono:4080", "my_box", "host.example.org", "HOST.example.org:4080"),
]
FOREIGN_HOSTS = [
    *(
        "evil.example",
        "evil.example:4080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "local",
        "example.org",
    ),
    *("xlocalhost.evil", "a.local.evil", "other.example.org", "user@localhost", "localhost:x", "localhost:123456"),
    *("[::1", "[localhost]", "[::1]x", "[::1]:x", "-a", "a b", "ä", ".", "a/b", "localhost:80:80", "x" * 300, "*"),
]
OWN_ORIGINS = [
    *("http://localhost", "https://localhost", "http://localhost:3000", "http://127.0.0.1:8080", "https://[::1]:1"),
    *("http://0.0.0.0:5", "HTTP://LOCALHOST", "app://obsidian.md", "tauri://localhost", "vscode-webview://1a2b"),
    *("chrome-extension://abc", "moz-extension://abc", "file://"),
]
FOREIGN_ORIGINS = [
    *("null", "", "http://evil.example", "https://localhost.evil.example", "http://127.0.0.1.evil.example", "evil"),
    *("http://localhosts", "http://192.168.0.9", "ftp://localhost", "xapp://a", "http://[", "http://evil.example:80"),
]


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_hosts_that_are_ours(host: str) -> None:
    """Addresses, names that nobody can make to point here, and this machine's own."""
    assert Guard(own_name="Host.example.org").takes_host(host)


@pytest.mark.parametrize("host", [host for host in FOREIGN_HOSTS if host != "local"])
def test_hosts_that_may_be_anybody_s(host: str) -> None:
    """A name that its owner has made to point here; and what is no name."""
    assert not Guard(own_name="host.example.org").takes_host(host)


def test_hosts_that_were_set() -> None:
    """In full, with all below one, or any at all; in no other way."""
    guard = Guard(hosts=["Api.example.org", "*.svc"])
    assert guard.takes_host("api.EXAMPLE.org:443")
    assert guard.takes_host("unisono.ns.svc")
    assert not guard.takes_host("example.org")
    assert not guard.takes_host("apixexample.org")
    assert not guard.takes_host("svc.evil")
    assert Guard(hosts=["*"]).takes_host("evil.example")
    assert not Guard(hosts=["*"]).takes_host("a b")


@pytest.mark.parametrize("origin", OWN_ORIGINS)
def test_pages_that_may_ask(origin: str) -> None:
    """Those of this machine, and programs that are built of pages."""
    assert Guard().takes_origin(origin, "127.0.0.1:4080")


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_pages_that_may_not(origin: str) -> None:
    """Those from anywhere else, and those that hide where they come from."""
    assert not Guard().takes_origin(origin, "127.0.0.1:4080")


def test_pages_of_the_host_itself_may_ask() -> None:
    """Whose name was taken before; the port is part of it."""
    assert Guard().takes_origin("http://unisono.local:4080", "unisono.local:4080")
    assert Guard().takes_origin("https://api.example.org", "API.example.org")
    assert not Guard().takes_origin("http://unisono.local:81", "unisono.local:4080")
    assert not Guard().takes_origin("http://", "")


def test_origins_that_were_set() -> None:
    """With any port, where none is said."""
    guard = Guard(origins=["https://App.example.org", "https://*.test", "http://one.example:81", "http://[fe80::1]"])
    for origin in (
        *("https://app.example.org", "https://app.example.org:8443", "https://a.b.test"),
        *("http://one.example:81", "http://[fe80::1]:9"),
    ):
        assert guard.takes_origin(origin, "localhost")
    for origin in ("http://app.example.org", "https://app.example.org.evil", "https://test", "http://one.example"):
        assert not guard.takes_origin(origin, "localhost")
    assert Guard(origins=["*"]).takes_origin("http://evil.example", "localhost")


@pytest.mark.parametrize(
    ("written", "host"),
    [("A.b:80", "a.b"), ("a.", "a"), ("[::1]:80", "[::1]"), ("[::1]80", None), ("a:b", None), (":80", None)],
)
def test_the_name_in_a_host(written: str, host: str | None) -> None:
    """Without its port, and in small letters."""
    assert host_of(written) == host
