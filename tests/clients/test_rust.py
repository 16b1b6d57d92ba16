"""The Rust client: built from its sources, against a service."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.programs import Program, need
from tests.clients.rust import FOR_WHAT, RUST, built, cargo


@pytest.fixture(scope="session")
def unisono_batch() -> Program:
    """The program."""
    return Program(command=(str(built()),))


class TestRust(ClientBehaviour):
    """It does what all do."""


def test_its_packages_are_pinned() -> None:
    """To one version each, which the packages of the workspace take over."""
    workspace = tomllib.loads((RUST / "Cargo.toml").read_text())["workspace"]
    for name, said in workspace["dependencies"].items():
        if "path" not in said:
            version = said if isinstance(said, str) else said["version"]
            assert re.fullmatch(r"=\d+(\.\d+){2}", version), name
    for member in workspace["members"]:
        package = tomllib.loads((RUST / member / "Cargo.toml").read_text())
        for kind in ("dependencies", "dev-dependencies", "build-dependencies"):
            for name, said in package.get(kind, {}).items():
                assert said == {"workspace": True}, f"{member}: {name}"


def test_its_own_tests_pass() -> None:
    """Those of its arguments, of reading lines, and of the README's example."""
    cargo("test", "--quiet")


def test_its_sources_are_as_rust_wants_them() -> None:
    """Nothing for rustfmt to change, nothing for clippy to say."""
    need("cargo-clippy", "cargo-fmt", for_what=FOR_WHAT)
    cargo("fmt", "--check")
    cargo("clippy", "--quiet", "--all-targets", "--", "--deny", "warnings")
