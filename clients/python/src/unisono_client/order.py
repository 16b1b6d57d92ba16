"""Results in the order in which their items were given."""

from __future__ import annotations

from unisono_client.results import Result


class InOrder:
    """Keeps results until all before them are there: at most as many as the batch has."""

    def __init__(self) -> None:
        # By the place of the item: its results so far.
        self._early: dict[int, list[Result]] = {}
        self._next = 0

    def put(self, result: Result) -> list[Result]:
        """The results whose turn it is now; of an item with several answers, in their own order."""
        mine = self._early.setdefault(result.place, [])
        mine.append(result)
        mine.sort(key=lambda each: each.index)
        turn: list[Result] = []
        while (ready := self._early.get(self._next)) is not None and len(ready) == ready[0].answers:
            turn += self._early.pop(self._next)
            self._next += 1
        return turn
