"""The recordings of llama.cpp's own server: bodies as they came, streams as .txt and JSON as .json."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[2] / "fixtures" / "llama_server"
# Streams of server-sent events.
STREAMS: Final = tuple(
    sorted(path.stem for path in FOLDER.glob("*.txt") if path.stem.startswith(("chat_", "completion")))
)
# The status of each refusal that was recorded.
REFUSALS: Final = {
    "error_context": 400,
    "error_embedding_empty": 400,
    "error_embedding_length": 500,
    "error_embeddings": 501,
    "error_image": 500,
    "error_infill": 501,
    "error_json": 400,
    "error_key": 401,
    "error_loading": 503,
    "error_option_range": 400,
    "error_path": 404,
    "error_schema": 400,
    "error_two_assistants": 400,
    "error_type": 400,
}


def stream(name: str) -> bytes:
    """A recorded stream."""
    return (FOLDER / f"{name}.txt").read_bytes()


def body(name: str) -> bytes:
    """A recorded body."""
    return (FOLDER / f"{name}.json").read_bytes()
