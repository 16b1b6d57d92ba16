"""The Go client: built from its sources, against a service."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.go import FLAGS, GO, built
from tests.clients.programs import Program, build, need


@pytest.fixture(scope="session")
def unisono_batch(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program."""
    return Program(command=(str(built("./cmd/unisono-batch", tmp_path_factory.mktemp("go"))),))


class TestGo(ClientBehaviour):
    """It does what all do."""


def test_its_generated_code_is_what_the_contract_says(tmp_path: Path) -> None:
    """gen/ is what `make clients` would write."""
    need("go", for_what="the Go client")
    build(GO / "generate", tmp_path, folder=GO, env={"PYTHON": sys.executable})

    def tree(folder: Path) -> dict[str, str]:
        return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.go")}

    assert tree(tmp_path / "gen") == tree(GO / "gen"), "run `make clients`"


def test_its_sources_are_as_go_wants_them() -> None:
    """Nothing for gofmt to change, nothing for go vet to say, and its own tests pass."""
    need("go", "gofmt", for_what="the Go client")
    build("sh", "-c", 'test -z "$(gofmt -l . | tee /dev/stderr)"', folder=GO)
    build("go", "vet", "./...", folder=GO)
    build("go", "test", *FLAGS, "./...", folder=GO)
