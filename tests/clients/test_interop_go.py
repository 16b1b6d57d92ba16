"""gRPC's interoperability cases from Go: clients/go/cmd/interop against the service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.go import built
from tests.clients.interop import CASES, KEEPALIVE, interop_service, output


@pytest.fixture(scope="session")
def interop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    return built("./cmd/interop", tmp_path_factory.mktemp("go"))


async def test_it_has_all_cases(interop: Path) -> None:
    """The same as every language."""
    assert (await output(interop, "--list")).split() == sorted([*CASES, KEEPALIVE])


@pytest.mark.parametrize("name", CASES)
async def test_case(interop: Path, name: str) -> None:
    """Each case holds."""
    async with interop_service() as h:
        assert await output(interop, "--target", h.target, name) == f"{name} ok\n"
