"""The file of remembered slots: kept, bounded, and never in the way."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from unisono.adapters.state import slots_file
from unisono.adapters.state.slots_file import MOST_ENTRIES, SlotsFile
from unisono.config import Settings
from unisono.core.capacity import SlotMemo
from unisono.folders import slots_path

EIGHT = SlotMemo(count=8, at_least=8)


def names_in(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="to root, every folder may be written")


async def test_is_there_after_a_restart(tmp_path: Path) -> None:
    """Written at the end, in a folder that is made for it and that nobody else may read."""
    path = tmp_path / "new" / "unisono" / "slots.json"
    first = SlotsFile(path)
    first.put("http://a d ", EIGHT)
    await first.close()
    assert SlotsFile(path).get("http://a d ") == EIGHT
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert names_in(path.parent) == [".slots.json.lock", "slots.json"]
    assert json.loads(path.read_text()) == {
        "version": 1,
        "runners": {"http://a d ": {"count": 8, "at_least": 8}},
    }


async def test_is_written_a_while_after_the_first_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for many changes, and again for later ones; not at all without any."""
    path = tmp_path / "slots.json"
    written: list[bytes] = []
    replace = SlotsFile._replace

    def count(self: SlotsFile, text: bytes) -> None:
        written.append(text)
        replace(self, text)

    monkeypatch.setattr(SlotsFile, "_replace", count)
    file = SlotsFile(path, pause_s=0.05)
    for n in range(100):
        file.put(f"http://a d{n} ", EIGHT)
    assert not written
    assert file._writer is not None
    await file._writer
    assert len(written) == 1
    assert len(json.loads(path.read_text())["runners"]) == 100
    await file.close()
    assert len(written) == 1
    file.put("http://a d0 ", EIGHT)
    await file.close()
    assert len(written) == 1
    file.put("http://a d0 ", SlotMemo(count=2))
    await file.close()
    assert len(written) == 2


async def test_forgetting_is_kept_too(tmp_path: Path) -> None:
    """What was forgotten does not come back."""
    path = tmp_path / "slots.json"
    file = SlotsFile(path)
    file.put("http://a d ", EIGHT)
    await file.close()
    file = SlotsFile(path)
    file.forget("http://a")
    await file.close()
    assert SlotsFile(path).get("http://a d ") is None


async def test_two_services_with_one_file_keep_what_the_other_learned(tmp_path: Path) -> None:
    """However long ago each of them read it; of what one forgets, only its own backend's are gone."""
    path = tmp_path / "slots.json"
    first, second = SlotsFile(path, pause_s=0.0), SlotsFile(path, pause_s=0.0)
    first.put("http://a d ", EIGHT)
    assert first._writer is not None
    await first._writer
    second.put("http://b d ", EIGHT)
    second.put("http://b e ", EIGHT)
    assert second._writer is not None
    await second._writer
    first.put("http://a e ", EIGHT)
    await first.close()
    assert [*SlotsFile(path)._entries] == ["http://a d ", "http://b d ", "http://b e ", "http://a e "]
    second.forget("http://b")
    await second.close()
    assert [*SlotsFile(path)._entries] == ["http://a d ", "http://a e "]


async def test_many_who_write_at_one_time_lose_nothing(tmp_path: Path) -> None:
    """Each reads, and replaces the file, while no other does."""
    path = tmp_path / "slots.json"
    files = [SlotsFile(path, pause_s=0.0) for _ in range(20)]
    for n, file in enumerate(files):
        file.put(f"http://a d{n} ", EIGHT)
    _ = await asyncio.gather(*(file.close() for file in files))
    assert len(SlotsFile(path)._entries) == 20


