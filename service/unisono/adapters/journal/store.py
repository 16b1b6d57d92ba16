"""What is written to and asked of the journal's tables, one function for each, within a transaction of its caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import MsgspecError
from sqlalchemy import delete, func, insert, literal_column, select, update

from unisono.adapters.journal import codec, tables
from unisono.adapters.journal.errors import LeaseLostError
from unisono.adapters.journal.rows import batch_row, event_row, stored
from unisono.core.durable import KeptItem, Spent
from unisono.core.errors import BatchNotFoundError, RequestIdReusedError
from unisono.core.events import Accepted, BatchState, Journalled, Result, weight
from unisono.core.model import ItemState
from unisono.core.paging import MAX_MESSAGE_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Row

    from unisono.core.batch import BadItem
    from unisono.core.durable import NewBatch, StoredBatch
    from unisono.core.model import Item

_batches, _items, _events = tables.batches.c, tables.items.c, tables.events.c
# Written out, not bound: only so does SQLite know that the index of results will do.
_is_result = _events.kind == literal_column(f"'{codec.RESULT}'")
# Items that are written with one statement.
_AT_A_TIME = 500
# Batches, and items of them, that are deleted in one transaction: a tenth of a second, unless one is larger.
_DELETED, _DELETED_ITEMS = 100, 10_000
# Items that are read at one time have about so many bytes.
_MOST_ITEM_BYTES = 8 * 1024 * 1024
# The state of a batch whose items are still to come, and that nobody can find.
_DRAFT = "draft"
# What is read at one time weighs no more than this, its last event aside: twice what a message holds, so that whoever
# fills a message never takes the end of what was read for the end of what there is.
_MOST_WEIGHT = 2 * MAX_MESSAGE_WEIGHT


# -- A batch -----------------------------------------------------------------------------------------------------


def put_batch(
    connection: Connection, new: NewBatch, items: Sequence[Item | BadItem], lease: int, *, is_whole: bool
) -> None:
    """Writes a batch with its first event and its items, which are numbered as they stand."""
    row = batch_row(new, lease) | {"is_input_closed": is_whole, "last_sequence": 1}
    number: int = connection.execute(insert(tables.batches).values(row).returning(_batches.number)).scalar_one()
    accepted = Accepted(batch_id=new.batch_id, item_count=len(items))
    _ = connection.execute(insert(tables.events), event_row(number, 1, accepted, new.created_ns))
    put_items(connection, number, items, first=0)


def put_draft(connection: Connection, new: NewBatch, lease: int) -> None:
    """Writes a batch that nobody finds, whose items are still to come. Its request's name is still free."""
    row = batch_row(new, lease) | {"state": _DRAFT, "request_id": None}
    _ = connection.execute(insert(tables.batches).values(row))


def finish_draft(connection: Connection, new: NewBatch, lease: int) -> None:
    """A draft has all its items, and becomes a batch like any other."""
    number = own(connection, new.batch_id, lease)
    row = batch_row(new, lease)
    changes = {name: row[name] for name in ("state", "request_id")} | {"is_input_closed": True, "last_sequence": 1}
    _ = connection.execute(update(tables.batches).where(_batches.number == number).values(changes))
    accepted = Accepted(batch_id=new.batch_id, item_count=item_count(connection, number))
    _ = connection.execute(insert(tables.events), event_row(number, 1, accepted, new.created_ns))


def item_count(connection: Connection, number: int) -> int:
    """How many items a batch has, a draft too."""
    count: int = connection.execute(select(_batches.item_count).where(_batches.number == number)).scalar_one()
    return count


def open_items(connection: Connection) -> int:
    """Items without a result, of all batches, drafts too."""
    ended = _batches.completed + _batches.failed + _batches.cancelled + _batches.expired
    wanted = select(func.sum(_batches.item_count - ended)).where(
        _batches.state.in_([BatchState.RUNNING.value, _DRAFT])
    )
    count: int | None = connection.execute(wanted).scalar_one()
    return count or 0


def put_items(connection: Connection, number: int, items: Sequence[Item | BadItem], *, first: int) -> None:
    """Writes items of a batch, numbered from `first` on."""
    for start in range(0, len(items), _AT_A_TIME):
        rows = [
            {
                "batch": number,
                "item_index": first + start + place,
                "item_id": item.item_id,
                "variant_of": item.variant_of or None,
                "packed": codec.pack_item(item),
            }
            for place, item in enumerate(items[start : start + _AT_A_TIME])
        ]
        _ = connection.execute(insert(tables.items), rows)
    _ = connection.execute(
        update(tables.batches).where(_batches.number == number).values(item_count=_batches.item_count + len(items))
    )


def has_item(connection: Connection, number: int, index: int) -> bool:
    """Whether a batch has an item in that place."""
    wanted = select(_items.row).where(_items.batch == number, _items.item_index == index)
    return connection.execute(wanted).first() is not None


