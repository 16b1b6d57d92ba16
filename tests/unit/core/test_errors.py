"""The tree of errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from unisono.core import errors
from unisono.core.errors import BackendError, CallerError, ItemStoppedError, RequestError, UnisonoError, Violation


def tree(top: type[UnisonoError] = UnisonoError) -> Iterator[type[UnisonoError]]:
    """A class and all below it."""
    yield top
    for child in top.__subclasses__():
        yield from tree(child)


GROUPS = {UnisonoError, RequestError, CallerError, BackendError, ItemStoppedError}
LEAVES = [kind for kind in tree() if kind not in GROUPS and kind.__module__ == errors.__name__]


def test_every_reason_names_one_error() -> None:
    """No two failures share a reason, and each is a name that travels in an ErrorInfo."""
    reasons = Counter(kind.reason for kind in LEAVES)
    assert set(reasons.values()) == {1}
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{2,62}", reason) for reason in reasons)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_error_says_what_it_is(kind: type[UnisonoError]) -> None:
    """Each class has a docstring of its own and carries its message; the caller's errors are never retried."""
    assert kind.__doc__
    assert kind.__doc__ not in {group.__doc__ for group in GROUPS}
    error = kind("what happened")
    assert (str(error), error.message) == ("what happened", "what happened")
    assert error.is_retryable or not issubclass(kind, BackendError)
    assert not (error.is_retryable and issubclass(kind, (CallerError, ItemStoppedError)))


def test_reasons_are_listed() -> None:
    """Of a class that has others below it, theirs; each once."""
    assert errors.reasons(errors.InternalError) == ("INTERNAL",)
    listed = errors.reasons(UnisonoError)
    assert sorted(listed) == sorted({kind.reason for kind in LEAVES})
    assert errors.reasons(BackendError, errors.LoadFailedError) == errors.reasons(BackendError)
    assert "CANCELLED" in errors.reasons(ItemStoppedError)


def test_only_an_absent_backend_costs_no_attempt() -> None:
    """Every failure but one counts against an item's attempts."""
    assert [kind for kind in LEAVES if not kind.costs_attempt] == [errors.BackendUnavailableError]


def test_error_keeps_what_it_was_given() -> None:
    """Metadata and violations are the error's own, whatever becomes of the caller's."""
    metadata, violations = {"model": "m"}, [Violation(field="items", description="is empty")]
    error = errors.InvalidRequestError("wrong", metadata=metadata, violations=violations, retry_after_s=1.5)
    metadata.clear()
    violations.clear()
    assert error.metadata == {"model": "m"}
    assert error.violations == (Violation(field="items", description="is empty"),)
    assert error.retry_after_s == 1.5
    assert UnisonoError("plain").violations == ()
