"""Files, and the batches that are made of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "files",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("file_id", sa.String(), nullable=False, unique=True),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger()),
        sqlite_autoincrement=True,
    )
    op.create_index("files_to_delete", "files", ["expires_ns"])
    op.create_table(
        "file_batches",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("batch_id", sa.String(), nullable=False, unique=True),
        sa.Column("input_file_id", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("window", sa.String(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.LargeBinary(), nullable=False),
        sa.Column("output_keep_s", sa.Integer()),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("cancelling_ns", sa.BigInteger()),
        sa.Column("in_progress_ns", sa.BigInteger()),
        sa.Column("finalizing_ns", sa.BigInteger()),
        sa.Column("ended_ns", sa.BigInteger()),
        sa.Column("keep_until_ns", sa.BigInteger()),
        sa.Column("errors", sa.LargeBinary(), nullable=False),
        sa.Column("output_file_id", sa.String()),
        sa.Column("error_file_id", sa.String()),
        sa.Column("tally", sa.LargeBinary()),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("file_batches_by_state", "file_batches", ["state", "number"])
    op.create_index("file_batches_to_delete", "file_batches", ["keep_until_ns"])


def downgrade() -> None:
    """Takes them away; the files themselves stay where they are."""
    for table in ("file_batches", "files"):
        op.drop_table(table)
