"""Tokens of one item → the passes that gave them: one each, or fewer where a model drafts.

Theory of operation. A model that drafts proposes several tokens of an item, and one pass checks them all: those that
are right come at once. So a token is of the same pass as the item's last one where

1. the backend's own figures say so, or
2. the model is known to draft, nobody says more, they are less than GAP_NS apart, and there are no more of them than
   a pass can give: the drafted ones, and one beside.

An item's first token comes with the end of its prompt and is no draft; how many tokens a pass gives is seen from the
others. Tokens that nobody saw are divided by that.

A model may draft unknown to us. Then it shows: tokens come in haste, one upon the other, between pauses as long as a
pass takes. They are counted as a pass each, since a backend that stood still for a moment looks the same; but nobody
can be sure of them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tokens that are no further apart than this can be of one pass: with drafts those of one item, otherwise the first
# token of one item and the last of another.
GAP_NS = 2_000_000
# Nobody waits for a pass so short; tokens that were made together are passed on within a tenth of it.
_HASTE_NS = 500_000
# Tokens that one pass gives an item at most. Where more come in haste for each pause, passes are just that quick.
_MOST_A_PASS = 16


@dataclass(slots=True)
class Speaker:
    """An item between its first token and its end."""

    first_ns: int
    last_ns: int = 0
    tokens: int = 0
    # That gave these tokens; and how many the last one gave.
    passes: int = 0
    together: int = 0
    # Of these, such as may have been one with the pass before.
    hasty: int = 0
    # Other items that were speaking at some time while this one was.
    shared_with: int = 0


class Drafts:
    """How many tokens a pass gives each item of a group."""

    def __init__(self, drafted: int) -> None:
        """`drafted`: tokens that the model is known to draft for a pass; 0: none, as far as is known."""
        # The first token that the backend calls drafted makes it known that there are some.
        self._drafted = drafted
        # Of all tokens but each item's first; and the passes that gave them.
        self._tokens = 0
        self._passes = 0
        self._hasty = 0
        self._pauses = 0

    def hear(self, speaker: Speaker, at_ns: int, *, is_drafted: bool | None = None) -> bool:
        """A token of an item; answers whether it is of another pass than the last one.

        `is_drafted`: the backend says that it is not, or that it is; None: it does not say.
        """
        since_ns = at_ns - speaker.last_ns
        speaker.last_ns = max(speaker.last_ns, at_ns)
        speaker.tokens += 1
        if speaker.tokens == 1:
            speaker.passes = speaker.together = 1
            return True
        self._tokens += 1
        if is_drafted:
            self._drafted = self._drafted or _MOST_A_PASS
        if is_drafted or (is_drafted is None and since_ns < GAP_NS and speaker.together <= self._drafted):
            speaker.together += 1
            return False
        self._passes += 1
        speaker.passes += 1
        speaker.together = 1
        if is_drafted is None and since_ns < _HASTE_NS and not self._drafted:
            self._hasty += 1
            speaker.hasty += 1
        elif since_ns >= GAP_NS:
            self._pauses += 1
        return True

    def passes_of(self, tokens: int) -> int | None:
        """The passes that gave so many tokens that nobody saw; None where it drafts, and none were seen."""
        if not self._drafted or not tokens:
            return tokens
        return round(tokens * self._passes / self._tokens) if self._passes else None

    def doubtful(self, hasty: int) -> int:
        """Of so many passes that came in haste, those that may have been none."""
        return hasty if self._hasty <= self._pauses * _MOST_A_PASS else 0
