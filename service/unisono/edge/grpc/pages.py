"""Pages of a list: tokens, which are places as opaque texts that are refused when they were made up; and sizes."""

from __future__ import annotations

import base64
import binascii

from unisono.edge.grpc.calls import wrong

_PREFIX = b"u1:"
# Bytes of ids that a page may hold so that its message stays below 4 MiB, beside all warnings and refusals.
_PAGE_ID_BYTES = 1024 * 1024


def token(place: int) -> str:
    """The token of the page that begins at a place."""
    return base64.urlsafe_b64encode(_PREFIX + str(place).encode()).decode()


def place(text: str) -> int:
    """Where the page of a token begins; 0 for no token. Raises InvalidRequestError for one that is not ours."""
    if not text:
        return 0
    try:
        raw = base64.urlsafe_b64decode(text.encode())
    except (binascii.Error, ValueError):
        raw = b""
    number = raw.removeprefix(_PREFIX)
    if raw == number or not number.isdigit():
        what = "is not a token of this list: take next_page_token as it came, with the same request"
        raise wrong("page_token", what)
    return int(number)


def size(asked: int, *, default: int, most: int) -> int:
    """How many entries a page has; raises InvalidRequestError above the most."""
    if asked > most:
        what = f"is {asked:,}; at most {most:,} are given"
        raise wrong("page_size", what)
    return asked or default


def end(ids: list[str], start: int, size: int) -> int:
    """Where the page of ids ends that begins at a place: by their number, or by their bytes."""
    room = _PAGE_ID_BYTES
    for at, item_id in enumerate(ids[start : start + size], start):
        room -= len(item_id.encode()) + 4
        if room < 0 and at > start:
            return at
    return start + size
