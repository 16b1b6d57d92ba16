"""What each path of the HTTP port is asked and answers: the operations of its description.

A path that is added to a table of routes is added here; a test holds the two against each other.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from unisono.edge.rest.schemas import Schema, a, record, ref

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JSON: Final = "application/json"
TEXT: Final = "text/plain"
# Every path may answer so: a page that must not ask, a host that is none of ours; a head too large; a defect.
ALWAYS: Final = (403, 431, 500)
# Of paths that need a folder for batches.
_KEPT: Final = (400, 409)
_FULL: Final = (429, 503)


def operation(
    summary: str,
    answers: Mapping[int, Mapping[str, Schema]],
    *,
    tag: str,
    errors: Sequence[int] = (),
    error: str = "OpenAIError",
    parameters: Sequence[Schema] = (),
    body: Mapping[str, Schema] | None = None,
    needs_body: bool = True,
) -> Schema:
    """One method of a path. `answers`: by status and media type; `error`: the shape of all others."""
    responses: dict[str, Any] = {
        str(status): {
            "description": HTTPStatus(status).phrase,
            **({"content": {media: {"schema": schema} for media, schema in content.items()}} if content else {}),
        }
        for status, content in answers.items()
    }
    for status in (*errors, *ALWAYS):
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {JSON: {"schema": ref(error)}},
        }
    made: Schema = {"summary": summary, "tags": [tag], "responses": responses}
    if parameters:
        made["parameters"] = list(parameters)
    if body is not None:
        content = {media: {"schema": schema} for media, schema in body.items()}
        made["requestBody"] = {"required": needs_body, "content": content}
    return made


def query(name: str, description: str, schema: Schema) -> Schema:
    """A parameter of the query; given twice, it is refused."""
    return {"name": name, "in": "query", "description": description, "schema": schema}


def in_path(name: str) -> Schema:
    """A part of the path."""
    return {"name": name, "in": "path", "required": True, "schema": a("string")}


def _json(name: str) -> Mapping[int, Mapping[str, Schema]]:
    return {200: {JSON: ref(name)}}


_BYTES: Final = {"type": "string", "contentMediaType": "application/octet-stream"}
_FILE: Final = in_path("file_id")
_BATCH: Final = in_path("batch_id")
_AFTER_ID: Final = query("after", "The last id of the page before.", a("string"))
_AFTER: Final = query("after", "The number of the last event that is known; 0: none.", a("integer", minimum=0))


def _limit(most: int, default: int) -> Schema:
    return query("limit", "Entries of a page.", a("integer", minimum=1, maximum=most, default=default))


_UPLOAD: Final = record(
    "A file.",
    {"file": _BYTES, "purpose": {"const": "batch"}},
    {"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": a("integer")},
)

_FILES: Final[Schema] = {
    "/v1/files": {
        "post": operation(
            "Upload a file of requests",
            _json("File"),
            tag="files",
            errors=(400, 409, 413, *_FULL),
            body={"multipart/form-data": _UPLOAD},
        ),
        "get": operation(
            "List files",
            _json("FilePage"),
            tag="files",
            errors=_KEPT,
            parameters=(
                _AFTER_ID,
                _limit(10_000, 10_000),
                query("order", "By the moment of upload.", a("string", enum=["asc", "desc"], default="desc")),
                query("purpose", "Only these.", a("string")),
            ),
        ),
    },
    "/v1/files/{file_id}": {
        "get": operation("A file", _json("File"), tag="files", errors=(404, 409), parameters=(_FILE,)),
        "delete": operation(
            "Delete a file", _json("DeletedFile"), tag="files", errors=(404, 409, *_FULL), parameters=(_FILE,)
        ),
    },
    "/v1/files/{file_id}/content": {
        "get": operation(
            "What a file holds",
            {200: {"application/octet-stream": _BYTES}},
            tag="files",
            errors=(404, 409),
            parameters=(_FILE,),
        ),
    },
}

_BATCHES: Final[Schema] = {
    "/v1/batches": {
        "post": operation(
            "Make a batch of a file",
            _json("Batch"),
            tag="batches",
            errors=(400, 409, 413, *_FULL),
            body={JSON: ref("NewBatch")},
        ),
        "get": operation(
            "List the batches that were made of files",
            _json("BatchPage"),
            tag="batches",
            errors=_KEPT,
            parameters=(_AFTER_ID, _limit(100, 20)),
        ),
    },
    "/v1/batches/{batch_id}": {
        "get": operation(
            "A batch: of a file, or one that came by gRPC",
            _json("Batch"),
            tag="batches",
            errors=(404, 409),
            parameters=(_BATCH,),
        ),
    },
    "/v1/batches/{batch_id}/cancel": {
        "post": operation(
            "Cancel a batch", _json("Batch"), tag="batches", errors=(404, 409, *_FULL), parameters=(_BATCH,)
        ),
    },
    "/v1/batches/{batch_id}/results": {
        "get": operation(
            "Results so far, also while it runs",
            _json("ResultPage"),
            tag="beyond OpenAI",
            errors=(400, 404, 409, 416),
            parameters=(_BATCH, _AFTER, _limit(1_000, 100)),
        ),
    },
    "/v1/batches/{batch_id}/events": {
        "get": operation(
            "All events, as they happen, to the end of the batch; each has its number for an id",
            {200: {"text/event-stream": a("string")}, 204: {}},
            tag="beyond OpenAI",
            errors=(400, 404, 409, 416),
            parameters=(
                _BATCH,
                _AFTER,
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "description": "As `after`, which it goes before.",
                    "schema": a("integer", minimum=0),
                },
            ),
        ),
    },
    "/v1/batches/{batch_id}/retry": {
        "post": operation(
            "Try again what has no answer, in a batch of its own",
            _json("Batch"),
            tag="beyond OpenAI",
            errors=(400, 404, 409, 413, *_FULL),
            parameters=(_BATCH,),
            body={JSON: ref("Retry")},
            needs_body=False,
        ),
    },
}


def _ollama_batch(kind: str) -> Schema:
    line = {"oneOf": [ref(f"{kind}Answer"), ref("FailedAnswer"), ref("BatchEnd")]}
    return {
        "post": operation(
            f"Requests of /api/{kind.lower()} as one batch",
            {200: {JSON: ref(f"{kind}BatchAnswer"), "application/x-ndjson": line}},
            tag="batches of Ollama's requests",
            errors=(400, 413, *_FULL),
            error="OllamaError",
            body={JSON: ref(f"{kind}Batch")},
        )
    }


_OLLAMA: Final[Schema] = {
    "/api/batch/chat": _ollama_batch("Chat"),
    "/api/batch/generate": _ollama_batch("Generate"),
    "/api/batch/status": {
        "get": operation(
            "How batches are", _json("BatchStatus"), tag="batches of Ollama's requests", error="OllamaError"
        )
    },
}

_STANDING: Final[Schema] = {
    "/health": {"get": operation("Whether the service lives", _json("Health"), tag="service")},
    "/ready": {
        "get": operation("Whether it takes work", _json("Readiness"), tag="service", errors=(503,)),
    },
    "/metrics": {
        "get": operation("Its figures, for Prometheus", {200: {TEXT: a("string")}}, tag="service", errors=(404,)),
    },
    "/openapi.json": {
        "get": operation("This document", {200: {JSON: a("object")}}, tag="service"),
    },
}

PATHS: Final[Schema] = {**_FILES, **_BATCHES, **_OLLAMA, **_STANDING}
