"""When requests of single callers that were gathered may go as one request."""

from __future__ import annotations

import pytest

from unisono.core.waiting import Waiting
from unisono.core.window import Window, WindowSettings, bundle_goes_s


@pytest.mark.parametrize(
    ("texts", "size", "has_waiting", "has_flying", "goes_s"),
    [
        (3, None, False, False, 7.0),
        (3, None, True, False, None),
        (999, 5, True, True, None),
        (3, None, False, True, 7.5),
        (5, 5, False, True, 7.0),
        (4, 5, False, True, 7.5),
        (100, None, False, True, 7.0),
        (100, 500, False, True, 7.0),
    ],
    ids=["idle", "queued", "queued, many", "company", "size", "below size", "full", "full before size"],
)
def test_when_a_bundle_goes(
    texts: int, size: int | None, *, has_waiting: bool, has_flying: bool, goes_s: float | None
) -> None:
    """At once, when the window closes, or not before an earlier one has gone; gathered since second 7."""
    settings = WindowSettings(window_s=0.5, size=size)
    found = bundle_goes_s(
        settings, texts=texts, most_texts=100, since_s=7.0, has_waiting=has_waiting, has_flying=has_flying
    )
    assert found == goes_s


@pytest.mark.parametrize(
    ("yields", "has_room", "closes_s"),
    [(True, True, 7.0), (True, False, 7.010), (False, True, 7.010)],
    ids=["room", "no room", "asked for"],
)
def test_nobody_is_gathered_while_a_slot_is_free(closes_s: float, *, yields: bool, has_room: bool) -> None:
    """Whoever waits misses passes; unless somebody asked for that."""
    window = Window(WindowSettings(window_s=0.010, yields_to_slots=yields))
    assert window.closes_s(has_room=has_room) is None
    window.add(Waiting(1, 0, None, 400, None, 10.0), 7.0)
    assert window.closes_s(has_room=has_room) == pytest.approx(closes_s)
    assert not window.close(closes_s - 0.001, 4, has_room=has_room)
    assert len(window.close(closes_s, 4, has_room=has_room)) == 1
