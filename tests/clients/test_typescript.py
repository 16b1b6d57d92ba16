"""The TypeScript client: built from its sources, against a service."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.programs import Program, build
from tests.clients.typescript import TYPESCRIPT, built
from tests.guides import block
from tests.integration.service import LIMIT_S, house


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client, built."""
    return built(tmp_path_factory.mktemp("typescript"))


@pytest.fixture(scope="session")
def unisono_batch(folder: Path) -> Program:
    """The program."""
    return Program(command=("node", str(folder / "dist" / "src" / "unisono-batch.js")))


class TestTypeScript(ClientBehaviour):
    """It does what all do."""


def test_its_generated_code_is_what_the_contract_says(folder: Path, tmp_path: Path) -> None:
    """gen/ is what `make clients` would write."""
    build(folder / "generate", tmp_path, folder=folder, env={"PYTHON": sys.executable})

    def tree(root: Path) -> dict[str, str]:
        return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.ts")}

    assert tree(tmp_path / "gen") == tree(TYPESCRIPT / "gen"), "run `make clients`"


def test_its_packages_are_pinned() -> None:
    """To one version each, with a hash, and to no registry."""
    package = json.loads((TYPESCRIPT / "package.json").read_text())
    locked = json.loads((TYPESCRIPT / "package-lock.json").read_text())["packages"]
    root = locked.pop("")
    for kind in ("dependencies", "devDependencies"):
        assert root[kind] == package[kind], "run `npm install`"
        for name, version in package[kind].items():
            assert re.fullmatch(r"\d+(\.\d+){2}", version), name
            assert locked[f"node_modules/{name}"]["version"] == version
    for name, each in locked.items():
        assert "integrity" in each, name
        assert "resolved" not in each, name


def test_its_own_tests_pass(folder: Path) -> None:
    """Lines become the items that they say."""
    build("npm", "test", folder=folder)


async def test_the_readme_s_lines_run(folder: Path) -> None:
    """What it gives for one's own program, as it stands but for the address: the answer is written."""
    lines = block("clients/typescript/README.md", "import { credentials }")
    async with house(settings={"default_model": "fake"}) as h:
        (folder / "src" / "readme.ts").write_text(lines.replace("127.0.0.1:50051", h.target))
        await asyncio.to_thread(build, "npm", "run", "build", folder=folder)
        process = await asyncio.create_subprocess_exec(
            "node", folder / "dist" / "src" / "readme.js", stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0
    assert out.decode().split()[:4] == ["a", "{", "'$case':", "'completion',"]
