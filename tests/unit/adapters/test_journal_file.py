"""The journal's file: whose it is, which version it is of, and what is said where it cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from tests.fakes.journals import MADE_NS, an_item, begun, events_of, new_batch, sqlite_journal
from unisono.adapters.journal import tables
from unisono.adapters.journal.errors import JournalFileError, JournalInUseError, code_of, translated, words
from unisono.adapters.journal.failpoints import failure
from unisono.adapters.journal.file import JOURNAL_FILE, NEWEST, migrate, open_engines, take_folder
from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.core.batch import BadItem
from unisono.core.errors import LimitExceededError
from unisono.core.model import Item

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="to root, every folder may be written")


# -- Its versions ----------------------------------------------------------------------------------------------


def test_the_steps_make_what_the_tables_say(tmp_path: Path) -> None:
    """Every table, column, key and index: nothing is missing, and nothing is more."""
    path = tmp_path / JOURNAL_FILE
    writer, reader = open_engines(path)
    with reader.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []
    # What alembic does not compare: against the tables as sqlalchemy would make them.
    plain = create_engine("sqlite://")
    tables.metadata.create_all(plain)
    for name in tables.metadata.tables:
        for look in ("get_foreign_keys", "get_unique_constraints", "get_pk_constraint", "get_columns"):
            made, meant = (getattr(inspect(engine), look)(name) for engine in (reader, plain))
            assert sorted(map(str, made)) == sorted(map(str, meant)), f"{look} of {name}"
    with reader.connect() as made_in, plain.connect() as meant_in:
        queries = (
            "select name, type from sqlite_master order by name",
            "select name, sql like '%AUTOINCREMENT%' from sqlite_master where type = 'table' order by name",
            "select name, sql from sqlite_master where type = 'index' and sql is not null order by name",
        )
        for query in queries:
            found = [sorted(map(tuple, each.exec_driver_sql(query))) for each in (made_in, meant_in)]
            without = [[row for row in rows if "alembic" not in row[0]] for rows in found]
            assert without[0] == without[1]
    for engine in (writer, reader, plain):
        engine.dispose()


def test_the_newest_step_is_named(tmp_path: Path) -> None:
    """So that a start that has nothing to do need not look for it."""
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations").replace("%", "%%"))
    assert ScriptDirectory.from_config(config).get_current_head() == NEWEST


async def test_the_steps_can_be_taken_back_and_again(tmp_path: Path) -> None:
    """Down to nothing, and up; a file that is of this version is left as it is."""
    path = tmp_path / JOURNAL_FILE
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal)
    writer, reader = open_engines(path)
    migrate(writer, path, to="base")
    assert inspect(reader).get_table_names() == ["alembic_version"]
    migrate(writer, path)
    assert set(inspect(reader).get_table_names()) == {*tables.metadata.tables, "alembic_version"}
    writer.dispose()
    reader.dispose()
    async with sqlite_journal(tmp_path) as journal:
        assert await journal.page(limit=9) == []
        _ = await begun(journal)
    async with sqlite_journal(tmp_path) as journal:
        assert len(events_of(journal)) == 1


async def test_a_file_of_the_version_before_knows_whose_answers_they_are(tmp_path: Path) -> None:
    """From what the items themselves say, also where their texts are written in another way."""
    given: list[Item | BadItem] = [
        an_item(0, item_id="a#1", variant_of="a"),
        an_item(1, item_id="é#1", variant_of="é", text="\ud800"),
        an_item(2, item_id="c#1"),
        an_item(3),
    ]
    async with sqlite_journal(tmp_path) as journal:
        _ = await journal.submit(new_batch(), given, is_whole=True)
    writer, reader = open_engines(tmp_path / JOURNAL_FILE)
    migrate(writer, tmp_path / JOURNAL_FILE, to="0002")
    writer.dispose()
    reader.dispose()
    async with sqlite_journal(tmp_path) as journal:
        assert [one.variant_of for one in await journal.names("b")] == ["a", "é", "", ""]


async def test_a_file_of_a_newer_version(tmp_path: Path) -> None:
    """It is left alone, and the message says what to do."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal)
    connection = sqlite3.connect(tmp_path / JOURNAL_FILE)
    with connection:
        _ = connection.execute("update alembic_version set version_num = '0999'")
    connection.close()
    for _ in range(2):
        with pytest.raises(JournalFileError, match=r"newer version of Unisono.*0999.*UNISONO_DATA_DIR"):
            async with sqlite_journal(tmp_path):
                pass
    take_folder(tmp_path).close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_steps_that_are_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """All of them or none: the file is as it was, and the next start takes them."""
    path = tmp_path / JOURNAL_FILE
    writer, reader = open_engines(path)
    migrate(writer, path, to="0001")
    for engine in (writer, reader):
        engine.dispose()

    def names() -> list[tuple[object, ...]]:
        connection = sqlite3.connect(path)
        try:
            return connection.execute("select name from sqlite_master order by name").fetchall()
        finally:
            connection.close()

    before = names()

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        # Its last table is there by then.
        patched.setattr(op, "create_index", fail)
        with pytest.raises(error):
            _ = open_engines(path)
    assert names() == before
    writer, reader = open_engines(path)
    assert set(inspect(reader).get_table_names()) == {*tables.metadata.tables, "alembic_version"}
    for engine in (writer, reader):
        engine.dispose()


