"""How often a prompt's beginning came back: what a slot holds of it may serve items that are yet to come.

Theory of operation. A prefix is computed on one slot more where that saves passes for the items that wait. Whoever
sends the same system prompt with batch after batch gains from it each time. Nobody says that another will come; but
what came back k times is about as likely to come back k times more (Lindy's law). So what a slot more saves counts
once for the items at hand, and once for each return beyond the first: a second batch computes nothing that is held
already, and from the third on more slots are given to what keeps returning. Not for long: once all slots hold it,
nothing of it is computed any more.

A slot that holds what others return for is not taken from them on such a hope, or two prompts that come in turn would
drive out each other for ever.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.core.prefixes import Prefix

# Returns that count, and beginnings that are remembered: the one that was not seen for longest is forgotten first.
MOST_RETURNS = 64
_MOST_KNOWN = 1_000


class Returns:
    """Counts how often items came whose beginning was held already, while none like them waited.

    A beginning is named by the digest of its last step.
    """

    def __init__(self) -> None:
        self._times: OrderedDict[int, int] = OrderedDict()

    def came(self, digest: int) -> None:
        """Items that begin so came back."""
        self._times[digest] = min(self._times.get(digest, 0) + 1, MOST_RETURNS)
        self._times.move_to_end(digest)
        if len(self._times) > _MOST_KNOWN:
            _ = self._times.popitem(last=False)

    def expected(self, digest: int | None) -> int:
        """How often what is computed now will serve: for the items at hand, and as often as they may come back."""
        return max(1, self._times.get(digest, 0)) if digest is not None else 1

    def has_returned(self, prefix: Prefix | None) -> bool:
        """Whether anything of it was found held by later items."""
        return prefix is not None and any(digest in self._times for digest in prefix.digests)
