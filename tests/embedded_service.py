"""A whole service over an embedded engine of its own, as a caller meets it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from tests.engine import LIMIT_S, skip_without_engine
from tests.integration.service import Seen
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import item_pb2
from unisono.adapters.embedded import EmbeddedBackend
from unisono.bootstrap import running
from unisono.config import Settings


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
    made = Settings(**{"listen": "127.0.0.1:0", "embedded": True, "drain": 0.0, "state_dir": "none", **settings})
    async with running(made) as service:
        assert isinstance(service.backend, EmbeddedBackend)
        async with grpc.aio.insecure_channel(service.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield EmbeddedService(backend=service.backend, stub=pb_grpc.BatchInferenceStub(channel))
