"""The Rust client: built from its sources, against a service."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.clients.behaviour import ClientBehaviour, answered, prompts
from tests.clients.programs import CuttingProxy, Program, need, write_lines
from tests.clients.rust import FOR_WHAT, RUST, built, cargo
from tests.integration.service import house


@pytest.fixture(scope="session")
def unisono_batch() -> Program:
    """The program."""
    return Program(command=(str(built()),))


class TestRust(ClientBehaviour):
    """It does what all do."""

    async def test_more_items_than_a_batch_may_have_are_refused(self, unisono_batch: Program, tmp_path: Path) -> None:
        """Credit that will never come is not waited for; also not by who goes on with a batch."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(5))
        async with house(num_parallel=4, settings={"max_items": 3, "slots": 4}) as h, CuttingProxy(h.target) as proxy:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", "-", target=proxy.target) as first:
                await first.say(*prompts(3))
                await h.fake.wait_for(lambda fake: fake.busy_slots == 3, timeout_s=20)
                while answered(h) < 1:
                    await h.fake.step()
                await first.until_lines(1)
                proxy.cut()
                assert await first.exit_code() == 3, first.told
            h.fake.release_passes()
            code, rest = await unisono_batch.run(*first.command_to_resume()[:-1], file, target=h.target)
        assert code == 1, rest.told
        assert sorted(first.states + rest.states) == ["COMPLETED"] * 3 + ["REFUSED"] * 2
        refusals = {line["id"]: line["error"]["reason"] for line in rest.lines if line["state"] == "REFUSED"}
        assert refusals == {"i3": "BATCH_FULL", "i4": "BATCH_FULL"}


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
