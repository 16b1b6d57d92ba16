"""What the drop-in's paths are asked and answer, for the description: what the backend takes, and what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono.edge.rest.passed_on import PATHS as CHANGES
from unisono.edge.rest.schemas import Schema, a
from unisono.edge.rest.understood import PATHS as INFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

_JSON: Final = {"content": {"application/json": {"schema": a("object")}}}
_THEIRS: Final = (
    "The backend's own answer: its status, its headers and every byte of its body, streamed where it streams. What "
    "the service says itself is in the shape of that API: 403 (not allowed), 413 (a body too large), 501 (no backend "
    "speaks this API), 502 and 503 (no backend answers, or too many requests are under way)."
)


def _operation(summary: str, *, has_body: bool, parameter: str = "") -> Schema:
    made: Schema = {"summary": summary, "tags": ["drop-in"], "responses": {"default": {"description": _THEIRS}}}
    if has_body:
        made["requestBody"] = {"required": True, **_JSON}
    if parameter:
        made["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": a("string")}]
    return made


def _changes() -> Iterator[tuple[str, str, Schema]]:
    for name, routes in CHANGES.items():
        for path, method in routes:
            # HEAD is answered too, and said once for all.
            if method != "HEAD":
                parameter = "digest" if "{digest}" in path else ""
                summary = f"Passed on where UNISONO_ALLOW has {name}"
                yield path, method.lower(), _operation(summary, has_body=not parameter, parameter=parameter)


DROP_IN: Final[Schema] = {
    **{path: {"post": _operation("A request for an answer, as it came", has_body=True)} for path in INFERENCE},
    **{
        path: {"get": _operation("What there is, passed on; of several backends, put together", has_body=False)}
        for path in ("/api/tags", "/api/ps", "/v1/models")
    },
    "/v1/models/{model}": {"get": _operation("One model, passed on", has_body=False, parameter="model")},
    "/api/show": {"post": _operation("One model, passed on", has_body=True)},
    "/api/version": {"get": _operation("The backend's version", has_body=False)},
    "/": {"get": _operation("Whether the backend is there", has_body=False)},
    **{path: {method: made} for path, method, made in _changes()},
}