async def test_a_lock_that_is_never_let_go_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that was stopped while it wrote holds up nobody's end; what was not written goes with the next."""
    monkeypatch.setattr(slots_file, "_LOCK_PAUSES_S", (0.001,) * 3)
    path = tmp_path / "slots.json"
    file = SlotsFile(path, pause_s=0.0)
    with (tmp_path / ".slots.json.lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        file.put("http://a d ", EIGHT)
        assert file._writer is not None
        await file._writer
    assert "another process keeps it locked" in caplog.text
    assert not path.exists()
    file.put("http://a e ", EIGHT)
    await file.close()
    assert [*SlotsFile(path)._entries] == ["http://a d ", "http://a e "]


async def test_what_is_asked_for_stays(tmp_path: Path) -> None:
    """In the file too, where many others come after it."""
    path = tmp_path / "slots.json"
    file = SlotsFile(path)
    for n in range(MOST_ENTRIES):
        file.put(f"http://a d{n} ", EIGHT)
    await file.close()
    file = SlotsFile(path)
    assert file.get("http://a d0 ") == EIGHT
    file.put("http://a new ", EIGHT)
    await file.close()
    kept = SlotsFile(path)
    assert kept.get("http://a d0 ") == EIGHT
    assert kept.get("http://a d1 ") is None


async def test_closing_waits_for_a_write_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that has begun ends before another one does, so that the last state is what stays."""
    path = tmp_path / "slots.json"
    file = SlotsFile(path, pause_s=0.0)
    replace, under_way = SlotsFile._replace, asyncio.Event()
    loop = asyncio.get_running_loop()
    order: list[str] = []

    def slow(self: SlotsFile, text: bytes) -> None:
        order.append("begin")
        loop.call_soon_threadsafe(under_way.set)
        replace(self, text)
        order.append("end")

    monkeypatch.setattr(SlotsFile, "_replace", slow)
    file.put("http://a d ", SlotMemo(count=1))
    _ = await under_way.wait()
    file.put("http://a d ", EIGHT)
    await file.close()
    assert order in (["begin", "end"] * 2, ["begin", "end"] * 3)
    assert SlotsFile(path).get("http://a d ") == EIGHT


async def test_the_oldest_makes_room(tmp_path: Path) -> None:
    """Those that nobody asked for longest; a key that is no name is not kept at all."""
    path = tmp_path / "slots.json"
    file = SlotsFile(path)
    for n in range(MOST_ENTRIES):
        file.put(f"http://a d{n} ", EIGHT)
    assert file.get("http://a d0 ") == EIGHT
    file.put("http://a new ", EIGHT)
    file.put("http://a " + "x" * 3_000, EIGHT)
    file.put("http://a \ud800 ", EIGHT)
    assert file.get("http://a d1 ") is None
    assert file.get("http://a d0 ") == file.get("http://a new ") == EIGHT
    await file.close()
    assert len(json.loads(path.read_text())["runners"]) == MOST_ENTRIES


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2, "runners": {}}',
        b'{"version": 1, "runners": {"k": {"count": -1}}}',
        b'{"version": 1, "runners": {"k": {"count": "8"}}}',
        b"[" * 100_000,
        b" " * (5 * 1024 * 1024),
    ],
)
async def test_a_broken_file_costs_one_warning(text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is passed over, and replaced by the next write."""
    path = tmp_path / "slots.json"
    _ = path.write_bytes(text)
    file = SlotsFile(path)
    assert file.get("k") is None
    file.put("k", EIGHT)
    await file.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    assert SlotsFile(path).get("k") == EIGHT


async def test_a_folder_in_its_place_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It can neither be read nor written, and is remembered until the end all the same."""
    path = tmp_path / "slots.json"
    path.mkdir()
    file = SlotsFile(path)
    for n in range(3):
        file.put("k", SlotMemo(count=n + 1))
        await file.close()
    assert file.get("k") == SlotMemo(count=3)
    assert len(caplog.records) == 1
    assert names_in(tmp_path) == [".slots.json.lock", "slots.json"]


@needs_permissions
async def test_a_folder_that_may_not_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The service goes on without."""
    (folder := tmp_path / "locked").mkdir(mode=0o500)
    file = SlotsFile(folder / "deep" / "slots.json")
    for n in range(3):
        file.put("k", SlotMemo(count=n + 1))
        await file.close()
    assert len(caplog.records) == 1


async def test_a_folder_that_is_a_file_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As above, for everybody."""
    _ = (tmp_path / "file").write_text("")
    file = SlotsFile(tmp_path / "file" / "slots.json")
    file.put("k", EIGHT)
    await file.close()
    file.put("k", SlotMemo(count=1))
    await file.close()
    assert len(caplog.records) == 1


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the setting says; else where the XDG Base Directory Specification says."""

    def path(state_dir: str, **environ: str) -> Any:
        return slots_path(Settings(state_dir=state_dir), environ)

    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".local" / "state" / "unisono" / "slots.json"
    assert path("") == path("", XDG_STATE_HOME="") == path("", XDG_STATE_HOME="relative") == home
    assert path("", XDG_STATE_HOME="/var/x") == Path("/var/x/unisono/slots.json")
    assert path("/srv/state", XDG_STATE_HOME="/var/x") == Path("/srv/state/slots.json")
    assert path("~/state") == tmp_path / "state" / "slots.json"
    assert path("none") is path("None ") is None

    def nobody(_: type[Path]) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert path("") is None
    assert slots_file.MOST_ENTRIES == 1_000
