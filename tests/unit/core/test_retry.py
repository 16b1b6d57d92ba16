"""Whether and when a failed item is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.core.errors import BackendBusyError, ConnectionLostError, PromptTooLongError
from unisono.core.retry import LONGEST_ASKED_S, Again, GiveUp, backoff_s, decide

LOST = ConnectionLostError("lost")


def test_callers_mistake_is_final() -> None:
    """What is wrong with the request stays wrong, however many attempts are left."""
    assert decide(PromptTooLongError("long"), charged=1, max_attempts=99, key="a") == GiveUp()


@pytest.mark.parametrize(("charged", "is_final"), [(1, False), (2, False), (3, True), (4, True)])
def test_attempts_are_counted(charged: int, *, is_final: bool) -> None:
    """The third of three attempts is the last."""
    assert isinstance(decide(LOST, charged=charged, max_attempts=3, key="a"), GiveUp) is is_final


def test_backend_names_the_pause() -> None:
    """Retry-After wins over the growing pause; none, or 0, leaves it."""
    asked = BackendBusyError("busy", retry_after_s=42.0)
    assert decide(asked, charged=1, max_attempts=3, key="a") == Again(after_s=42.0)
    for silent in (BackendBusyError("busy"), BackendBusyError("busy", retry_after_s=0.0)):
        assert decide(silent, charged=1, max_attempts=3, key="a") == Again(after_s=backoff_s(1, "a"))


def test_first_pause_needs_no_charge() -> None:
    """A failure that cost nothing is followed by the first pause."""
    assert decide(LOST, charged=0, max_attempts=3, key="a") == Again(after_s=backoff_s(1, "a"))


@given(failures=st.integers(1, 10_000), key=st.text())
def test_pause_doubles_up_to_ten_seconds(failures: int, key: str) -> None:
    """The pause is at least half of the full one, never more than it, and never more than 10 s."""
    full = min(10.0, 0.25 * 2.0 ** min(failures - 1, 16))
    assert full / 2 <= backoff_s(failures, key) <= full <= 10.0
    assert backoff_s(failures, key) == backoff_s(failures, key)


def test_pauses_are_scattered() -> None:
    """Items that failed together do not come back together."""
    pauses = sorted(backoff_s(3, str(ticket)) for ticket in range(100))
    assert pauses[0] < 0.6
    assert pauses[-1] > 0.9
    assert len(set(pauses)) == 100


def test_a_backend_cannot_ask_for_an_hour() -> None:
    """A pause that the backend asks for is kept up to a minute, and no longer."""
    error = BackendBusyError("full", retry_after_s=3600)
    assert decide(error, charged=1, max_attempts=3, key="a") == Again(after_s=LONGEST_ASKED_S)
