"""Files beside the journal: where a write fails, seems to have failed, or a process ended in the middle of one."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from unisono.adapters.journal.failpoints import failure
from unisono.adapters.journal.files import Draft, SqliteFiles
from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.core.durable import Tally
from unisono.core.errors import LimitExceededError
from unisono.core.files import FileBatch, FileBatchState, LineError, StoredFile

OPEN = FileBatch(
    batch_id="batch_1",
    input_file_id="file-1",
    endpoint="/v1/embeddings",
    window="24h",
    expires_ns=100,
    created_ns=10,
    metadata={"job": "night"},
)


class Failing:
    """A failpoint that fails at a place, once it is told to."""

    def __init__(self) -> None:
        self.place = ""

    def __call__(self, place: str) -> None:
        """The process is at a place."""
        if place == self.place:
            raise failure(place)


@asynccontextmanager
async def opened(folder: Path) -> AsyncGenerator[tuple[SqliteFiles, Failing]]:
    """The files of a folder."""
    failing = Failing()
    journal = SqliteJournal(folder, keep_s=60.0, failpoint=failing)
    await journal.start(1)
    try:
        files = journal.files()
        await files.start()
        yield files, failing
    finally:
        await journal.close()


async def draft_of(files: SqliteFiles, data: bytes) -> tuple[Draft, StoredFile]:
    """A draft with something in it, and what it is to be."""
    draft = await files.draft()
    await draft.write(data)
    file = StoredFile(
        file_id=draft.file_id,
        purpose="batch",
        filename="a.jsonl",
        size_bytes=draft.size_bytes,
        created_ns=5,
        expires_ns=50,
    )
    return draft, file


def on_disk(folder: Path) -> set[str]:
    """The names in the folder of files."""
    return {path.name for path in (folder / "files").iterdir()}


async def test_a_file_is_there_when_it_is_kept_and_not_before(tmp_path: Path) -> None:
    """Then it can be found, read and deleted; for nobody else's eyes."""
    async with opened(tmp_path) as (files, _):
        draft, file = await draft_of(files, b"one")
        assert on_disk(tmp_path) == {f"{file.file_id}.part"}
        assert await files.find(file.file_id) is None
        assert await files.open(file.file_id) is None
        await files.keep(draft, file)
        assert await files.find(file.file_id) == file
        assert (tmp_path / "files" / file.file_id).stat().st_mode & 0o077 == 0
        await draft.discard()
        stream = await files.open(file.file_id)
        assert stream is not None
        with stream:
            assert stream.read() == b"one"
        with pytest.raises(ValueError, match="not written any more"):
            await draft.write(b"two")
        assert await files.delete(file.file_id)
        assert not await files.delete(file.file_id)
        assert on_disk(tmp_path) == set()


async def test_what_a_process_left_behind_is_forgotten(tmp_path: Path) -> None:
    """Drafts, and files that never got a row; not what is somebody else's."""
    async with opened(tmp_path) as (files, _):
        await files.keep(*await draft_of(files, b"kept"))
        known = on_disk(tmp_path)
    for name in ("file-" + "0" * 24, "file-" + "1" * 24 + ".part", "notes.txt"):
        (tmp_path / "files" / name).write_text("?")
    async with opened(tmp_path):
        assert on_disk(tmp_path) == known | {"notes.txt"}


async def test_a_file_whose_row_cannot_be_written_is_gone(tmp_path: Path) -> None:
    """Its caller was told that it was not kept."""
    async with opened(tmp_path) as (files, failing):
        draft, file = await draft_of(files, b"one")
        failing.place = "call.before_commit"
        with pytest.raises(LimitExceededError):
            await files.keep(draft, file)
        failing.place = ""
        assert await files.find(file.file_id) is None
        assert on_disk(tmp_path) == set()


async def test_a_draft_is_kept_once(tmp_path: Path) -> None:
    """What was refused is gone: kept again, it would be a row without a file."""
    async with opened(tmp_path) as (files, failing):
        draft, file = await draft_of(files, b"one")
        failing.place = "call.before_commit"
        with pytest.raises(LimitExceededError):
            await files.keep(draft, file)
        failing.place = ""
        with pytest.raises(ValueError, match="not written any more"):
            await files.keep(draft, file)
        assert await files.find(file.file_id) is None


