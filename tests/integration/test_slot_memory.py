"""Slots that were learned are there after a restart of the service, and put right where they are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from tests.fakes.ollama import FakeOllama
from tests.integration.service import Seen, chats, config
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import event_pb2
from unisono.bootstrap import running
from unisono.config import Settings


async def slots_after(fake: FakeOllama, state_dir: Path | str, count: int) -> tuple[Seen, event_pb2.SlotCount]:
    """Runs a batch in a service of its own; what it saw, and what the service knows of the slots afterwards."""
    seen = Seen()
    settings = Settings(listen="127.0.0.1:0", ollama_url=fake.url, drain=0.0, state_dir=str(state_dir))
    async with running(settings) as service, grpc.aio.insecure_channel(service.target) as channel:
        stub: Any = pb_grpc.BatchInferenceStub(channel)
        async for message in stub.RunBatch(pb.RunBatchRequest(config=config(), items=chats(count, num_predict=12))):
            seen.add(message.event)
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
    return seen, info.backends[0].runners[0].slots


async def test_learned_slots_are_remembered(tmp_path: Path) -> None:
    """The next service begins with the number, and says that it is to be confirmed."""
    async with FakeOllama(num_parallel=4, pass_s=0.005) as fake:
        _, slots = await slots_after(fake, tmp_path, 40)
        assert (slots.count, slots.source) == (4, event_pb2.SLOT_SOURCE_LEARNED)
        kept = json.loads((tmp_path / "slots.json").read_text())["runners"]
        # The runner itself, and the model with whatever options.
        assert len(kept) == 2
        for key, value in kept.items():
            assert key.startswith(f"{fake.url} ")
            assert value == {"count": 4, "at_least": 4}
        seen, slots = await slots_after(fake, tmp_path, 2)
        assert (slots.count, slots.source) == (4, event_pb2.SLOT_SOURCE_REMEMBERED)
        assert seen.report.groups[0].group.slots.count == 4


@pytest.mark.parametrize("remembered", [1, 8])
async def test_wrong_memory_is_put_right(remembered: int, tmp_path: Path) -> None:
    """Within one batch, and in the file."""
    async with FakeOllama(num_parallel=4, pass_s=0.005) as fake:
        _ = await slots_after(fake, tmp_path, 40)
        path = tmp_path / "slots.json"
        kept = json.loads(path.read_text())
        for value in kept["runners"].values():
            value["count"] = remembered
        _ = path.write_text(json.dumps(kept))
        _, slots = await slots_after(fake, tmp_path, 100)
        assert (slots.count, slots.source) == (4, event_pb2.SLOT_SOURCE_LEARNED)
        assert json.loads(path.read_text())["runners"].popitem()[1]["count"] == 4


async def test_nothing_is_kept_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word "none" keeps the service from writing anything."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    async with FakeOllama(num_parallel=4, pass_s=0.005) as fake:
        _ = await slots_after(fake, "none", 20)
    assert not os.listdir(tmp_path)  # noqa: PTH208 - a look at a folder, after all that is asynchronous
