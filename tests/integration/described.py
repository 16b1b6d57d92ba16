"""Holds answers of the HTTP port against its own description: statuses, media types and bodies.

httpx.AsyncClient(base_url=…, event_hooks=HOOKS)
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import httpx
from openapi_schema_validator import OAS31Validator

from unisono.edge.rest.openapi import document

# What an answer to a path that is none, or to a method, may be.
_NONE = (403, 404, 405, 431)


@lru_cache(maxsize=1)
def _paths() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """Each path as a pattern; those without a part that varies come first."""
    found = sorted(document()["paths"].items(), key=lambda each: each[0].count("{"))
    return [(re.compile(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(path))), item) for path, item in found]


@lru_cache(maxsize=256)
def _validator(name: str) -> OAS31Validator:
    return OAS31Validator({"$ref": name, "components": document()["components"]})


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Fails where a value is not as the schema says."""
    if set(schema) == {"$ref"}:
        validator = _validator(schema["$ref"])
    else:
        validator = OAS31Validator({**schema, "components": document()["components"]})
    problems = [f"{problem.json_path}: {problem.message[:300]}" for problem in validator.iter_errors(value)]
    assert not problems, problems


async def described(answer: httpx.Response) -> None:
    """Fails where the answer is none that the description has. Streams are left to their readers."""
    request = answer.request
    where = f"{request.method} {request.url.path} → {answer.status_code}"
    item = next(
        (item for path, item in _paths() if path.fullmatch(request.url.raw_path.decode().split("?")[0])), None
    )
    operation = (item or {}).get(request.method.lower().replace("head", "get"))
    if operation is None:
        is_asked_beforehand = request.method == "OPTIONS" and answer.status_code == 204
        assert is_asked_beforehand or answer.status_code in _NONE, f"{where} is not in the description"
        return
    said = operation["responses"].get(str(answer.status_code))
    assert said is not None, f"{where} is not in the description, which has {list(operation['responses'])}"
    media = answer.headers.get("content-type", "").partition(";")[0]
    assert media in said.get("content", {"": {}}), f"{where} is {media!r}"
    if media == "application/json" and request.method != "HEAD":
        _ = await answer.aread()
        validate(answer.json(), said["content"][media]["schema"])


HOOKS: dict[str, list[Any]] = {"response": [described]}