@pytest.mark.parametrize("step", ["fsync", "rename"])
async def test_a_draft_that_cannot_be_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """At whatever step: it is told, and discarded it leaves nothing behind."""
    async with opened(tmp_path) as (files, _):
        draft, file = await draft_of(files, b"one")

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patched:
            patched.setattr(os if step == "fsync" else Path, step, fail)
            with pytest.raises(LimitExceededError, match="see that its disk is well"):
                await files.keep(draft, file)
        await draft.discard()
        assert on_disk(tmp_path) == set()
        assert await files.find(file.file_id) is None


async def test_the_folder_of_files_is_on_the_disk_before_any_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own name too, which stands in the folder above it: else a power cut could take all of it."""
    synced: list[Path] = []

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        async with opened(tmp_path) as (files, _):
            assert synced == [tmp_path]
            draft, file = await draft_of(files, b"one")
            await files.keep(draft, file)
            assert synced == [tmp_path, tmp_path / "files" / f"{file.file_id}.part", tmp_path / "files"]
    async with opened(tmp_path) as (files, _):
        assert await files.find(file.file_id) == file


async def test_a_file_whose_row_was_written_though_that_seemed_to_fail_stays(tmp_path: Path) -> None:
    """A row without a file would be worse."""
    async with opened(tmp_path) as (files, failing):
        draft, file = await draft_of(files, b"one")
        failing.place = "call.after_commit"
        with pytest.raises(LimitExceededError):
            await files.keep(draft, file)
        failing.place = ""
        assert await files.find(file.file_id) == file
        assert on_disk(tmp_path) == {file.file_id}


async def test_a_batch_ends_once(tmp_path: Path) -> None:
    """Though its first end seemed to have failed: the files of the second are not wanted."""
    async with opened(tmp_path) as (files, failing):
        await files.put_batch(OPEN)
        assert await files.open_batches() == [OPEN]
        first, second = await draft_of(files, b"one"), await draft_of(files, b"two")
        ended = replace(
            OPEN,
            state=FileBatchState.COMPLETED,
            ended_ns=30,
            keep_until_ns=40,
            output_file_id=first[1].file_id,
            tally=Tally(items=2, completed=1),
            errors=(LineError(code="c", message="m", line=3),),
        )
        failing.place = "call.after_commit"
        with pytest.raises(LimitExceededError):
            await files.end_batch(ended, [first])
        failing.place = ""
        await files.end_batch(replace(ended, output_file_id=second[1].file_id, ended_ns=35), [second])
        assert await files.find_batch(OPEN.batch_id) == ended
        assert on_disk(tmp_path) == {first[1].file_id}
        assert await files.open_batches() == []
        # What comes too late changes nothing.
        await files.set_cancelling(OPEN.batch_id, 99)
        assert await files.find_batch(OPEN.batch_id) == ended


async def test_the_first_cancel_counts(tmp_path: Path) -> None:
    """Its moment stays."""
    async with opened(tmp_path) as (files, _):
        await files.put_batch(OPEN)
        for at_ns in (20, 21):
            await files.set_cancelling(OPEN.batch_id, at_ns)
        assert await files.find_batch(OPEN.batch_id) == replace(OPEN, cancelling_ns=20)


async def test_what_is_old_goes(tmp_path: Path) -> None:
    """At its time, and not before; open batches never."""
    async with opened(tmp_path) as (files, _):
        draft, file = await draft_of(files, b"one")
        await files.keep(draft, file)
        await files.put_batch(OPEN)
        await files.put_batch(replace(OPEN, batch_id="batch_2", state=FileBatchState.FAILED, keep_until_ns=50))
        await files.delete_old(49)
        assert await files.find(file.file_id) == file
        assert await files.find_batch("batch_2") is not None
        await files.delete_old(50)
        assert await files.find(file.file_id) is None
        assert await files.find_batch("batch_2") is None
        assert await files.find_batch(OPEN.batch_id) == OPEN
        assert on_disk(tmp_path) == set()