# -- Files that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"hello " * 1000, b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "header"])
async def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    """It is left as it is."""
    path = tmp_path / JOURNAL_FILE
    _ = path.write_bytes(content)
    with pytest.raises(JournalFileError, match=r"journal\.sqlite3 is damaged: put a backup in its place, or move"):
        async with sqlite_journal(tmp_path):
            pass
    assert path.read_bytes() == content


async def test_a_file_that_is_damaged_within(tmp_path: Path) -> None:
    """Reading says so, and so does writing; nothing hangs."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal, count=2000)
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    # All but the schema.
    _ = path.write_bytes(whole[: 16 * 4096] + b"\x55" * (len(whole) - 16 * 4096))
    async with sqlite_journal(tmp_path) as journal:
        with pytest.raises(JournalFileError, match="file is damaged"):
            _ = await journal.items("b", after=-1, limit=5000)
        with pytest.raises(JournalFileError, match="file is damaged"):
            await journal.delete("b")


async def test_an_event_that_cannot_be_read(tmp_path: Path) -> None:
    """An error of the house, from the event loop as from a thread."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal)
    connection = sqlite3.connect(tmp_path / JOURNAL_FILE)
    with connection:
        _ = connection.execute("update events set kind = 'result', packed = x'00'")
    connection.close()
    async with sqlite_journal(tmp_path) as journal:
        with pytest.raises(JournalFileError, match="holds what this version cannot read"):
            _ = journal.read("b", 0, 1)
        with pytest.raises(JournalFileError, match="holds what this version cannot read"):
            _ = await journal.results("b", after=0, limit=1)


# -- Folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """A process that has the folder, by its number; killed in the end."""
    program = (
        "import sys, pathlib; from unisono.adapters.journal.file import take_folder; "
        "lock = take_folder(pathlib.Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"taken\n"
        yield child.pid
    finally:
        child.kill()
        _ = child.communicate()


async def test_two_services_in_one_folder(tmp_path: Path, holder: int) -> None:
    """The second is told which process is the first; when that ends, however it ends, the folder is free."""
    with pytest.raises(JournalInUseError, match=rf"\(process {holder}\).*UNISONO_DATA_DIR"):
        async with sqlite_journal(tmp_path):
            pass
    os.kill(holder, signal.SIGKILL)
    for _ in range(200):
        with contextlib.suppress(JournalInUseError):
            take_folder(tmp_path).close()
            break
        await asyncio.sleep(0.01)
    async with sqlite_journal(tmp_path) as journal:
        other = SqliteJournal(tmp_path, keep_s=1.0)
        with pytest.raises(JournalInUseError, match=rf"process {os.getpid()}"):
            await other.start(MADE_NS)
        _ = await begun(journal)


async def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    """The message says what to do."""
    _ = (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(JournalFileError, match=r"cannot be kept in .*file.*UNISONO_DATA_DIR.*none"):
            async with sqlite_journal(folder):
                pass


async def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    """As above."""
    (tmp_path / JOURNAL_FILE).mkdir()
    with pytest.raises(JournalFileError, match=r"Is a directory.*UNISONO_DATA_DIR"):
        async with sqlite_journal(tmp_path):
            pass


@needs_permissions
async def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """As above."""
    (folder := tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(JournalFileError, match=r"Permission denied.*UNISONO_DATA_DIR"):
        async with sqlite_journal(folder / "deep"):
            pass


async def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    """Also in a folder that was there before."""
    (folder := tmp_path / "open").mkdir(mode=0o755)
    async with sqlite_journal(folder) as journal:
        _ = await begun(journal)
        for path in folder.glob("journal.sqlite3*"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert len([*folder.iterdir()]) >= 3
    async with sqlite_journal(tmp_path / "new"):
        assert (tmp_path / "new").stat().st_mode & 0o077 == 0


async def test_a_folder_of_any_name(tmp_path: Path) -> None:
    """Signs that mean something in an address."""
    folder = tmp_path / "50% off?mode=ro#x & é"
    async with sqlite_journal(folder) as journal:
        _ = await begun(journal)
    assert (folder / JOURNAL_FILE).stat().st_size > 0
    async with sqlite_journal(folder) as journal:
        assert len(events_of(journal)) == 1


async def test_a_start_that_fails_lets_go_of_the_folder(tmp_path: Path) -> None:
    """At each step: the next start finds it free."""
    broken = SqliteJournal(tmp_path, keep_s=1.0, failpoint=_always)
    with pytest.raises(LimitExceededError):
        await broken.start(MADE_NS)
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal)


def _always(place: str) -> None:
    raise failure(place)


async def test_another_program_that_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, for a while; then the message says what to do, and events come when it ends."""
    monkeypatch.setattr("unisono.adapters.journal.file._BUSY_S", 0.1)
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal)
        other = sqlite3.connect(tmp_path / JOURNAL_FILE, isolation_level=None)
        _ = other.execute("begin immediate")
        began = time.monotonic()
        with pytest.raises(LimitExceededError, match="held by another program"):
            await journal.set("b", is_cancelling=True)
        assert time.monotonic() - began < 5.0
        assert (await journal.get("b")).is_cancelling is False
        _ = other.execute("rollback")
        other.close()
        await journal.set("b", is_cancelling=True)


def test_what_is_no_fault_of_the_file_stays_as_it_is() -> None:
    """A defect of this service is none of the disk's."""
    error = ValueError("x")
    assert translated(error) is error
    assert code_of(error) is None
    assert words(error) == "cannot be used: x"
