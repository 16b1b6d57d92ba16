"""Items of a stream: which of them a batch takes, and why it refuses the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.app import intake
from unisono.app.intake import Gate
from unisono.core.batch import Ack
from unisono.core.errors import (
    BatchFullError,
    CreditExceededError,
    DuplicateItemError,
    InputClosedError,
    InvalidRequestError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.app.intake import Checked
    from unisono.app.register import Register
    from unisono.core.batch import BadItem, BatchConfig
    from unisono.core.errors import UnisonoError
    from unisono.core.limits import Limits
    from unisono.core.model import Item


class Admission:
    """The way of added items into one batch."""

    def __init__(
        self,
        config: BatchConfig,
        limits: Limits,
        register: Register,
        *,
        closed: Callable[[], UnisonoError | None],
        credit: Callable[[], int],
    ) -> None:
        """`closed`: why it takes no more items at all, if so. `credit`: how many it may have by now."""
        self._config = config
        self._limits = limits
        self._register = register
        self._gate = Gate(config, limits)
        self._closed = closed
        self._credit = credit

    def admit(
        self, items: Sequence[Item | BadItem], *, is_reopened: bool
    ) -> tuple[list[Ack], list[tuple[int, Checked]]]:
        """Gives items their places, or refuses them; one Ack for each answer that an item taken will have.

        STRICT: if one is malformed, all of these are refused. PER_ITEM: it becomes part of the batch.
        """
        checked = [self._gate.check(item, place) for place, item in enumerate(items)]
        # What is wrong with an item is wrong with each of its answers.
        wrong = [several[0].wrong for several in checked]
        if self._config.is_strict and any(wrong):
            other = InvalidRequestError("another item of the same message is wrong, and validation is STRICT")
            refused = [
                Ack(item_id=item.item_id, place=place, refusal=intake.error_of(own) if own else other)
                for place, (item, own) in enumerate(zip(items, wrong, strict=True))
            ]
            return refused, []
        acks: list[Ack] = []
        taken: list[tuple[int, Checked]] = []
        for several in checked:
            acks += self._take(several, taken, is_reopened=is_reopened)
        return acks, taken

    def let_go(self) -> None:
        """The batch is forgotten: see RunningBatch. It takes nothing any more."""
        error = InputClosedError("the batch has ended")
        self._closed, self._credit = lambda: error, lambda: 0

    def _take(self, several: Sequence[Checked], taken: list[tuple[int, Checked]], *, is_reopened: bool) -> list[Ack]:
        """Takes an item, as the items that its answers are; or refuses it as one."""
        place, first = several[0].place, several[0].item
        register = self._register
        fresh = [one for one in several if one.item.item_id not in register]
        refusal = None if not fresh else self._refusal(len(fresh))
        for one in several:
            if one.item.item_id in register and not (is_reopened and register.is_same(one.item)):
                refusal = DuplicateItemError(f"the batch already has an item {one.item.item_id!r}")
        if refusal is not None:
            return [Ack(item_id=first.variant_of or first.item_id, place=place, refusal=refusal)]
        taken += [(register.add(one.item), one) for one in fresh]
        item_ids = [one.item.item_id for one in several]
        return [Ack(item_id=item_id, place=place, index=register.index(item_id)) for item_id in item_ids]

    def _refusal(self, count: int) -> UnisonoError | None:
        """Why so many more items are not taken at this moment."""
        if (closed := self._closed()) is not None:
            return closed
        count_so_far = len(self._register)
        if count_so_far + count > self._limits.max_items:
            return BatchFullError(f"a batch has at most {self._limits.max_items:,} items; open another one")
        if count_so_far + count > self._credit():
            return CreditExceededError(
                f"at most {self._limits.max_open_items:,} items of a stream may be open; wait for credit before "
                "sending more",
                retry_after_s=1.0,
            )
        return None
