"""No guide says what nobody tries: each code block is run by a test, or says here why not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests import guides
from tests.guides import GUIDES, ROOT, Block, blocks, code_in, prose, text_of
from unisono.config import Settings

# Words that each block alone of its guide has, and the test that runs it, a path from tests/ on. Where none does, the
# reason stands after a hash sign.
RUN_BY = {
    "README.md": {
        "make run": "# `make test` runs this test; what `make run` runs is the first of the command lines below",
        "from openai import OpenAI": "acceptance/test_readme.py::test_openai_s_client_answers",
        "import grpc": "acceptance/test_readme.py::test_the_first_call_from_python_answers",
        "grpcurl": "clients/test_grpcurl.py::test_the_readme_s_command_answers",
        "/v1/batches/$BATCH/results": "acceptance/test_readme.py::test_the_http_calls_answer",
        "/api/batch/generate": "acceptance/test_readme.py::test_the_http_calls_answer",
        "export OLLAMA_HOST": "acceptance/test_readme.py::test_the_drop_in_answers",
        "unisono doctor": "acceptance/test_readme.py::test_the_command_lines_run",
        "unisono submit": "acceptance/test_readme.py::test_a_batch_is_kept_by_the_command_lines",
        "unisono bench": "acceptance/test_guide_commands.py::test_commands_are_known",
        "UNISONO_BACKENDS=": "acceptance/test_guide_commands.py::test_the_backends_are_understood",
    },
    "clients/README.md": {
        "make clients": "# makes committed files anew, and runs all of tests/clients",
        "from ollama import AsyncClient": "acceptance/test_guide_from_ollama.py::test_a_gather_becomes_a_batch",
        "result.content async for": "acceptance/test_guide_from_ollama.py::test_a_gather_becomes_a_batch",
        "client.rolling_session(": "clients/test_python_guide.py::test_the_snippet",
        "backend_service.py": "clients/test_python_guide.py::test_the_command",
        "import ollama\n": "acceptance/test_guide_from_ollama.py::test_both_sides_get_the_same",
    },
    "clients/go/README.md": {
        "go run": "# clients/test_go.py builds the same program, and runs it with the same arguments",
        "go get": "# asks a package index for a version of this module that was published",
        "connection, err :=": "clients/test_readme_lines.py::test_go",
    },
    "clients/java/README.md": {
        "mvn package": "# clients/test_java.py builds the same program, and runs it with the same arguments",
        "ManagedChannel": "clients/test_readme_lines.py::test_java",
    },
    "clients/python/README.md": {
        "pip install": "# asks a package index; the tests run on the same sources",
        "from unisono_client.sync": "clients/test_python_readme.py::test_the_script_and_the_chat_model",
        "from unisono_client import": "clients/test_python_readme.py::test_the_program",
        "from unisono_client.langchain": "clients/test_python_readme.py::test_the_script_and_the_chat_model",
    },
    "clients/rust/README.md": {
        "cargo run": "# clients/test_rust.py builds the same program, and runs it with the same arguments",
        "use unisono_client::": "# cargo tests it as an example of the library's documentation: clients/test_rust.py",
    },
    "clients/typescript/README.md": {
        "npm ci": "# clients/test_typescript.py builds the same program, and runs it with the same arguments",
        "import { credentials }": "clients/test_typescript.py::test_the_readme_s_lines_run",
    },
    "deploy/README.md": {
        "exec ollama": "acceptance/test_guide_commands.py::test_docker_is_called_as_the_files_say",
        "--no-deps": "acceptance/test_guide_commands.py::test_docker_is_called_as_the_files_say",
        "memory        =": "acceptance/test_guide_tuning.py::test_the_formula_is_the_product_s",
        "curl -s 127.0.0.1:11434/api/show": "acceptance/test_guide_tuning.py::test_the_worked_example",
        "grpcurl": "acceptance/test_guide_tuning.py::test_a_plan_tells_the_memory",
        "kv_cache_bytes": "acceptance/test_guide_tuning.py::test_a_plan_tells_the_memory",
        "Report\n": "acceptance/test_guide_tuning.py::test_the_report_looks_like_this",
    },
    "service/DESIGN.md": {"protos/unisono/v1/": "acceptance/test_guide_commands.py::test_the_house_is_as_drawn"},
}

ALL = [each for guide in GUIDES for each in blocks(guide)]
# Variables of others that the guides speak of.
FOREIGN = {
    *("OLLAMA_HOST", "OLLAMA_NUM_PARALLEL", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MAX_QUEUE", "OLLAMA_CONTEXT_LENGTH"),
    *("OLLAMA_KV_CACHE_TYPE", "OLLAMA_FLASH_ATTENTION"),
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME", "GRAFANA_PASSWORD"),
}


def run_by(block: Block) -> list[str]:
    """What is written above of a block."""
    return [what for words, what in RUN_BY.get(block.guide, {}).items() if words in block.text]


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.guide}:{block.line}")
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    """One entry above, whose test is there and is about this guide, or whose reason is a sentence."""
    (what,) = run_by(block)
    if what.startswith("#"):
        assert len(what.split()) > 4
        return
    path, _, name = what.partition("::")
    source = (ROOT / "tests" / path).read_text()
    functions = {
        node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert name in functions, what
    # It reads the guide, by its whole path or piece by piece.
    assert all(f'"{part}"' in source for part in Path(block.guide).parts) or f'"{block.guide}"' in source, what


def test_the_list_has_nothing_that_is_gone() -> None:
    """Each entry above stands for one block."""
    for guide, entries in RUN_BY.items():
        for words in entries:
            assert [words in each.text for each in blocks(guide)].count(True) == 1, (guide, words)


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide: str) -> None:
    """Relative links name a file that is there, and a heading of it where they name one."""
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)", prose(guide)):
        path, _, anchor = link.partition("#")
        target = ((ROOT / guide).parent / path).resolve() if path else ROOT / guide
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


def anchors(guide: str) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.*)$", prose(guide), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_variable_exists(guide: str) -> None:
    """A variable of ours is a setting; one of another's is known to be one."""
    ours = {f"UNISONO_{name.upper()}" for name in Settings.model_fields}
    of_one = ("UNISONO_SLOTS_", "UNISONO_BACKEND_TOKEN_")
    second_names = {f"OLLAMA_BATCH_{name}" for name in ("ENABLED", "SIZE", "TIMEOUT", "MEMORY_FACTOR")}
    of_clients = {"UNISONO_SERVER", "UNISONO_TARGET"}
    for name in re.findall(r"\b(?:UNISONO|OLLAMA|OTEL|GRAFANA)_[A-Z_]*[A-Z]\b", text_of(guide)):
        assert name in ours | FOREIGN | second_names | of_clients or name.startswith(of_one), name


def test_guides_name_commands_that_exist() -> None:
    """`make TARGET` and `unisono COMMAND`, wherever they stand between backticks."""
    makefile = (ROOT / "Makefile").read_text()
    commands = {"run", "doctor", "bench", "eval", "trace-check", "serve"}
    commands |= {"submit", "watch", "results", "status", "list", "cancel", "retry", "delete"}
    for guide in GUIDES:
        for code in code_in(prose(guide)):
            if found := re.match(r"make ([a-z][a-z-]*)", code):
                assert re.search(rf"^{found[1]}:", makefile, re.MULTILINE), code
            if found := re.match(r"unisono ([a-z][a-z-]*)", code):
                assert found[1] in commands, code


def test_all_guides_are_found() -> None:
    """The four for everybody, and one for each client."""
    assert {"README.md", "clients/README.md", "deploy/README.md", "service/DESIGN.md"} < set(guides.GUIDES)
    assert {
        path.parent.name for path in map(Path, GUIDES) if path.parts[0] == "clients" and len(path.parts) == 3
    } == {path.name for path in (ROOT / "clients").iterdir() if path.is_dir()}
