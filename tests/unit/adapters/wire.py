"""The recordings of a real Ollama, as answers that a test can serve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "fixtures" / "wire"


@dataclass(frozen=True)
class Recording:
    """One request and its answer."""

    name: str
    path: str
    request: Any
    status: int
    body: bytes
    is_stream: bool


def recording(name: str) -> Recording:
    """The recording of this name."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    body = data["response"]["body"]
    is_stream = isinstance(body, list)
    return Recording(
        name=name,
        path=data["request"]["path"],
        request=data["request"]["body"],
        status=data["response"]["status"],
        body="".join(f"{line}\n" for line in body).encode() if is_stream else body.encode(),
        is_stream=is_stream,
    )


NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
# The OpenAI-compatible endpoints of Ollama are not what this adapter speaks.
OWN = tuple(name for name in NAMES if not name.startswith("openai_"))
