"""Of which item one of several answers is, beside what it asks."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_items = sa.table("items", sa.column("row"), sa.column("item_id"), sa.column("variant_of"), sa.column("packed"))


def upgrade() -> None:
    """Makes the column, and fills it."""
    op.add_column("items", sa.Column("variant_of", sa.String()))
    connection = op.get_bind()
    # An answer is called after its item, with a # and its number.
    wanted = sa.select(_items.c.row, _items.c.packed).where(_items.c.item_id.contains("#"))
    for number, packed in connection.execute(wanted).all():
        if (name := _variant_of(packed)) != "":
            _ = connection.execute(sa.update(_items).where(_items.c.row == number).values(variant_of=name))


def _variant_of(packed: bytes) -> str:
    # Behind this byte, the bytes of texts stand as if they were Latin-1.
    is_escaped = packed.startswith(b"\xc1")
    item: dict[str, Any] = msgspec.msgpack.decode(packed[is_escaped:])
    name: str = item.get("variant_of", "")
    return name.encode("latin-1").decode() if is_escaped else name


def downgrade() -> None:
    """Takes it away."""
    op.drop_column("items", "variant_of")
