"""Slots that were learned are there after a restart of the service, and put right where they are wrong."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from tests.fakes.ollama import FakeOllama, RequestRecord
from tests.integration.service import Seen, chat, chats, config
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.bootstrap import running
from unisono.config import Settings

LONG_PROMPT = "word " * 600


@asynccontextmanager
async def serving(fake: FakeOllama, state_dir: Path | str) -> AsyncGenerator[Any, None]:
    """A service of its own, by its stub; what it learns is written at the latest when it is left."""
    settings = Settings(listen="127.0.0.1:0", ollama_url=fake.url, drain=0.0, state_dir=str(state_dir))
    async with running(settings) as service, grpc.aio.insecure_channel(service.target) as channel:
        yield pb_grpc.BatchInferenceStub(channel)


async def slots_seen(stub: Any, items: Sequence[item_pb2.Item]) -> tuple[Seen, event_pb2.SlotCount]:
    """Runs a batch; what it saw, and what the service knows of the slots afterwards."""
    seen = Seen()
    async for message in stub.RunBatch(pb.RunBatchRequest(config=config(), items=items)):
        seen.add(message.event)
    info = await stub.GetServerInfo(pb.GetServerInfoRequest())
    return seen, info.backends[0].runners[0].slots


async def slots_after(fake: FakeOllama, state_dir: Path | str, count: int) -> tuple[Seen, event_pb2.SlotCount]:
    """The same for so many items, in a service of its own."""
    async with serving(fake, state_dir) as stub:
        return await slots_seen(stub, chats(count, num_predict=12))


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


@pytest.mark.parametrize(
    "n_batch", [pytest.param(512, id="one prompt a pass"), pytest.param(4096, id="six prompts a pass")]
)
async def test_wrong_memory_is_put_right_by_items_that_are_nearly_all_prompt(n_batch: int, tmp_path: Path) -> None:
    """Two are remembered of eight, and no item is long enough to prove a number: known is then "at least so many".

    Each answer is two tokens after a long prompt. The prompts are computed one after the other, so few of them are
    seen to hold a slot at one time; but more than two are, and then all slots are used.
    """
    async with FakeOllama(num_parallel=8, pass_s=0.01, prefill_token_s=0.00001, n_batch=n_batch) as fake:
        _ = await slots_after(fake, tmp_path, 4)
        path = tmp_path / "slots.json"
        kept = json.loads(path.read_text())
        for value in kept["runners"].values():
            value.update(count=2, at_least=2)
        _ = path.write_text(json.dumps(kept))
        before = fake.received
        items = [chat(f"i{n}", f"{n} {LONG_PROMPT}", num_predict=2) for n in range(100)]
        async with serving(fake, tmp_path) as stub:
            seen, slots = await slots_seen(stub, items)
        assert len(seen.results) == len(items)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert slots.source in (event_pb2.SLOT_SOURCE_UNSPECIFIED, event_pb2.SLOT_SOURCE_LEARNED)
        assert slots.count in (0, 8)
        assert 2 < slots.at_least <= 8
        last = json.loads(path.read_text())["runners"].popitem()[1]
        assert last == {"count": slots.count, "at_least": slots.at_least}
        assert most_at_one_time(fake.requests[before:]) == 8


def most_at_one_time(requests: Sequence[RequestRecord]) -> int:
    """The most of these requests that had a slot at one time."""
    steps = [
        step
        for one in requests
        if one.slot_ns is not None and one.end_ns is not None
        for step in ((one.slot_ns, 1), (one.end_ns, -1))
    ]
    return max(accumulate(change for _, change in sorted(steps)))


async def test_what_others_take_for_a_while_is_not_kept(tmp_path: Path) -> None:
    """A foreign client has three of four slots when the service is stopped: the next one begins with four."""

    def kept() -> list[int]:
        runners = json.loads((tmp_path / "slots.json").read_text())["runners"]
        return [runner["count"] for runner in runners.values()]

    async with FakeOllama(num_parallel=4, pass_s=0.005) as fake:
        async with serving(fake, tmp_path) as stub:
            _, slots = await slots_seen(stub, chats(40, num_predict=12))
            assert (slots.count, slots.source) == (4, event_pb2.SLOT_SOURCE_LEARNED)
            guest = await fake.foreign(slots=3)
            seen, slots = await slots_seen(stub, chats(20, num_predict=12))
            assert set(seen.states().values()) == {"COMPLETED"}
            assert (slots.count, slots.source, slots.limit) == (4, event_pb2.SLOT_SOURCE_LEARNED, 1)
        assert kept()[-1] == 4
        guest.leave()
        before = fake.received
        seen, slots = await slots_after(fake, tmp_path, 60)
        planned = seen.of("group_planned")[0].slots
        assert (planned.count, planned.source) == (4, event_pb2.SLOT_SOURCE_REMEMBERED)
        assert most_at_one_time(fake.requests[before:]) == 4
        assert (slots.count, kept()[-1]) == (4, 4)


async def test_nothing_is_kept_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word "none" keeps the service from writing anything."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    async with FakeOllama(num_parallel=4, pass_s=0.005) as fake:
        _ = await slots_after(fake, "none", 20)
    assert not os.listdir(tmp_path)  # noqa: PTH208 - a look at a folder, after all that is asynchronous
