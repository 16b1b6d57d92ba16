"""What is wrong with a request, gathered while it is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.unknown_fields import UnknownFieldSet

from unisono.core.errors import InvalidRequestError, Violation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    from google.protobuf.message import Message

    Value = TypeVar("Value")

# Violations of one item; a message of many megabytes can hold millions of them.
MAX_VIOLATIONS: Final = 100


class Found:
    """What is wrong so far."""

    __slots__ = ("violations",)

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        """One thing more."""
        self.violations.append(Violation(field=field, description=description))

    @property
    def is_full(self) -> bool:
        """Whether there is no use in looking for more."""
        return len(self.violations) >= MAX_VIOLATIONS

    def choice(self, known: Mapping[int, Value], number: int, path: str, what: str) -> Value:
        """The value of an enum's number; for one that is not known, what says nothing."""
        if number not in known:
            self.add(path, f"is {number}, which is no {what}; it may be {min(known)} to {max(known)}")
            return known[min(known)]
        return known[number]

    def refuse_unknown(self, message: Message, path: str, what: str) -> None:
        """A field that a newer contract has must not be passed over in silence."""
        unknown = UnknownFieldSet(message)
        for place in range(min(len(unknown), MAX_VIOLATIONS)):
            number = unknown[place].field_number
            self.add(path, f"has {what} of number {number} that this service, perhaps an older one, does not know")

    def raise_if_any(self, path: str) -> None:
        """Refuses a request with all that is wrong with it: the first in words, each in the list."""
        if not self.violations:
            return
        before = f"{path}." if path else ""
        placed = [Violation(field=before + one.field, description=one.description) for one in self.violations]
        more = f" (and {len(placed) - 1:,} more)" if len(placed) > 1 else ""
        raise InvalidRequestError(f"{placed[0].field}: {placed[0].description}{more}", violations=placed)
