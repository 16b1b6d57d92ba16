"""A service behind TLS, with a certificate of an authority of its own."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
import trustme

from tests.unit.cli.fake_server import FakeServer, serving
from tests.unit.cli.test_process import batch, ended, process


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who has signed the service's certificate."""
    return trustme.CA()


@pytest_asyncio.fixture
async def server(authority: trustme.CA) -> AsyncIterator[FakeServer]:
    """A service that is spoken to over TLS only."""
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    pair = (certificate.private_key_pem.bytes(), chain)
    async with serving(credentials=grpc.ssl_server_credentials([pair])) as found:
        yield found


def trusting(authority: trustme.CA, path: Path) -> str:
    """The file for --ca."""
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.mark.parametrize("says_tls", [True, False])
async def test_a_named_authority_is_trusted(
    authority: trustme.CA,
    server: FakeServer,
    tmp_path: Path,
    says_tls: bool,  # noqa: FBT001
) -> None:
    """--ca means --tls too."""
    ca = trusting(authority, tmp_path / "ca.pem")
    file = batch(tmp_path / "batch.jsonl", "one", "two")
    tls = ["--tls"] if says_tls else []
    async with process("run", file, "--server", server.target, *tls, "--ca", ca) as started:
        code, out, err = await ended(started)
    assert code == 0, err
    assert [json.loads(line)["content"] for line in out.splitlines()] == ["echo: one", "echo: two"]


@pytest.mark.parametrize("given", [["--tls"], ["--tls", "--ca", "another"], []], ids=["system", "another", "none"])
async def test_who_is_not_trusted_is_not_spoken_to(server: FakeServer, tmp_path: Path, given: list[str]) -> None:
    """Neither the system's authorities nor another one have signed it; and without TLS there is no talking."""
    another = trusting(trustme.CA(), tmp_path / "another.pem")
    file = batch(tmp_path / "batch.jsonl", "one")
    arguments = [another if each == "another" else each for each in given]
    async with process("run", file, "--server", server.target, *arguments) as started:
        code, out, err = await ended(started)
    assert (code, out) == (3, ""), err
    assert f"The service at {server.target}: " in err
    assert not server.items


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ca", "nosuch.pem"], "nosuch.pem cannot be read: No such file or directory"),
        (["--tls", "--embedded"], "not for one's own"),
    ],
)
async def test_what_cannot_be_is_told(tmp_path: Path, arguments: list[str], says: str) -> None:
    """A file that is not there, and TLS to a service that is started here."""
    file = batch(tmp_path / "batch.jsonl", "one")
    async with process("run", file, *arguments) as started:
        code, _, err = await ended(started)
    assert code == 2
    assert says in err


async def test_a_service_of_ones_own_does_not_take_its_place(tmp_path: Path) -> None:
    """Where none answers over TLS, none is started in the clear."""
    file = batch(tmp_path / "batch.jsonl", "one")
    async with process("run", file, "--tls", env={"UNISONO_SERVER": "127.0.0.1:1"}) as started:
        code, out, err = await ended(started)
    assert (code, out) == (3, ""), err
    assert "started a service" not in err
