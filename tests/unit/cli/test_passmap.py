"""The pass map shows which item took part in which pass, and fits where it is drawn."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from unisono.edge.cli.passmap import MapPass, draw_pass_map

NAMES = {0: "capital-of-france", 1: "haiku", 2: "story", 3: "json"}
# Two slots: 0 and 1 begin, 2 takes 1's slot, 3 takes 0's.
TURNS = [(0, 1), (0, 1), (0, 2), (0, 2), (2, 3), (3,)]


def passes(*turns: tuple[int, ...], group: int = 0) -> list[MapPass]:
    """Passes of one group."""
    return [MapPass(group=group, items=items) for items in turns]


def test_each_pass_is_a_column() -> None:
    """Rows by first pass; ids cut; below, how many items each pass had."""
    assert draw_pass_map(passes(*TURNS), NAMES, 80) == [
        "group 0: 6 passes, a column each",
        "  haiku            │██",
        "  capital-of-fran… │████",
        "  story            │  ███",
        "  json             │    ██",
        "                   └──────",
        "             items  222221",
        "",
        "  █ the item took part in the pass; items: how many did (read downwards).",
    ]


def test_ascii_where_the_encoding_has_no_blocks() -> None:
    """The same with plain characters only."""
    drawn = draw_pass_map(passes(*TURNS), NAMES, 80, unicode=False)
    assert drawn == [
        "group 0: 6 passes, a column each",
        "  haiku            |##",
        "  capital-of-fran~ |####",
        "  story            |  ###",
        "  json             |    ##",
        "                   +------",
        "             items  222221",
        "",
        "  # the item took part in the pass; items: how many did (read downwards).",
    ]
    assert "\n".join(drawn).isascii()


def test_more_passes_than_columns_are_binned() -> None:
    """A cell's shade is the share of the bin's passes; the bottom row is the mean, read downwards."""
    turns = [
        tuple(item for item, share in enumerate((8, 6, 4, 2, 1)) if number % 8 < share) + tuple(range(5, 12))
        for number in range(8 * 20)
    ]
    drawn = draw_pass_map(passes(*turns), dict(enumerate("abcdefghijkl")), 69)
    assert drawn[0] == "group 0: 160 passes in 60 columns of about 2.7"
    drawn = draw_pass_map(passes(*turns * 2), dict(enumerate("abcdefghijkl")), 49)
    assert drawn == [
        "group 0: 320 passes in 40 columns of about 8.0",
        *(f"  {name}     │{sign * 40}" for name, sign in zip("edcbafghijkl", "·░▒▓████████", strict=True)),
        "        └" + "─" * 40,
        "  items  " + "1" * 40,
        "         " + "0" * 40,
        "",
        "  █ in every pass of the column, ▓ in ¾, ▒ ½, ░ ¼, · fewer; items: how many did (read downwards).",
    ]
    drawn = draw_pass_map(passes(*turns * 2), dict(enumerate("abcdefghijkl")), 49, unicode=False)
    assert (
        drawn[-1]
        == "  # in every pass of the column, = in 3/4, + 1/2, - 1/4, . fewer; items: how many did (read downwards)."
    )
    assert drawn[4] == "  b     |" + "=" * 40


def test_many_items_are_cut_but_counted() -> None:
    """Forty rows, then how many more; the bottom row counts all of them."""
    drawn = draw_pass_map(passes(tuple(range(100)), tuple(range(7))), {}, 100)
    rows = [line for line in drawn if "│█" in line]
    assert len(rows) == 40
    assert rows[0] == "  #7    │█"
    assert "  …     │ 60 more items (--passes all shows every one)" in drawn
    assert drawn[-5:-2] == ["  items  1", "         0", "         07"]
    assert len(draw_pass_map(passes(tuple(range(100))), {}, 100, rows=None)) == 100 + 2 + 3 + 2


def test_groups_stand_under_their_headings() -> None:
    """Each runner has its own passes and its own scale; a long heading has a line for itself."""
    drawn = draw_pass_map(
        passes((0,), group=1) + passes((1,), (1,), group=0), NAMES, 40, headings={0: "tiny on here", 1: "m" * 30}
    )
    assert drawn == [
        "tiny on here: 2 passes, a column each",
        "  haiku │██",
        "        └──",
        "  items  11",
        "",
        "m" * 30,
        "  1 pass, a column each",
        "  capital-of-fran… │█",
        "                   └─",
        "             items  1",
        "",
        "  █ the item took part in the pass; items: how many did (read downwards).",
    ]


def test_wide_characters_keep_the_columns_in_line() -> None:
    """An id of Chinese characters takes two cells each."""
    drawn = draw_pass_map(passes((0, 1)), {0: "首都是哪里首都是哪里", 1: "x"}, 80)
    assert drawn[1] == "  首都是哪里首都…  │█"
    assert cell_len(drawn[1]) == cell_len(drawn[2])


def test_nothing_is_drawn_of_nothing() -> None:
    """A batch without passes has no map."""
    assert draw_pass_map([], {}, 80) == []


@given(
    st.lists(st.sets(st.integers(0, 60), min_size=1, max_size=20), min_size=1, max_size=300),
    st.integers(20, 200),
    st.booleans(),
)
def test_the_map_fits(turns: list[set[int]], width: int, unicode: bool) -> None:  # noqa: FBT001
    """Whatever the batch, no line of the map itself is wider than it may be, and no item is missing."""
    drawn = draw_pass_map(passes(*(tuple(turn) for turn in turns)), {}, width, unicode=unicode, rows=None)
    assert all(cell_len(line) <= max(width, 40) for line in drawn[1:-1])
    assert sum("│" in line or "|" in line for line in drawn[:-1]) == len(set().union(*turns))
