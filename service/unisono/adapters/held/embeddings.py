"""The answer to texts to embed: one JSON object, of which nothing is said before its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono.core.errors import BadAnswerError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

    from unisono.core.model import Finished, Spoke

LONGEST_EMBEDDING: Final = 256 << 20


class WholeReader:
    """What reading such an answer has in common, whoever gives it; each adds how it is read at its end."""

    def __init__(self, *, backend: str, model: str, texts: int | None = None) -> None:
        """`texts`: how many were sent, each of which has a vector; None: that is not looked at."""
        self._backend, self._model = backend, model
        self._texts = texts
        self._chunks: list[bytes] = []
        self._size = 0
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[Spoke | Finished]:
        """Keeps the chunk; nothing is said before the end. Raises BadAnswerError where there is no end to it."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > LONGEST_EMBEDDING:
            raise BadAnswerError(f"backend {self._backend}: the answer is too long", metadata=self._where())
        yield from ()

    def _whole(self) -> bytes:
        """All of it, once."""
        text = b"".join(self._chunks)
        self._chunks = []
        return text

    def _refuse_other_count(self, vectors: Sequence[array[float]]) -> None:
        if self._texts is not None and len(vectors) != self._texts:
            what = f"{len(vectors):,} embeddings for {self._texts:,} texts"
            raise BadAnswerError(f"backend {self._backend}: {what}", metadata=self._where())

    def _where(self) -> dict[str, str]:
        return {"backend": self._backend, "model": self._model}
