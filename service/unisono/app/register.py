"""Which items a batch has taken: their names, their places, and what was asked, so that it is known again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.batch import BadItem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.model import Item


class Register:
    """The items of one batch, by name and by place."""

    def __init__(self) -> None:
        self._index_of: dict[str, int] = {}
        # The answers of an item that has several, by the item's own id.
        self._variants_of: dict[str, list[int]] = {}
        # By place: stands for what was asked; None where that is not known any more.
        self._fingerprints: list[int | None] = []

    def __len__(self) -> int:
        return len(self._fingerprints)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._index_of

    def add(self, item: Item | BadItem) -> int:
        """Takes an item; answers with its place. Of two with one name, the first keeps it."""
        index = len(self._fingerprints)
        self._fingerprints.append(_fingerprint(item))
        self._name(item.item_id, item.variant_of, index)
        return index

    def restore(self, index: int, item_id: str, variant_of: str = "") -> None:
        """An item that was taken at another time, by another process."""
        missing = index + 1 - len(self._fingerprints)
        self._fingerprints += [None] * missing
        self._name(item_id, variant_of, index)

    def is_same(self, item: Item | BadItem) -> bool:
        """Whether the item of that name was asked for with the same content, as far as that is known."""
        known = self._fingerprints[self._index_of[item.item_id]]
        return known is None or known == _fingerprint(item)

    def index(self, item_id: str) -> int:
        """The place of the item of that name; raises KeyError."""
        return self._index_of[item_id]

    def indexes(self, item_id: str) -> Sequence[int]:
        """The item of that name, or the answers of the item that was sent under it; empty: there is none."""
        index = self._index_of.get(item_id)
        return self._variants_of.get(item_id, ()) if index is None else (index,)

    def all(self) -> list[int]:
        """All places of items that have names of their own."""
        return list(self._index_of.values())

    def clear(self) -> None:
        """Nobody will ask any more."""
        self._index_of.clear()
        self._variants_of.clear()
        self._fingerprints.clear()

    def _name(self, item_id: str, variant_of: str, index: int) -> None:
        if self._index_of.setdefault(item_id, index) == index and variant_of:
            self._variants_of.setdefault(variant_of, []).append(index)


def _fingerprint(item: Item | BadItem) -> int:
    """Stands for an item's content. With its options in words, since Python hashes -1 and -2 alike."""
    return hash((item, repr(item.options) if not isinstance(item, BadItem) else ""))
