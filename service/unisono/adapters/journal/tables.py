"""The tables of the journal's file, as the newest migration leaves them.

A batch's row says how it stands; it changes in the same transaction as the events that change it, so that it never
has to be counted. An item's row is what was asked. An event's row is what happened; a result is an event, and an item
has at most one.

`lease` fences: it names the process that runs the batch. Whoever writes an event does so only where the batch still
bears its own lease, so that a process that was believed dead cannot speak for one that took over.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)

metadata = MetaData()

leases = Table(
    "leases",
    metadata,
    # Given in rising order, and never twice.
    Column("lease", Integer, primary_key=True, autoincrement=True),
    Column("taken_ns", BigInteger, nullable=False),
    # Process and machine, for people.
    Column("holder", String, nullable=False),
    sqlite_autoincrement=True,
)

batches = Table(
    "batches",
    metadata,
    # In the order in which they were submitted.
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("batch_id", String, nullable=False, unique=True),
    # The caller's name for the request, and what stands for its content.
    Column("request_id", String, unique=True),
    Column("fingerprint", LargeBinary, nullable=False),
    # The batch whose failed items this one tries again.
    Column("parent_id", String),
    Column("config", LargeBinary, nullable=False),
    Column("metadata", LargeBinary, nullable=False),
    # The rpc that brought it, and the trace context that came with it.
    Column("method", String, nullable=False),
    Column("carrier", LargeBinary, nullable=False),
    # Nanoseconds since 1970. It expires at `deadline_ns`; after its end it is kept until `keep_until_ns`.
    Column("created_ns", BigInteger, nullable=False),
    Column("deadline_ns", BigInteger),
    Column("started_ns", BigInteger),
    Column("ended_ns", BigInteger),
    Column("keep_until_ns", BigInteger),
    # As BatchState's values.
    Column("state", String, nullable=False),
    # Somebody wants it to end; its items that have not run never will.
    Column("is_cancelling", Boolean, nullable=False),
    Column("is_input_closed", Boolean, nullable=False),
    Column("item_count", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("cancelled", Integer, nullable=False),
    Column("expired", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    # Times that a process took it over after another.
    Column("restarts", Integer, nullable=False),
    Column("lease", Integer, ForeignKey("leases.lease"), nullable=False),
    Column("last_sequence", Integer, nullable=False),
    Index("batches_by_state", "state", "number"),
    Index("batches_to_delete", "keep_until_ns"),
    sqlite_autoincrement=True,
)

items = Table(
    "items",
    metadata,
    Column("row", Integer, primary_key=True),
    Column("batch", Integer, ForeignKey("batches.number", ondelete="CASCADE"), nullable=False),
    Column("item_index", Integer, nullable=False),
    Column("item_id", String, nullable=False),
    Column("packed", LargeBinary, nullable=False),
    # For one of several answers of an item: the item's own id.
    Column("variant_of", String),
    # Ids are not: of items that cannot be run, several may have none, or the same one.
    UniqueConstraint("batch", "item_index"),
)

events = Table(
    "events",
    metadata,
    Column("row", Integer, primary_key=True),
    Column("batch", Integer, ForeignKey("batches.number", ondelete="CASCADE"), nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    # Of a result and its parts: whose they are; and of a result, how the item ended.
    Column("item_index", Integer),
    Column("item_state", String),
    Column("packed", LargeBinary, nullable=False),
    UniqueConstraint("batch", "sequence"),
    # An item ends once.
    Index("one_result", "batch", "item_index", unique=True, sqlite_where=text("kind = 'result'")),
)

files = Table(
    "files",
    metadata,
    # In the order in which they were kept.
    Column("number", Integer, primary_key=True, autoincrement=True),
    # The file's name on the disk too.
    Column("file_id", String, nullable=False, unique=True),
    Column("purpose", String, nullable=False),
    # The caller's name for it; nothing is ever opened by it.
    Column("filename", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("expires_ns", BigInteger),
    Index("files_to_delete", "expires_ns"),
    sqlite_autoincrement=True,
)

# See FileBatch. Neither its files nor its kept batch are foreign keys: each may be deleted before the others.
file_batches = Table(
    "file_batches",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("batch_id", String, nullable=False, unique=True),
    Column("input_file_id", String, nullable=False),
    Column("endpoint", String, nullable=False),
    Column("window", String, nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("metadata", LargeBinary, nullable=False),
    Column("output_keep_s", Integer),
    # As FileBatchState's values.
    Column("state", String, nullable=False),
    Column("cancelling_ns", BigInteger),
    Column("in_progress_ns", BigInteger),
    Column("finalizing_ns", BigInteger),
    Column("ended_ns", BigInteger),
    Column("keep_until_ns", BigInteger),
    Column("errors", LargeBinary, nullable=False),
    Column("output_file_id", String),
    Column("error_file_id", String),
    Column("tally", LargeBinary),
    Column("cached_tokens", BigInteger, nullable=False),
    Index("file_batches_by_state", "state", "number"),
    Index("file_batches_to_delete", "keep_until_ns"),
    sqlite_autoincrement=True,
)
