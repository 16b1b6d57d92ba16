"""The HTTP port's description is whole, valid, and true of its answers; and figures for Prometheus."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate as validate_document
from starlette.applications import Starlette
from starlette.routing import Route

from tests.integration.described import HOOKS, validate
from tests.integration.service import LIMIT_S, house
from unisono.edge.rest.openapi import document
from unisono.edge.rest.server import RestServer


async def test_every_path_and_method_is_described_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the routes of the application that is served."""
    apps: list[Starlette] = []
    start = RestServer.start

    async def watched(app: Starlette, host: str, port: int) -> RestServer:
        apps.append(app)
        return await start(app, host, port)

    monkeypatch.setattr(RestServer, "start", watched)
    async with house(keeps_in=tmp_path, with_http=True):
        pass
    (app,) = apps
    # HEAD is answered wherever GET is, and said once for all.
    served = {
        (route.path, method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    told = {(path, method) for path, item in document()["paths"].items() for method in item}
    assert told == served


def test_the_description_is_valid() -> None:
    """By the rules of OpenAPI 3.1, and each schema by those of JSON Schema; none is left unused."""
    found = document()
    validate_document(found)
    names = set(found["components"]["schemas"])
    for name in names:
        OAS31Validator.check_schema(found["components"]["schemas"][name])
    text = json.dumps(found)
    assert {name for name in names if f'#/components/schemas/{name}"' not in text} == set()


async def test_the_description_is_served(tmp_path: Path) -> None:
    """As it is."""
    async with house(with_http=True) as h, httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S) as client:
        answer = await client.get("/openapi.json")
        assert answer.json() == json.loads(json.dumps(document()))
        assert (await client.head("/openapi.json")).status_code == 200


async def test_answers_are_as_they_are_described(tmp_path: Path) -> None:
    """Of each path: what it answers when all is well, and some that is wrong. The other tests look at theirs too."""
    line: dict[str, Any] = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]},
    }
    async with (
        house(keeps_in=tmp_path, with_http=True, with_metrics=True) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        lines = "\n".join(
            [json.dumps(line), json.dumps(line | {"custom_id": "b", "body": line["body"] | {"model": "absent"}})]
        )
        file = (
            await client.post("/v1/files", files={"file": ("a", lines.encode())}, data={"purpose": "batch"})
        ).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        validate(asked, {"$ref": "#/components/schemas/NewBatch"})
        batch = (await client.post("/v1/batches", json=asked)).json()
        async with asyncio.timeout(LIMIT_S):
            while (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] != "completed":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for path in (
            *("/health", "/ready", "/metrics", "/openapi.json", "/v1/files", "/v1/batches", "/api/batch/status"),
            *(f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", f"/v1/batches/{batch['id']}"),
            *(f"/v1/batches/{batch['id']}/results", f"/v1/batches/{batch['id']}/events"),
        ):
            assert (await client.get(path)).status_code == 200, path
            assert (await client.head(path)).status_code == 200, path
        assert (await client.post(f"/v1/batches/{batch['id']}/retry")).status_code == 200
        assert (await client.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 409
        for kind, request in (("chat", line["body"]), ("generate", {"prompt": "Hello", "model": "fake"})):
            body: Any = {"requests": [request, {}], "options": {"num_predict": 2}, "batch_timeout": "10ms"}
            validate(body, {"$ref": f"#/components/schemas/{kind.title()}Batch"})
            assert (await client.post(f"/api/batch/{kind}", json=body)).status_code == 200
            answer = await client.post(f"/api/batch/{kind}", json=body | {"stream": True})
            said = document()["paths"][f"/api/batch/{kind}"]["post"]["responses"]["200"]["content"]
            for text in answer.text.splitlines():
                validate(json.loads(text), said["application/x-ndjson"]["schema"])
            assert (await client.post(f"/api/batch/{kind}", json={})).status_code == 400
        assert (await client.delete(f"/v1/files/{file['id']}")).status_code == 200
        assert (await client.delete(f"/v1/files/{file['id']}")).status_code == 404


async def test_figures_are_those_of_the_own_port(tmp_path: Path) -> None:
    """The same names, in the form that is asked for; also where there is no own port."""
    async with (
        house(with_http=True, with_metrics=True) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S) as client,
    ):
        here = await client.get("/metrics")
        there = await client.get(h.metrics_url)
        assert names(here.text) == names(there.text)
        assert "unisono_backend_up" in names(here.text)
        assert here.headers["content-type"] == there.headers["content-type"]
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert (await client.get("/metrics", headers=accept)).text.endswith("# EOF\n")
    async with (
        house(with_http=True, with_metrics=True, settings={"metrics_listen": "none"}) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S) as client,
    ):
        assert h.metrics_url == ""
        assert "unisono_backend_up" in names((await client.get("/metrics")).text)


def names(text: str) -> set[str]:
    """The names of all figures."""
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}


async def test_a_service_that_counts_nothing_says_so() -> None:
    """One that was started for a command has no figures."""
    async with house(with_http=True) as h, httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S) as client:
        assert (await client.get("/metrics")).status_code == 404
