"""The forms of lines are kept with a batch, in few bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.edge.batchfile.line import Form
from unisono.edge.cli.forms import Forms, TooMixedError, write_forms


@given(st.lists(st.sampled_from(Form), min_size=1, max_size=100))
def test_each_is_told_again(forms: list[Form]) -> None:
    """By its place; beyond the last, it is plain unless all are the same."""
    found = Forms.read(write_forms(forms))
    assert [found.at(index) for index in range(len(forms))] == forms
    assert found.is_one == (len(set(forms)) == 1)


@pytest.mark.parametrize("text", ["", "x3", "p1,c2", "c", "c1\n", "3c"])
def test_what_was_not_written_by_us_is_plain(text: str) -> None:
    """So is a batch of another client's."""
    assert Forms.read(text).at(0) is Form.PLAIN


def test_the_limit() -> None:
    """512 bytes, which a value of the metadata may have."""
    changing = [Form.PLAIN, Form.CHAT] * 128
    assert len(write_forms(changing)) == 512
    with pytest.raises(TooMixedError):
        _ = write_forms([*changing, Form.PLAIN])
    assert write_forms([Form.CHAT] * 50_000) == "c50000"
    assert not write_forms([Form.PLAIN] * 50_000)
