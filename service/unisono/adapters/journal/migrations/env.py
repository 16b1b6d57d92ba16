"""How alembic runs the steps: on the connection that it is given."""

from __future__ import annotations

from alembic import context

from unisono.adapters.journal import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    # SQLite changes a table by copying it.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
