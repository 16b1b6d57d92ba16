"""Where a client may be used, and what it may be given to connect with: said at once, without waiting for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.clients.served import served
from unisono_client import Client, ClosedError, RefusedError, UnreachableError, sync

PACKAGE = Path(__file__).resolve().parents[2] / "clients" / "python" / "src"
FORKING = """
import asyncio, os, signal, sys
from unisono_client import ClosedError, Client, sync

client = sync.Client(sys.argv[1])
used = sys.argv[2] == "used"
if used:
    assert client.infer("[[say=parent]]").content == "parent"
run = client.run(["[[say=a]]", "[[say=b]]"]) if used else None
if used:
    next(run)
child = os.fork()
if not child:
    signal.alarm(10)
    told = []
    async def ask():
        async with Client(sys.argv[1]) as other:
            return (await other.infer("[[say=child]]")).content
    def another():
        with sync.Client(sys.argv[1]) as other:
            return other.infer("[[say=child]]").content
    for each in (another, lambda: client.infer("[[say=child]]").content, lambda: asyncio.run(ask())):
        try:
            told.append(each())
        except ClosedError as error:
            told.append("refused" if "spawn" in str(error) else str(error))
    client.close()
    print(*told, flush=True)
    sys.exit()
os.waitpid(child, 0)
if used:
    print(len(list(run)), client.infer("[[say=parent]]").content)
"""


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Where a service listens."""
    with served() as found:
        yield found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    ("how", "told"), [("used", "refused refused refused\n1 parent\n"), ("unused", "child child child\n")]
)
def test_after_a_fork(target: str, how: str, told: str) -> None:
    """The child of a process that used the client is told so, and its parent goes on; a child may be the first."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, target, how],
        # gRPC's own handlers of a fork now and then end the child by a segmentation fault, whatever it does.
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "GRPC_ENABLE_FORK_SUPPORT": "0"},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, told), done.stderr


def test_in_a_second_event_loop(target: str) -> None:
    """A client stays in the loop of its first call, and says so in another; and where there is none."""
    client = Client(target)

    async def ask() -> str:
        return (await client.infer("[[say=ok]]")).content

    assert asyncio.run(ask()) == "ok"
    with pytest.raises(ClosedError, match=r"event loop of its first call.*unisono_client\.sync"):
        _ = asyncio.run(ask())
    asyncio.run(client.aclose())
    with pytest.raises(ClosedError, match=r"no event loop.*unisono_client\.sync"):
        _ = Client(target).run(["x"])


def test_metadata(target: str) -> None:
    """Keys become lower case; what gRPC would refuse is refused when the client is made."""
    with sync.Client(target, metadata={"Authorization": "Bearer x", "Trace-Bin": b"\x00\xff"}) as client:
        assert client.infer("[[say=ok]]").content == "ok"
    for name, value in (("a b", "x"), ("", "x"), ("grpc-x", "x"), ("x", "é"), ("x", b"y"), ("x-bin", "y"), ("x", 5)):
        with pytest.raises(RefusedError) as caught:
            _ = Client(target, metadata={name: value})  # type: ignore[dict-item]
        assert caught.value.fields[0].field == f"metadata[{name!r}]"
    with pytest.raises(RefusedError, match="HOST:PORT"):
        _ = Client(50051)  # type: ignore[arg-type]


def test_tls_on_one_side_only(target: str) -> None:
    """The error of a client that is asked to speak TLS to a service that does not says so; and of one that is not."""
    with (
        sync.Client(target, credentials=grpc.ssl_channel_credentials(), give_up_after_s=0.2) as client,
        pytest.raises(UnreachableError, match="asked with TLS"),
    ):
        _ = client.infer("x")
    with (
        sync.Client("127.0.0.1:9", give_up_after_s=0.2) as client,
        pytest.raises(UnreachableError, match="credentials="),
    ):
        _ = client.infer("x")


def test_a_text_is_no_list(target: str) -> None:
    """`run("abc")` would be three items; nor is a single item a list, or a number."""

    async def ask(given: object) -> None:
        async with Client(target) as client:
            _ = client.run(given)  # type: ignore[arg-type]

    for given in ("abc", b"abc", 5, {"role": "user"}):
        with pytest.raises(RefusedError, match="items: is"):
            asyncio.run(ask(given))
        with sync.Client(target) as client, pytest.raises(RefusedError, match="items: is"):
            _ = client.run(given)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="items: is a single str"):
        _ = sync.batch_generate("abc", target=target)
