"""Batches, their items, their events, and the leases of those who run them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "leases",
        sa.Column("lease", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("taken_ns", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "batches",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("batch_id", sa.String(), nullable=False, unique=True),
        sa.Column("request_id", sa.String(), unique=True),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("parent_id", sa.String()),
        sa.Column("config", sa.LargeBinary(), nullable=False),
        sa.Column("metadata", sa.LargeBinary(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("carrier", sa.LargeBinary(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("deadline_ns", sa.BigInteger()),
        sa.Column("started_ns", sa.BigInteger()),
        sa.Column("ended_ns", sa.BigInteger()),
        sa.Column("keep_until_ns", sa.BigInteger()),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("is_cancelling", sa.Boolean(), nullable=False),
        sa.Column("is_input_closed", sa.Boolean(), nullable=False),
        sa.Column("item_count", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("cancelled", sa.Integer(), nullable=False),
        sa.Column("expired", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("lease", sa.Integer(), sa.ForeignKey("leases.lease"), nullable=False),
        sa.Column("last_sequence", sa.Integer(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("batches_by_state", "batches", ["state", "number"])
    op.create_index("batches_to_delete", "batches", ["keep_until_ns"])
    op.create_table(
        "items",
        sa.Column("row", sa.Integer(), primary_key=True),
        sa.Column("batch", sa.Integer(), sa.ForeignKey("batches.number", ondelete="CASCADE"), nullable=False),
        sa.Column("item_index", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("packed", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("batch", "item_index"),
    )
    op.create_table(
        "events",
        sa.Column("row", sa.Integer(), primary_key=True),
        sa.Column("batch", sa.Integer(), sa.ForeignKey("batches.number", ondelete="CASCADE"), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("item_index", sa.Integer()),
        sa.Column("item_state", sa.String()),
        sa.Column("packed", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("batch", "sequence"),
    )
    op.create_index(
        "one_result", "events", ["batch", "item_index"], unique=True, sqlite_where=sa.text("kind = 'result'")
    )


def downgrade() -> None:
    """Takes them away."""
    for table in ("events", "items", "batches", "leases"):
        op.drop_table(table)
