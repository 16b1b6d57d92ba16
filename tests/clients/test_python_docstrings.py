"""The examples in the client's docstrings run as they stand, but for the address; a forgotten `await` is an error."""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import re
import textwrap
import warnings
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

import unisono_client
from tests.clients.served import served
from unisono_client import Client, RollingSession

PACKAGE = Path(unisono_client.__file__).parent
ADDRESS = "127.0.0.1:50051"


def examples() -> list[tuple[str, str]]:
    """Each module's own, which stand indented in its docstring."""
    found: list[tuple[str, str]] = []
    for path in sorted(PACKAGE.glob("*.py")):
        told = inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text())) or "")
        found += [
            (path.stem, textwrap.dedent(block))
            for block in re.findall(r"^(?: {4}\S.*\n(?:(?: {4}.*)?\n)*)", told + "\n", re.MULTILINE)
        ]
    return found


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Where a service listens."""
    with served() as found:
        yield found


@pytest.mark.parametrize(("module", "example"), examples(), ids=[module for module, _ in examples()])
async def test_an_example(module: str, example: str, target: str) -> None:
    """It runs."""
    if module == "langchain" and importlib.util.find_spec("langchain_core") is None:
        pytest.skip("langchain-core is not installed")
    names = importlib.import_module(f"unisono_client.{module}").__dict__ | vars(unisono_client)
    if module == "sync":
        names |= {"Client": importlib.import_module("unisono_client.sync").Client}

    async def feed(session: RollingSession) -> None:
        await session.add("one")
        await session.close_input()

    example = example.replace(ADDRESS, target).replace("llama3.2", "first")
    for call in ("batch_generate(", "ChatUnisono("):
        example = example.replace(
            call, f"{call}target={target!r}, prompts=" if "batch" in call else f"{call}target={target!r}, "
        )
    code: CodeType = compile(example, module, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    async with Client(target) as client:
        given: dict[str, Any] = {**names, "items": ["x"], "prompts": ["x"], "feed": feed}
        if "Client(" not in example:
            given["client"] = client
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", RuntimeWarning)
            ran = FunctionType(code, given)()
            if isinstance(ran, Awaitable):
                await ran
            del ran
            _ = gc.collect()
    assert [str(each.message) for each in warned if "never awaited" in str(each.message)] == []


def test_there_are_some() -> None:
    """The modules whose docstrings begin with an example."""
    assert {module for module, _ in examples()} >= {
        "client",
        "session",
        "sync",
        "rolling",
        "config",
        "items",
        "scripts",
    }
