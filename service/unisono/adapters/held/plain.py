"""Answers of plain requests, read up to a bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono.core.errors import BadAnswerError

if TYPE_CHECKING:
    import httpx

# A list of a thousand models has about a megabyte.
LONGEST_PLAIN: Final = 32 << 20


async def read_all(answer: httpx.Response, backend: str) -> bytes:
    """The body of a streamed answer. Raises BadAnswerError where it does not end."""
    body = bytearray()
    async for chunk in answer.aiter_bytes():
        body += chunk
        if len(body) > LONGEST_PLAIN:
            raise BadAnswerError(
                f"backend {backend}: an answer of more than {LONGEST_PLAIN >> 20} MiB to a short question",
                metadata={"backend": backend},
            )
    return bytes(body)
