"""What every memory of slots promises: the stand-in, and the file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.slot_memory import SlotsInMemory
from unisono.adapters.state.slots_file import SlotsFile
from unisono.app.ports import SlotMemory
from unisono.core.capacity import SlotMemo

FOUR = SlotMemo(count=4, at_least=4)


@pytest.fixture(params=["stand-in", "file"])
async def memory(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SlotMemory]:
    """An empty one."""
    if request.param == "stand-in":
        yield SlotsInMemory()
        return
    file = SlotsFile(tmp_path / "slots.json", pause_s=0.0)
    yield file
    await file.close()


async def test_what_was_put_is_there(memory: SlotMemory) -> None:
    """By its key, and the last one counts."""
    assert memory.get("http://a d1 ") is None
    memory.put("http://a d1 ", SlotMemo(at_least=3))
    memory.put("http://a d2 ", SlotMemo(count=2, at_least=2))
    memory.put("http://a d1 ", FOUR)
    memory.put("http://a d1 ", FOUR)
    assert memory.get("http://a d1 ") == FOUR
    assert memory.get("http://a d2 ") == SlotMemo(count=2, at_least=2)


async def test_a_backend_is_forgotten_with_all_its_runners(memory: SlotMemory) -> None:
    """And no other whose address begins alike."""
    for key in ("http://a d1 ", "http://a d2 num_ctx=4096", "http://a:1 d1 ", "http://ab d1 "):
        memory.put(key, FOUR)
    memory.forget("http://a")
    memory.forget("http://nobody")
    kept = [key for key in ("http://a d1 ", "http://a d2 num_ctx=4096", "http://a:1 d1 ") if memory.get(key)]
    assert kept == ["http://a:1 d1 "]
    assert memory.get("http://ab d1 ") == FOUR


async def test_any_text_is_a_key(memory: SlotMemory) -> None:
    """Names of models are the caller's."""
    key = 'http://a "\\\n é 🎵'
    memory.put(key, FOUR)
    assert memory.get(key) == FOUR
