"""What may become part of a batch: items made complete with the batch's defaults, and what is wrong with them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from unisono.core.batch import BadItem
from unisono.core.errors import InvalidRequestError, Violation
from unisono.core.limits import check_item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.batch import BatchConfig
    from unisono.core.limits import Limits
    from unisono.core.model import Item

# Violations that one answer lists; a request that is wrong throughout would give a status too large to be sent.
MAX_LISTED = 100
# Items that are converted or checked before others have the loop: some ten milliseconds.
AT_A_TIME = 500


def complete(item: Item | BadItem, config: BatchConfig) -> Item | BadItem:
    """The item with the batch's model and options beneath its own, and no place yet."""
    if isinstance(item, BadItem):
        return item
    return replace(item, index=0, model=item.model or config.model, options=item.options.over(config.options))


def violations_of(item: Item | BadItem, limits: Limits) -> tuple[Violation, ...]:
    """What is wrong with an item, with paths from the item on; empty if it may be run."""
    return item.violations if isinstance(item, BadItem) else tuple(check_item(item, limits))


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


@dataclass(frozen=True, slots=True)
class Checked:
    """An item with the batch's defaults beneath it, and everything that is wrong with it."""

    item: Item | BadItem
    wrong: tuple[Violation, ...]


async def examine(items: Sequence[Item | BadItem], config: BatchConfig, limits: Limits) -> list[Checked]:
    """Checks all items of a request, ids used twice included, letting others have the loop now and then."""
    checked: list[Checked] = []
    seen: set[str] = set()
    for place, given in enumerate(items):
        if place % AT_A_TIME == 0:
            await asyncio.sleep(0)
        item = complete(given, config)
        wrong = violations_of(item, limits)
        if item.item_id and item.item_id in seen:
            wrong = (*wrong, duplicate(item.item_id))
        seen.add(item.item_id)
        checked.append(Checked(item, wrong))
    return checked


def refuse_count(count: int, limits: Limits) -> None:
    """Raises InvalidRequestError for no items at all, or too many."""
    what = ""
    if count == 0:
        what = "is empty; a batch needs at least one item"
    elif count > limits.max_items:
        what = f"has {count:,} items; at most {limits.max_items:,} are taken"
    if what:
        raise error_of([Violation(field="items", description=what)])


def refuse_wrong(checked: Sequence[Checked]) -> None:
    """Raises InvalidRequestError where anything is wrong with any item; paths are from the request on."""
    wrong = [
        replace(violation, field=f"items[{place}].{violation.field}")
        for place, one in enumerate(checked)
        for violation in one.wrong
    ]
    if wrong:
        raise error_of(wrong)
