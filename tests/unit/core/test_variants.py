"""Several answers of one item: ids, seeds, and where they come from."""

from __future__ import annotations

import pytest

from unisono.core.batch import BadItem
from unisono.core.errors import Violation
from unisono.core.model import GenerateRequest, Item, Options
from unisono.core.variants import variants


def item(n: int = 3, seed: int | None = None) -> Item:
    """An item of which so many answers are wanted."""
    return Item(
        item_id="a", index=0, request=GenerateRequest(prompt="p"), options=Options(seed=seed, top_k=4), model="m", n=n
    )


def seeds(one: Item) -> list[int | None]:
    """The seeds of its variants."""
    return [each.options.seed for each in variants(one) if isinstance(each, Item)]


def test_one_answer_is_the_item_itself() -> None:
    """Under its own id, and without a seed that nobody asked for."""
    one = item(n=1)
    assert variants(one) == [one]
    assert variants(one)[0] is one


def test_each_answer_is_an_item_of_its_own() -> None:
    """With all that the item has, an id of its own, and word of where it comes from."""
    made = variants(item())
    assert [each.item_id for each in made] == ["a#1", "a#2", "a#3"]
    for each in made:
        assert isinstance(each, Item)
        assert (each.variant_of, each.n, each.model, each.options.top_k) == ("a", 1, "m", 4)
        assert each.request is made[0].request  # type: ignore[union-attr]  # an Item too, as this loop shows


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (40, [40, 41, 42]),
        (0, [0, 1, 2]),
        (-2, [-2, -1, 0]),
        # Above the highest number of 64 bits comes the lowest.
        (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)]),
    ],
)
def test_a_seed_is_counted_on(seed: int, expected: list[int]) -> None:
    """The k-th answer has seed + k - 1."""
    assert seeds(item(seed=seed)) == expected


def test_without_a_seed_each_has_one_made_of_its_id() -> None:
    """The same each time, different ones for different ids, and none that means "by chance"."""
    found = seeds(item(n=64))
    assert found == seeds(item(n=64))
    assert len(set(found)) == 64
    assert all(seed is not None and 0 <= seed < 2**31 for seed in found)
    # 31 bits of the checksums of "a#1" and "a#2": other numbers would break what was asked before.
    assert found[:2] == [1_495_469_918, 1_076_518_628]


def test_a_bad_item_has_as_many_failures() -> None:
    """So that nobody waits for an answer of which nothing is heard."""
    bad = BadItem(item_id="a", violations=(Violation(field="chat", description="is wrong"),), n=2)
    made = variants(bad)
    assert [(each.item_id, each.variant_of, each.n) for each in made] == [("a#1", "a", 1), ("a#2", "a", 1)]
    assert all(isinstance(each, BadItem) and each.violations == bad.violations for each in made)
