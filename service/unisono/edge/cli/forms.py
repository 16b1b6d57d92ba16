"""In which form each line of a submitted file was written, so that its result can be written in the same.

Whoever fetches results has no file: the forms are kept with the batch, among its metadata, as runs of lines in the
same form, "c24" or "p3c2p1". A batch of another client's has none, and plain results.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby

from unisono.edge.batchfile.line import Form

FORMS_KEY = "unisono.forms"
# What a value of the metadata may hold: more than a hundred changes of form.
_MAX_BYTES = 512
_LETTERS = {Form.PLAIN: "p", Form.CHAT: "c", Form.COMPLETIONS: "t", Form.EMBEDDINGS: "e", Form.RESPONSES: "r"}
_RUN = re.compile(r"([pcter])([0-9]{1,9})", re.ASCII)


class TooMixedError(Exception):
    """The forms of a file change too often to be kept."""


class Forms:
    """The form of each item, by its place in the batch; beyond what is known, plain."""

    def __init__(self, runs: Sequence[tuple[Form, int]] = ()) -> None:
        self._runs = [form for form, _ in runs]
        # Where each run ends.
        self._ends = list(accumulate(count for _, count in runs))

    @classmethod
    def read(cls, text: str) -> Forms:
        """What was kept of a batch; all are plain where nothing was, or where it cannot be understood."""
        letters = {letter: form for form, letter in _LETTERS.items()}
        runs = [(letters[letter], int(count)) for letter, count in _RUN.findall(text)]
        is_whole = "".join(f"{_LETTERS[form]}{count}" for form, count in runs) == text
        return cls(runs if is_whole else ())

    @property
    def is_one(self) -> bool:
        """Whether all items have the same."""
        return len(set(self._runs)) <= 1

    def at(self, index: int) -> Form:
        """The form of the item in this place."""
        if self.is_one:
            return self._runs[0] if self._runs else Form.PLAIN
        run = bisect_right(self._ends, index)
        return self._runs[run] if run < len(self._runs) else Form.PLAIN


def write_forms(forms: Iterable[Form]) -> str:
    """What is kept of a batch; nothing where all are plain. Raises TooMixedError."""
    text = "".join(f"{_LETTERS[form]}{sum(1 for _ in same)}" for form, same in groupby(forms))
    if len(text) > _MAX_BYTES:
        raise TooMixedError
    return "" if set(text) <= set("p0123456789") else text
