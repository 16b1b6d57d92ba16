"""Items of a kept batch that are in the store and not in memory: which they are, and when some are fetched.

Theory of operation. A kept batch may have hundreds of megabytes of items, and only those that may go soon need be at
hand. So there is room for so many items, and so many bytes of them. What does not fit *waits*: its name and its place
are known, so that it can be counted, cancelled, and can expire like any other. When a quarter of the room is free,
that much is fetched, in the order of places, and released together: prefixes, contexts and lengths are compared among
what was fetched at one time and what is there. A batch that fits is fetched as a whole.

A single item has room however large it is, where nothing else is there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from unisono.core.durable import KeptItem
from unisono.core.limits import request_bytes

if TYPE_CHECKING:
    from unisono.core.batch import BadItem
    from unisono.core.model import Item

# Bytes of items of one batch that are in memory at one time, as the store has them.
MOST_BYTES = 10 * 1024 * 1024
# Something is fetched when this share of the room is taken, or less.
_REFILL_SHARE = 0.75
# Items that are fetched with one question.
_PAGE = 500


class Backlog:
    """The items of one batch that wait in the store, and the room for them in memory."""

    def __init__(self, *, most_items: int, most_bytes: int = MOST_BYTES) -> None:
        """`most_items`, `most_bytes`: that are in memory and have not ended."""
        self._most_items = most_items
        self._most_bytes = most_bytes
        # By place, in their order; each with the time at which the batch had it, nanoseconds since 1970.
        self._waiting: dict[int, tuple[KeptItem, int]] = {}
        # Those in memory, with their bytes.
        self._here: dict[int, int] = {}
        self._here_bytes = 0
        self._is_closed = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, index: int) -> bool:
        return index in self._waiting

    @property
    def here(self) -> tuple[int, int]:
        """Items in memory that have not ended, and their bytes."""
        return len(self._here), self._here_bytes

    def has_room_for(self, index: int, item: Item | BadItem, accepted_ns: int) -> bool:
        """Whether one that comes now is kept in memory: there is room, and nobody waits for it. Else it waits."""
        size = request_bytes(item)
        if self._waiting or len(self._here) >= self._most_items or self._here_bytes >= self._most_bytes:
            name = KeptItem(index=index, item_id=item.item_id, variant_of=item.variant_of, size_bytes=size)
            self.wait(name, accepted_ns)
            return False
        self._arrive(index, size)
        return True

    def wait(self, item: KeptItem, accepted_ns: int) -> None:
        """It waits in the store; places only ever rise."""
        self._waiting[item.index] = item, accepted_ns
        self._changed.set()

    def fetched(self, index: int) -> int | None:
        """It is in memory now; answers with the time at which the batch had it. None: it does not wait any more."""
        found = self._waiting.pop(index, None)
        if found is None:
            return None
        self._arrive(index, found[0].size_bytes)
        return found[1]

    def ended(self, index: int) -> None:
        """It has its result, and needs no room."""
        self._here_bytes -= self._here.pop(index, 0)
        self._changed.set()

    def take(self, index: int) -> tuple[KeptItem, int] | None:
        """It ends without being fetched; answers with it, and the time at which the batch had it. None: it does not
        wait.
        """
        return self._waiting.pop(index, None)

    def waiting(self) -> list[tuple[int, int]]:
        """All that wait, by place, each with the time at which the batch had it."""
        return [(index, accepted_ns) for index, (_, accepted_ns) in self._waiting.items()]

    def close(self) -> None:
        """The batch has ended."""
        self._is_closed = True
        self._changed.set()

    async def wanted(self) -> bool:
        """Returns when something is to be fetched; False: the batch has ended."""
        while not self._is_closed:
            if self._is_wanted:
                return True
            self._changed.clear()
            _ = await self._changed.wait()
        return False

    def pages(self) -> list[tuple[int, int]]:
        """What fits now, as questions to the store: so many items, with places above that one."""
        room, room_bytes = self._most_items - len(self._here), self._most_bytes - self._here_bytes
        found: list[tuple[int, int]] = []
        count, before = 0, -1
        for item, _ in self._waiting.values():
            room -= 1
            room_bytes -= item.size_bytes
            is_only = not self._here and not found and count == 0
            if (room < 0 or room_bytes < 0) and not is_only:
                break
            if count == 0:
                before = item.index - 1
            count += 1
            if count == _PAGE:
                found.append((count, before))
                count = 0
        return [*found, (count, before)] if count else found

    @property
    def _is_wanted(self) -> bool:
        if not self._waiting or not self._here:
            return bool(self._waiting)
        first, _ = next(iter(self._waiting.values()))
        is_refill = len(self._here) <= self._most_items * _REFILL_SHARE
        is_refill &= self._here_bytes <= self._most_bytes * _REFILL_SHARE
        return is_refill and self._here_bytes + first.size_bytes <= self._most_bytes

    def _arrive(self, index: int, size_bytes: int) -> None:
        self._here[index] = size_bytes
        self._here_bytes += size_bytes
