"""A memory of slots that ends with the test."""

from __future__ import annotations

from unisono.core.capacity import SlotMemo


class SlotsInMemory:
    """The stand-in for a SlotMemory."""

    def __init__(self) -> None:
        self.memos: dict[str, SlotMemo] = {}
        self.puts: list[tuple[str, SlotMemo]] = []

    def get(self, key: str) -> SlotMemo | None:
        """See the port."""
        return self.memos.get(key)

    def put(self, key: str, memo: SlotMemo) -> None:
        """See the port."""
        self.puts.append((key, memo))
        self.memos[key] = memo

    def forget(self, backend: str) -> None:
        """See the port."""
        self.memos = {key: memo for key, memo in self.memos.items() if not key.startswith(f"{backend} ")}
