"""How SQLite finds what is asked of it: by an index, whatever it is, and never by looking through a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from tests.fakes.journals import MADE_NS, new_batch, some_items
from unisono.adapters.journal import store
from unisono.adapters.journal.file import JOURNAL_FILE, open_engines
from unisono.core.events import BatchState
from unisono.core.model import ItemState

BOTH = (ItemState.FAILED, ItemState.EXPIRED)
ASKED: dict[str, Callable[[Connection], object]] = {
    "place_of": lambda to: store.place_of(to, "b"),
    "own": lambda to: store.own(to, "b", 1),
    "find_batch": lambda to: store.find_batch(to, "b"),
    "of_request": lambda to: store.of_request(to, new_batch("c", request_id="r")),
    "list_batches": lambda to: store.list_batches(to, after=5, limit=10, states=()),
    "list_batches by state": lambda to: store.list_batches(to, after=0, limit=10, states=(BatchState.EXPIRED,)),
    "take_over": lambda to: store.take_over(to, 1),
    "delete_old": lambda to: store.delete_old(to, 7),
    "delete_batches": lambda to: store.delete_batches(to, ["x"]),
    "set_batch": lambda to: store.set_batch(to, "b", {"is_cancelling": True}, 1),
    "events": lambda to: store.events(to, 1, after=3, up_to=9, limit=5),
    "results": lambda to: store.results(to, 1, after=3, limit=5, states=()),
    "results by state": lambda to: store.results(to, 1, after=3, limit=5, states=BOTH),
    "open_items": store.open_items,
    "has_item": lambda to: store.has_item(to, 1, 2),
    "items": lambda to: store.items(to, 1, after=3, limit=5, states=()),
    "items by state": lambda to: store.items(to, 1, after=3, limit=5, states=BOTH),
    "names": lambda to: store.names(to, 1),
}


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """A file with a batch, within a transaction."""
    writer, reader = open_engines(tmp_path / JOURNAL_FILE)
    with writer.connect() as open_one:
        lease = "insert into leases (taken_ns, holder) values (0, 'me')"
        _ = open_one.exec_driver_sql(lease)
        store.put_batch(open_one, new_batch(request_id="r", created_ns=MADE_NS), some_items(3), 1, is_whole=True)
        yield open_one
    writer.dispose()
    reader.dispose()


@pytest.mark.parametrize("name", ASKED)
def test_an_index_is_used(name: str, connection: Connection) -> None:
    """And what is asked for page by page needs no sorting, so that a page costs as much as its rows."""
    plans: dict[str, list[str]] = {}

    def explain(_: Connection, cursor: Any, statement: str, parameters: Any, *_more: object) -> None:
        if not statement.startswith("EXPLAIN"):
            found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans[statement] = [row[3] for row in found]

    event.listen(connection, "before_cursor_execute", explain)
    _ = ASKED[name](connection)
    event.remove(connection, "before_cursor_execute", explain)
    steps = [step for plan in plans.values() for step in plan]
    assert steps
    for step in steps:
        # The newest batches first: from the end of their table backwards, as far as the page.
        assert "SCAN" not in step or name == "list_batches", plans
        assert "TEMP B-TREE" not in step, plans
