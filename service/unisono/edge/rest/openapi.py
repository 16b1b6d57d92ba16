"""The HTTP port's own description: OpenAPI 3.1, at `/openapi.json`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from unisono import __version__
from unisono.edge.rest.operations import PATHS
from unisono.edge.rest.schemas import SCHEMAS

_ABOUT: Final = """\
OpenAI's Files and Batches, Ollama's requests by the batch, and how the service is. Where GET is answered, HEAD is.
A path that is none is told 404 and a method that is none 405, in the shape of the API whose prefix it has: OpenAI's,
or Ollama's plain text below /api/. Pages that may ask are told so at OPTIONS. Bodies of JSON are read whatever their
content-type says. Each answer has an x-request-id. There is no authentication.
"""


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The description; not to be changed."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Unisono",
            "version": __version__,
            "description": _ABOUT.replace("\n", " ").strip(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": PATHS,
        "components": {"schemas": SCHEMAS},
    }
