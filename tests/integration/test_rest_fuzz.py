"""Requests and files that were spoilt by chance: documented codes in OpenAI's shape, no failure of our own, no hang.

UNISONO_FUZZ sets how many requests are sent; the seed is told when one fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import httpx

from tests.integration.described import HOOKS
from tests.integration.service import LIMIT_S, house

COUNT = int(os.environ.get("UNISONO_FUZZ", "400"))
SEED = 20_261_122
STATUSES = {200, 204, 400, 403, 404, 405, 409, 413, 416, 431}
CHAT = "/v1/chat/completions"
# Values that stand in no request; deep, long, of every type.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**400, "", "a", "\u0000", "\ud83d", "ä" * 300, "../../x", [], {}, [None]),
    *({"": None}, [[[[]]]], {"a": {"b": [1, "2"]}}, "24h", "1s", "9" * 30, "-1", "file-" + "0" * 24),
]


class Spoiler:
    """Spoils values, bytes and paths."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def value(self, value: Any) -> Any:
        """A JSON value with something else in it."""
        if isinstance(value, dict) and value and self.dice.random() < 0.8:
            name = self.dice.choice(list(value))
            changed = dict(value)
            match self.dice.randrange(4):
                case 0:
                    del changed[name]
                case 1:
                    changed[self.dice.choice(["x", "", "n", "stream", "metadata", "\ud83d"])] = self.dice.choice(ODD)
                case _:
                    changed[name] = self.value(changed[name])
            return changed
        if isinstance(value, list) and value and self.dice.random() < 0.7:
            return [self.value(value[0]), *value[1:]]
        return self.dice.choice(ODD)

    def data(self, data: bytes) -> bytes:
        """Bytes that were cut, doubled or changed."""
        at = self.dice.randrange(len(data) + 1)
        match self.dice.randrange(4):
            case 0:
                return data[:at]
            case 1:
                return data[:at] + bytes(self.dice.randrange(256) for _ in range(3)) + data[at + 3 :]
            case 2:
                return data[:at] + data[at // 2 :]
            case _:
                return data


def line(number: int) -> dict[str, Any]:
    """A good line."""
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}
    return {"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body}


async def test_spoilt_requests(tmp_path: Path) -> None:
    """Whatever comes is answered; batches of spoilt files come to an end."""
    spoiler = Spoiler(SEED)
    dice = spoiler.dice
    async with (
        house(keeps_in=tmp_path, with_http=True) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        names = ["file-" + "0" * 24, "batch_none", "..%2f..", "%00", "%ff", "x" * 300]
        for number in range(COUNT):
            kind = dice.randrange(7)
            if kind == 0:
                lines = [json.dumps(spoiler.value(line(n)) if dice.random() < 0.5 else line(n)) for n in range(3)]
                text = spoiler.data("\n".join(lines).encode(errors="surrogatepass"))
                files = {"file": (dice.choice(["a.jsonl", "", "../x", "ä"]), text)}
                answer = await client.post("/v1/files", files=files, data={"purpose": "batch"})
            elif kind == 1:
                parts = (
                    b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--cut\r\n'
                    b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n--cut--\r\n'
                )
                headers = {"content-type": dice.choice(["multipart/form-data; boundary=cut", "a/b", "", "multipart"])}
                answer = await client.post("/v1/files", headers=headers, content=spoiler.data(parts))
            elif kind == 2:
                usual = {"input_file_id": dice.choice(names), "endpoint": CHAT, "completion_window": "24h"}
                asked = usual if dice.random() < 0.7 else spoiler.value(usual | {"metadata": {"a": "b"}})
                text = json.dumps(asked).encode(errors="surrogatepass")
                answer = await client.post("/v1/batches", content=text if dice.random() < 0.8 else spoiler.data(text))
            elif kind == 3:
                asked = batch() if dice.random() < 0.1 else spoiler.value(batch())
                text = json.dumps(asked).encode(errors="surrogatepass")
                path = dice.choice(["/api/batch/chat", "/api/batch/chat", "/api/batch/generate"])
                answer = await client.post(path, content=text if dice.random() < 0.8 else spoiler.data(text))
            elif kind == 4:
                path = dice.choice(["results", "events", "events", "retry"])
                query = dice.choice(["", "?after=1", "?after=99999", "?after=x", "?limit=1", "?after=1&after=1"])
                method = "POST" if path == "retry" else dice.choice(["GET", "GET", "HEAD"])
                headers = (
                    {"last-event-id": dice.choice(["0", "1", "7", "-1", "x" * 300])} if dice.random() < 0.3 else {}
                )
                text = dice.choice([b"", b"{}", b'{"request_id": "a"}', b"[", b'{"request_id": 7}'])
                url = f"/v1/batches/{dice.choice(names)}/{path}{query}"
                content = text if method == "POST" else None
                answer = await client.request(method, url, headers=headers, content=content)
            elif kind == 5:
                header = dice.choice(["host", "origin", "accept", "content-type", "traceparent", "x-long"])
                odd = dice.choice(
                    ["", "evil.example", "http://evil.example", "[", "null", "a:b:c", "x" * 20_000, "%00"]
                )
                path = dice.choice(["/health", "/metrics", "/openapi.json", "/v1/batches", "/api/batch/status", "/"])
                method = dice.choice(["GET", "HEAD", "OPTIONS", "POST"])
                answer = await client.request(method, path, headers={header: odd})
            else:
                path = dice.choice(["/v1/files", "/v1/batches", "/v1/files/{}", "/v1/files/{}/content", "/v1/{}"])
                path = dice.choice([path, "/v1/batches/{}", "/v1/batches/{}/cancel", "/health", "/ready"])
                path = dice.choice([path, path, path, "/api/{}", "/api/batch/{}", "/v1/batches/{}/results/"])
                query = dice.choice(
                    ["", "?limit=2", "?limit=x&after=%ff", "?after=file-1", "?order=%00", "?limit=-1"]
                )
                method = dice.choice(["GET", "GET", "GET", "POST", "PUT", "PATCH", "OPTIONS"])
                answer = await client.request(method, path.format(dice.choice(names)) + query)
            what = f"request {number} of seed {SEED}: {answer.request.method} {answer.request.url}"
            assert answer.status_code in STATUSES, what
            if answer.status_code >= 400 and answer.request.method != "HEAD":
                assert_shape(answer, what)
            elif is_new(answer):
                names.append(answer.json()["id"])
                names[6:] = names[-40:] if len(names) > 60 else names[6:]
        async with asyncio.timeout(LIMIT_S):
            while await open_batches(client):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.05)
    found = {each.name for each in tmp_path.rglob("*")}  # noqa: ASYNC240 - nobody waits
    assert not [name for name in found if not name.startswith(("file-", "files", "journal."))]


def batch() -> dict[str, Any]:
    """A good batch of Ollama's requests."""
    asked = {"messages": [{"role": "user", "content": "Hello"}], "options": {"num_predict": 2}, "id": "a"}
    body = {"requests": [asked, {"prompt": "Hello"}, asked], "model": "fake", "max_batch_size": 2}
    return body | {"batch_timeout": "10ms", "keep_alive": 60, "options": {"temperature": 0}, "stream": False}


def assert_shape(answer: httpx.Response, what: str) -> None:
    """An error has the shape of its path's API."""
    if answer.request.url.raw_path.startswith(b"/api/"):
        if answer.headers["content-type"].startswith("text/plain"):
            assert answer.status_code in (404, 405), what
        else:
            assert list(answer.json()) == ["error"], what
            assert isinstance(answer.json()["error"], str), what
    else:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, what


def is_new(answer: httpx.Response) -> bool:
    """Whether the answer is a thing with an id."""
    is_json = answer.headers.get("content-type") == "application/json" and answer.content != b""
    return is_json and "id" in answer.json()


async def open_batches(client: httpx.AsyncClient) -> list[Any]:
    """Batches among the last hundred that have not ended."""
    found = (await client.get("/v1/batches?limit=100")).json()["data"]
    return [one for one in found if one["status"] not in ("failed", "completed", "expired", "cancelled")]
