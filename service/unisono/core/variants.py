"""One item of which several answers are wanted → as many items, each with a seed of its own.

The seeds follow from what was sent: the same batch sent again makes the same requests.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

from unisono.core.batch import BadItem
from unisono.core.model import Item

# Backends read a seed as a whole number of 64 bits with a sign, and take a negative one for "by chance": so seeds of
# ours are not negative, and have 31 bits, which every sampler keeps whole.
_SEED_MASK = 0x7FFF_FFFF
_SEEDS = 2**64
_HIGHEST_SEED = 2**63 - 1


def variants(item: Item | BadItem) -> list[Item | BadItem]:
    """The items "ID#1" to "ID#n" of an item, or the item itself where one answer is wanted.

    With a seed, the k-th has seed + k - 1; without, each has one made of its id.
    """
    if item.n == 1:
        return [item]
    return [_variant(item, k) for k in range(1, item.n + 1)]


def _variant(item: Item | BadItem, k: int) -> Item | BadItem:
    item_id = f"{item.item_id}#{k}"
    if isinstance(item, BadItem):
        return replace(item, item_id=item_id, n=1, variant_of=item.item_id)
    given = item.options.seed
    if given is None:
        seed = zlib.crc32(item_id.encode(errors="surrogatepass")) & _SEED_MASK
    else:
        seed = given + k - 1
        # Above the highest there is the lowest.
        seed -= _SEEDS if seed > _HIGHEST_SEED else 0
    options = replace(item.options, seed=seed)
    return replace(item, item_id=item_id, options=options, n=1, variant_of=item.item_id)
