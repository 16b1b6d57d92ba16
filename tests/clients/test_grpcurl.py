"""The README's call with grpcurl: the real program, against the service's own reflection."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import LIMIT_S, ROOT, fetch, need
from tests.integration.service import house

PACKAGE = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4"
SERVICE = "unisono.v1.BatchInference"


@pytest.fixture(scope="session")
def grpcurl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built from its sources."""
    need("go", for_what="grpcurl")
    folder = tmp_path_factory.mktemp("grpcurl")
    fetch("go", "install", PACKAGE, folder=folder, for_what="grpcurl", env={"GOBIN": str(folder), "GOFLAGS": ""})
    return folder / "grpcurl"


async def call(grpcurl: Path, *arguments: str) -> str:
    """What it writes; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        grpcurl, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(LIMIT_S):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


def snippets() -> list[list[str]]:
    """The arguments of every grpcurl command in the README."""
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found = [shlex.split(block, comments=True) for block in blocks if block.startswith("grpcurl ")]
    assert found, "the README has no grpcurl command"
    return [words[1:] for words in found]


@pytest.mark.parametrize("arguments", snippets(), ids=lambda arguments: arguments[-1].rpartition("/")[2])
async def test_the_readme_s_command_answers(grpcurl: Path, arguments: list[str]) -> None:
    """The snippet as it stands, but for the address, is answered: each item, then the summary."""
    async with house(settings={"default_model": "fake"}) as h:
        there = [h.target if re.fullmatch(r"127\.0\.0\.1:\d+", word) else word for word in arguments]
        assert h.target in there
        out = await call(grpcurl, *there)
    items = json.loads(arguments[arguments.index("-d") + 1])["items"]
    events = [message["event"] for message in values(out)]
    # Reflection as Python serves it tells no JSON names, so grpcurl writes the contract's own: item_id, not itemId.
    results = {event["result"]["item_id"]: event["result"] for event in events if "result" in event}
    assert results.keys() == {item["item_id"] for item in items}
    assert {result["state"] for result in results.values()} == {"ITEM_STATE_COMPLETED"}
    assert all(result["completion"]["content"] for result in results.values())
    assert events[-1]["summary"]["state"] == "BATCH_STATE_COMPLETED"


async def test_it_finds_everything_by_reflection(grpcurl: Path) -> None:
    """Services are listed, and every message of the contract can be described, down to google.rpc."""
    async with house() as h:
        services = (await call(grpcurl, "-plaintext", h.target, "list")).split()
        described = await call(grpcurl, "-plaintext", h.target, "describe", SERVICE)
        status = await call(grpcurl, "-plaintext", h.target, "describe", "google.rpc.Status")
        health = await call(grpcurl, "-plaintext", h.target, "grpc.health.v1.Health/Check")
    assert {SERVICE, "grpc.health.v1.Health"} < set(services)
    assert "rpc StreamBatch ( stream .unisono.v1.StreamBatchRequest )" in described
    assert "message Status" in status
    assert json.loads(health) == {"status": "SERVING"}


def values(text: str) -> list[dict[str, Any]]:
    """JSON values that stand one after the other."""
    decoder, place = json.JSONDecoder(), 0
    found: list[dict[str, Any]] = []
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        value, place = decoder.raw_decode(text, place)
        found.append(value)
    return found
