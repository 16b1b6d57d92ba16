"""The commands and pictures of the guides, as far as they can be tried without what they are for."""

from __future__ import annotations

import os
import re
import shlex

import pytest
import typer
import yaml  # type: ignore[import-untyped]  # PyYAML carries no types
from pydantic import SecretStr

from tests.guides import ROOT, block, blocks
from unisono.config import Settings, configured_backends
from unisono.edge.cli.main import build_cli

DEPLOY, DESIGN = "deploy/README.md", "service/DESIGN.md"


async def nobody(**_: object) -> None:
    """Starts nothing: commands are read here, and not carried out."""


def read_command(words: list[str]) -> None:
    """A command line of `unisono` as the program reads it; raises for a word that it does not know."""
    group = typer.main.get_command(build_cli(nobody, nobody, version="0", start_engine=nobody))  # type: ignore[arg-type]
    command = group.get_command(typer.Context(group), words[0])  # type: ignore[attr-defined]
    assert command is not None, words
    command.make_context(words[0], words[1:], resilient_parsing=False)


@pytest.mark.parametrize("line", block("README.md", "unisono bench").splitlines())
def test_commands_are_known(line: str) -> None:
    """Each line of the bench is one that the program takes."""
    words = shlex.split(line, comments=True)
    assert words.pop(0) == "unisono"
    read_command(words)
    with pytest.raises(Exception, match="No such option"):
        read_command([*words, "--nonsense"])


def test_the_backends_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of several backends, as a shell reads them: what stands for a token is one here."""
    for line in block("README.md", "UNISONO_BACKENDS=").replace("=…", "=secret").splitlines():
        ((name, value),) = [word.split("=", 1) for word in shlex.split(line)]
        monkeypatch.setenv(name, value)
    settings = Settings()
    found = {one.name: one for one in configured_backends(settings, os.environ)}
    assert {name: one.kind for name, one in found.items()} == {
        "gpu1": "ollama",
        "gpu2": "ollama",
        "cpp": "llama-server",
        "emb": "embedded",
    }
    assert found["gpu1"].slots == 8
    assert found["gpu2"].token == SecretStr("secret")


def test_docker_is_called_as_the_files_say() -> None:
    """Files, services and commands that are handed to docker exist; nothing of it is run here."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    lines = [*block(DEPLOY, "exec ollama").splitlines(), *block(DEPLOY, "--no-deps").splitlines()]
    lines = [line for line in lines if line.startswith("docker")]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[:3] == ["docker", "compose", "-f"]
        assert (ROOT / words[3]).is_file()
        if words[4] == "exec":
            assert words[5] in services
            if words[6] == "unisono":
                read_command(words[7:])
        else:
            assert words[4:7] == ["up", "--build", "--wait"]
            assert not words[7:] or (words[7] == "--no-deps" and set(words[8:]) <= set(services))


def test_the_house_is_as_drawn() -> None:
    """Every module of core/ and app/ stands in the drawing, and every folder of the service."""
    (drawing,) = [each.text for each in blocks(DESIGN)]
    house = ROOT / "service" / "unisono"
    words = set(re.findall(r"[a-z_]+", drawing))
    for folder in ("core", "app"):
        modules = {path.stem for path in (house / folder).glob("[!_]*.py")} - {"ports"}
        assert modules <= words, modules - words
    folders = {path.name for path in (*house.glob("[!_]*/"), *(house / "adapters").glob("[!_]*/"))}
    assert folders - {"examples"} <= words, folders - words