def of_request(connection: Connection, new: NewBatch) -> StoredBatch | None:
    """The batch that the same request made before; raises RequestIdReusedError where its content was another."""
    if not new.config.request_id:
        return None
    row = connection.execute(select(tables.batches).where(_batches.request_id == new.config.request_id)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != new.fingerprint:
        raise RequestIdReusedError(
            f"request_id {new.config.request_id!r} was used for batch {row.batch_id}, with other content",
            metadata={"batch_id": row.batch_id},
        )
    return stored(row)


def find_batch(connection: Connection, batch_id: str) -> StoredBatch | None:
    """A batch; None: there is none of that id."""
    wanted = select(tables.batches).where(_batches.batch_id == batch_id, _batches.state != _DRAFT)
    row = connection.execute(wanted).one_or_none()
    return None if row is None else stored(row)


def get_batch(connection: Connection, batch_id: str) -> StoredBatch:
    """A batch; raises BatchNotFoundError."""
    found = find_batch(connection, batch_id)
    if found is None:
        raise not_found(batch_id)
    return found


def set_batch(connection: Connection, batch_id: str, values: dict[str, Any], lease: int) -> None:
    """Changes columns of a batch that bears this lease; raises BatchNotFoundError, LeaseLostError."""
    number = own(connection, batch_id, lease)
    _ = connection.execute(update(tables.batches).where(_batches.number == number).values(values))


def own(connection: Connection, batch_id: str, lease: int) -> int:
    """The number of a batch that bears this lease; raises BatchNotFoundError, LeaseLostError."""
    row = connection.execute(
        select(_batches.number, _batches.lease).where(_batches.batch_id == batch_id)
    ).one_or_none()
    if row is None:
        raise not_found(batch_id)
    if row.lease != lease:
        raise LeaseLostError(
            f"another process has taken batch {batch_id} over: send this to it", metadata={"batch_id": batch_id}
        )
    number: int = row.number
    return number


def list_batches(
    connection: Connection, *, after: int, limit: int, states: Sequence[BatchState]
) -> list[tuple[int, StoredBatch]]:
    """The newest batches with numbers below `after` (0: all), the newest first, each with its number."""
    wanted = select(tables.batches).where(_batches.state != _DRAFT).order_by(_batches.number.desc()).limit(limit)
    if after:
        wanted = wanted.where(_batches.number < after)
    if states:
        wanted = wanted.where(_batches.state.in_([state.value for state in states]))
    return [(row.number, stored(row)) for row in connection.execute(wanted)]


def take_over(connection: Connection, lease: int) -> tuple[list[StoredBatch], dict[str, Exception]]:
    """Gives all batches that have not ended this lease; answers with them, the oldest first.

    Those that cannot be read are named, with what is wrong with each. What another process had begun to write, and
    told nobody of, goes.
    """
    _ = connection.execute(delete(tables.batches).where(_batches.state == _DRAFT, _batches.lease != lease))
    running = _batches.state == BatchState.RUNNING.value
    _ = connection.execute(
        update(tables.batches)
        .where(running, _batches.lease != lease)
        .values(lease=lease, restarts=_batches.restarts + 1)
    )
    found: list[StoredBatch] = []
    unreadable: dict[str, Exception] = {}
    for row in connection.execute(select(tables.batches).where(running).order_by(_batches.number)):
        try:
            found.append(stored(row))
        except (MsgspecError, ValueError, TypeError) as error:
            unreadable[row.batch_id] = error
    return found, unreadable


def delete_batches(connection: Connection, batch_ids: Sequence[str]) -> int:
    """Deletes batches with all that belongs to them; answers with how many there were."""
    return connection.execute(delete(tables.batches).where(_batches.batch_id.in_(batch_ids))).rowcount


def delete_batch(connection: Connection, batch_id: str) -> bool:
    """Deletes a batch, and what OpenAI's API knows of it, unless there is none."""
    if not delete_batches(connection, [batch_id]):
        return False
    of_files = tables.file_batches
    _ = connection.execute(delete(of_files).where(of_files.c.batch_id == batch_id))
    return True


def delete_old(connection: Connection, now_ns: int) -> int:
    """Deletes what was kept for long enough: the oldest, as far as one transaction goes. Answers with how many."""
    due = (
        select(_batches.batch_id, _batches.item_count)
        .where(_batches.keep_until_ns <= now_ns)
        .order_by(_batches.keep_until_ns)
        .limit(_DELETED)
    )
    chosen: list[str] = []
    room = _DELETED_ITEMS
    for row in connection.execute(due).all():
        room -= row.item_count
        if chosen and room < 0:
            break
        chosen.append(row.batch_id)
    return delete_batches(connection, chosen) if chosen else 0


# -- Its events --------------------------------------------------------------------------------------------------


def place_of(connection: Connection, batch_id: str) -> tuple[int, int]:
    """A batch's number, and that of its last event; raises BatchNotFoundError."""
    row = connection.execute(
        select(_batches.number, _batches.last_sequence).where(_batches.batch_id == batch_id, _batches.state != _DRAFT)
    ).one_or_none()
    if row is None:
        raise not_found(batch_id)
    return row.number, row.last_sequence


def events(connection: Connection, number: int, *, after: int, up_to: int, limit: int) -> list[Journalled]:
    """Up to `limit` events with numbers above `after`, and no higher than `up_to`; fewer where they are large."""
    wanted = (
        select(_events.sequence, _events.at_ns, _events.kind, _events.packed)
        .where(_events.batch == number, _events.sequence > after, _events.sequence <= up_to)
        .order_by(_events.sequence)
        .limit(limit)
    )
    found: list[Journalled] = []
    room = _MOST_WEIGHT
    with connection.execute(wanted) as rows:
        for row in rows:
            found.append(_journalled(row))
            room -= weight(found[-1].event)
            if room < 0:
                break
    return found


def results(
    connection: Connection, number: int, *, after: int, limit: int, states: Sequence[ItemState]
) -> list[Journalled]:
    """Up to `limit` results with numbers above `after`, in their order, each behind its parts; fewer large ones."""
    wanted = (
        select(_events.sequence, _events.at_ns, _events.kind, _events.packed)
        .where(_events.batch == number, _is_result, _events.sequence > after)
        .order_by(_events.sequence)
        .limit(limit)
    )
    if states:
        wanted = wanted.where(_events.item_state.in_([state.value for state in states]))
    found: list[Journalled] = []
    room = _MOST_WEIGHT
    with connection.execute(wanted) as rows:
        for row in rows:
            result = _journalled(row)
            its_own = [result]
            if isinstance(result.event, Result) and (parts := result.event.parts):
                before = max(after, result.sequence - parts - 1)
                its_parts = events(connection, number, after=before, up_to=result.sequence - 1, limit=parts)
                # A result that is larger than all that is read at one time: what follows is for the next time.
                is_whole = len(its_parts) == result.sequence - 1 - before
                its_own = [*its_parts, result] if is_whole else its_parts
            found += its_own
            room -= sum(weight(entry.event) for entry in its_own)
            if room < 0:
                break
    return found


# -- Its items ---------------------------------------------------------------------------------------------------


def items(
    connection: Connection, number: int, *, after: int, limit: int, states: Sequence[ItemState]
) -> list[tuple[int, Item | BadItem]]:
    """Up to `limit` items with indexes above `after`: those that ended so; without states those without a result.

    Fewer where they are large.
    """
    its_result = select(_events.row).where(
        _events.batch == number, _is_result, _events.item_index == _items.item_index
    )
    ended_so = its_result.where(_events.item_state.in_([state.value for state in states])).exists()
    is_wanted = ended_so if states else ~its_result.exists()
    wanted = (
        select(_items.item_index, _items.packed)
        .where(_items.batch == number, _items.item_index > after, is_wanted)
        .order_by(_items.item_index)
        .limit(limit)
    )
    found: list[tuple[int, Item | BadItem]] = []
    room = _MOST_ITEM_BYTES
    with connection.execute(wanted) as rows:
        for row in rows:
            found.append((row.item_index, codec.unpack_item(row.item_index, row.packed)))
            room -= len(row.packed)
            if room < 0:
                break
    return found


def names(connection: Connection, number: int) -> list[KeptItem]:
    """All items, in the order of their indexes, without what they ask."""
    has_ended = (_events.batch == number) & _is_result & (_events.item_index == _items.item_index)
    # Of what is large, SQLite reads no more than its length.
    size = func.length(_items.packed).label("size")
    wanted = (
        select(_items.item_index, _items.item_id, _items.variant_of, _events.item_state, size)
        .join_from(tables.items, tables.events, has_ended, isouter=True)
        .where(_items.batch == number)
        .order_by(_items.item_index)
    )
    with connection.execute(wanted) as rows:
        return [
            KeptItem(
                index=row.item_index,
                item_id=row.item_id,
                variant_of=row.variant_of or "",
                state=None if row.item_state is None else ItemState(row.item_state),
                size_bytes=row.size,
            )
            for row in rows
        ]


def spent(connection: Connection, number: int, now_ns: int) -> Spent:
    """What all items together took that have a result: each is read, and none is kept in memory."""
    prompt = completion = retries = 0
    cached: int | None = None
    wanted = select(_events.kind, _events.packed).where(_events.batch == number, _is_result)
    with connection.execute(wanted) as rows:
        for row in rows:
            result = codec.unpack_event(row.kind, row.packed)
            if not isinstance(result, Result):
                continue
            retries += max(0, result.attempts - 1)
            if (usage := result.usage) is not None:
                prompt += usage.prompt_tokens
                completion += usage.completion_tokens
                if usage.cached_prompt_tokens is not None:
                    cached = (cached or 0) + usage.cached_prompt_tokens
    return Spent(
        until_ns=now_ns,
        prompt_tokens=prompt,
        cached_prompt_tokens=cached,
        completion_tokens=completion,
        retries=retries,
    )


def not_found(batch_id: str) -> BatchNotFoundError:
    """There is no such batch."""
    return BatchNotFoundError(f"there is no batch {batch_id!r}, or it was deleted", metadata={"batch_id": batch_id})


def _journalled(row: Row[int, int, str, bytes]) -> Journalled:
    return Journalled(sequence=row.sequence, at_ns=row.at_ns, event=codec.unpack_event(row.kind, row.packed))
