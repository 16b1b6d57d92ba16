"""What may become part of a batch: items completed with what applies to it, and what is wrong with them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from unisono.core.batch import BadItem
from unisono.core.errors import InvalidRequestError, Violation
from unisono.core.limits import MAX_VARIANTS, check_item, messages_bytes
from unisono.core.model import ChatRequest
from unisono.core.variants import variants

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.batch import BatchConfig
    from unisono.core.limits import Limits
    from unisono.core.model import Item

# Violations that one answer lists; a request that is wrong throughout would give a status too large to be sent.
MAX_LISTED = 100
# Items that are converted or checked before others have the loop: some ten milliseconds.
AT_A_TIME = 500


@dataclass(frozen=True, slots=True)
class Checked:
    """An item as it would run, with the batch's defaults beneath it, and everything that is wrong with it."""

    item: Item | BadItem
    wrong: tuple[Violation, ...]
    # The place in its request of the item that it comes from: several, where one asks for several answers.
    place: int


class Gate:
    """Lets items into one batch."""

    def __init__(self, config: BatchConfig, limits: Limits) -> None:
        self._config = config
        self._limits = limits
        # Counted once: they may be long, and the items many.
        self._shared_bytes = messages_bytes(config.shared_messages)

    def check(self, given: Item | BadItem, place: int) -> list[Checked]:
        """What becomes of an item: one that has no place yet, or more where several answers are wanted."""
        item: Item | BadItem
        if isinstance(given, BadItem):
            item, wrong = given, given.violations
        else:
            options = given.options.over(self._config.options)
            whole = replace(given, index=0, model=given.model or self._config.model, options=options)
            shared = self._config.shared_messages
            found = check_item(whole, self._limits, shared_count=len(shared), shared_bytes=self._shared_bytes)
            wrong = tuple(found)
            if shared and isinstance(whole.request, ChatRequest):
                # The messages themselves are the same objects for all items.
                request = replace(whole.request, messages=shared + whole.request.messages)
                whole = replace(whole, request=request)
            item = whole
        if any(violation.field == "n" for violation in wrong):
            # Nobody knows how many it should be.
            return [Checked(item, wrong, place)]
        return [Checked(one, wrong, place) for one in variants(item)]


def error_of(violations: Sequence[Violation]) -> InvalidRequestError:
    """One error for all that is wrong: the first in words, the rest in its list, up to a hundred."""
    first = violations[0]
    more = f" (and {len(violations) - 1:,} more)" if len(violations) > 1 else ""
    listed = violations[:MAX_LISTED]
    return InvalidRequestError(f"{first.field}: {first.description}{more}", violations=listed)


def duplicate(item_id: str) -> Violation:
    """The violation of an id that another item has."""
    return Violation(field="item_id", description=f"{item_id!r} is used twice; ids are unique within a batch")


def with_defaults(
    config: BatchConfig, *, item_timeout_s: float, keep_alive_s: float, detach_grace_s: float, model: str
) -> BatchConfig:
    """The config with the service's settings where it says nothing."""
    return replace(
        config,
        model=config.model or model,
        item_timeout_s=item_timeout_s if config.item_timeout_s is None else config.item_timeout_s,
        keep_alive_s=keep_alive_s if config.keep_alive_s is None else config.keep_alive_s,
        detach_grace_s=detach_grace_s if config.detach_grace_s is None else config.detach_grace_s,
    )


class Examination:
    """Looks at the items of one batch, some at a time: at each by itself, and for ids used twice."""

    def __init__(self, config: BatchConfig, limits: Limits) -> None:
        self._limits = limits
        self._gate = Gate(config, limits)
        self._seen: set[str] = set()
        self._first = 0
        self._answers = 0

    def take(self, items: Sequence[Item | BadItem]) -> list[Checked]:
        """The next ones; raises InvalidRequestError where all ask for more answers than a batch may have items."""
        self._answers += sum(min(max(1, item.n), MAX_VARIANTS) for item in items)
        refuse_count(self._answers, self._limits, are="items, each answer of `n` counted as one")
        checked: list[Checked] = []
        for place, given in enumerate(items, start=self._first):
            for one in self._gate.check(given, place):
                item_id = one.item.item_id
                is_again = item_id in self._seen and item_id != ""
                checked.append(replace(one, wrong=(*one.wrong, duplicate(item_id))) if is_again else one)
                self._seen.add(item_id)
        self._first += len(items)
        return checked


def as_kept(one: Checked) -> Item | BadItem:
    """An item as it is kept: with what is wrong with it in its place, where anything is."""
    if not one.wrong:
        return one.item
    return BadItem(item_id=one.item.item_id, violations=one.wrong, variant_of=one.item.variant_of)


async def examine(items: Sequence[Item | BadItem], config: BatchConfig, limits: Limits) -> list[Checked]:
    """Checks all items of a request, ids used twice included, letting others have the loop now and then.

    Raises InvalidRequestError where they ask for more answers than a batch may have items.
    """
    answers = sum(min(max(1, item.n), MAX_VARIANTS) for item in items)
    refuse_count(answers, limits, are="items, each answer of `n` counted as one")
    examination = Examination(config, limits)
    checked: list[Checked] = []
    start = 0
    while start < len(items):
        await asyncio.sleep(0)
        # One item may become many.
        end, count = start, 0
        while end < len(items) and count < AT_A_TIME:
            count += max(1, items[end].n)
            end += 1
        checked += examination.take(items[start:end])
        start = end
    return checked


def refuse_count(count: int, limits: Limits, *, are: str = "items") -> None:
    """Raises InvalidRequestError for no items at all, or too many."""
    what = ""
    if count == 0:
        what = "is empty; a batch needs at least one item"
    elif count > limits.max_items:
        what = f"has {count:,} {are}; at most {limits.max_items:,} are taken"
    if what:
        raise error_of([Violation(field="items", description=what)])


def refuse_wrong(checked: Sequence[Checked], path: str) -> None:
    """Raises InvalidRequestError where anything is wrong with any item; paths are from the request on.

    `path` is that of an item, with {} for its place: "items[{}]".
    """
    wrong = [
        replace(violation, field=f"{path.format(one.place)}.{violation.field}")
        for one in checked
        for violation in one.wrong
    ]
    if wrong:
        # What is wrong with an item is wrong with each of its answers, and said once.
        raise error_of(list(dict.fromkeys(wrong)))
