"""The stand-in for Ollama says what a real one was recorded to say: tests/fixtures/wire, one file a case.

Each recorded request is sent to the stand-in, which is told to say the recorded words; status, content type,
framing, the order of the fields and every value must be the recorded ones, except for values that differ from
run to run (times, durations, ids, numbers of an embedding, counts of another tokenizer), which must have the
recorded type or pattern.
"""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import Answer, FakeModel, FakeOllama, Fault, FaultKind

WIRE = Path(__file__).parent.parent / "fixtures" / "wire"
CASES = sorted(path.stem for path in WIRE.glob("*.json"))

MODELS = (
    FakeModel(name="t-tools", capabilities=("completion", "tools")),
    FakeModel(
        name="smollm2:135m",
        digest="fdc5049875c5d1fb5484c3ac60424b846e70f975d778e3417653b4ce020cf80c",
        embedding_length=576,
    ),
    FakeModel(name="t-emb", capabilities=("embedding",), embedding_length=256),
    FakeModel(name="t-think", capabilities=("completion", "thinking")),
)

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
# Values that differ from run to run, and what they must look like.
PATTERNS = {
    "created_at": TIME,
    "modified_at": TIME,
    "expires_at": TIME,
    "digest": re.compile(r"[0-9a-f]{64}"),
    "id": re.compile(r"call_[a-z0-9]{8}|chatcmpl-\d{1,3}|cmpl-\d{1,3}|[\w.-]+:\w+"),
}
FREE = {
    *("total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "created"),
    *("prompt_eval_count", "prompt_tokens", "total_tokens", "context", "embeddings", "embedding"),
    *("logprob", "bytes", "size", "size_vram", "parameters", "modelfile", "template", "shape"),
    *("parameter_size", "context_length", "embedding_length"),
}


def recorded(case: str) -> dict[str, Any]:
    """One recording."""
    loaded: dict[str, Any] = json.loads((WIRE / f"{case}.json").read_text())
    return loaded


def split(text: str, count: int) -> tuple[str, ...]:
    """A text in so many pieces."""
    edges = [len(text) * at // max(count, 1) for at in range(count + 1)]
    return tuple(text[left:right] for left, right in pairwise(edges))


def answer_of(body: Any) -> Answer | None:
    """What the recorded model said, token by token, for the stand-in to say it again."""
    lines = body if isinstance(body, list) else [body]
    objects = []
    for line in lines:
        try:
            objects.append(json.loads(line.removeprefix("data: ")))
        except ValueError:
            continue
    content: list[str] = []
    thinking: list[str] = []
    calls: list[tuple[str, dict[str, Any]]] = []
    tokens = 0
    for value in objects:
        choice = (value.get("choices") or [{}])[0] if isinstance(value, dict) else {}
        message = value.get("message") or choice.get("message") or choice.get("delta") or {}
        content.append(message.get("content") or value.get("response") or choice.get("text") or "")
        thinking.append(message.get("thinking") or value.get("thinking") or "")
        calls += [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        tokens = value.get("eval_count") or (value.get("usage") or {}).get("completion_tokens") or tokens
        if value.get("done_reason") == "stop":
            tokens -= 1
    said, thought = [text for text in content if text], [text for text in thinking if text]
    if not isinstance(body, list):
        said = list(split("".join(said), tokens)) if said else []
        thought = list(split("".join(thought), tokens - 1)) if thought else []
    return Answer(
        content=tuple(said), thinking=tuple(thought), tool_calls=tuple(calls), tool_tokens=tokens if calls else None
    )


def same(want: Any, got: Any, path: str, key: str = "") -> None:
    """Both values have one shape: the same fields in the same order, and the same fixed values."""
    if isinstance(want, dict):
        assert isinstance(got, dict), path
        assert list(got) == list(want), path
        for name, value in want.items():
            same(value, got[name], f"{path}.{name}", name)
    elif isinstance(want, list):
        assert isinstance(got, list), path
        assert bool(got) == bool(want), path
        pairs = zip(want, got, strict=True) if len(want) == len(got) else ((want[0], item) for item in got)
        for at, (left, right) in enumerate(pairs):
            same(left, right, f"{path}[{at}]", key)
    elif key == "error" and want.startswith("{"):
        same(json.loads(want), json.loads(got), f"{path}(text)")
    elif key in PATTERNS:
        assert PATTERNS[key].fullmatch(got), (path, got)
    elif key in FREE:
        assert type(got) is type(want), (path, got)
    elif key in ("message", "n_prompt_tokens") and "tokens" in f"{want}{path}":
        assert re.sub(r"\d{4}", "N", str(got)) == re.sub(r"\d{4}", "N", str(want)), path
    elif path.startswith(("$.models", "$.data")) or (key == "token" and "top_logprobs" in path):
        assert type(got) is type(want), (path, got)
    else:
        assert got == want, path


def same_line(want: str, got: str, path: str) -> None:
    """Two lines, of JSON or not, are of one shape."""
    head = "data: " if want.startswith("data: ") else ""
    assert got.startswith(head), path
    want, got = want.removeprefix(head), got.removeprefix(head)
    if want.startswith("{"):
        same(json.loads(want), json.loads(got), path)
        if '": ' not in want:
            assert re.search(r'[,{]"[^"]+": ', got.split('"content"')[0]) is None, "blanks between name and value"
    else:
        assert got == want, path


async def send(client: httpx.AsyncClient, request: dict[str, Any]) -> httpx.Response:
    """Send a recorded request."""
    body = request["body"]
    content = None if body is None else (body if isinstance(body, str) else json.dumps(body))
    return await client.request(request["method"], request["path"], content=content)


@pytest.mark.parametrize("case", CASES)
async def test_answers_as_recorded(case: str) -> None:
    """Every recorded request is answered in the recorded shape."""
    record = recorded(case)
    request, response = record["request"], record["response"]
    answered = 1
    async with (
        FakeOllama(MODELS, max_loaded_models=1) as fake,
        httpx.AsyncClient(base_url=fake.url, timeout=10) as client,
    ):
        if isinstance(request["body"], dict):
            answer = answer_of(response["body"]) if response["status"] == 200 else None
            messages = request["body"].get("messages") or [{"content": request["body"].get("prompt")}]
            if case.startswith("long_prompt"):
                messages[-1]["content"] = "word " * 3000
            if answer is not None and messages[-1]["content"]:
                fake.answer(messages[-1]["content"], answer)
        if case.startswith("runner_killed"):
            lines = len(response["body"]) - 1 if isinstance(response["body"], list) else 7
            fake.faults.add(Fault(FaultKind.KILL_RUNNER, after_lines=lines))
        if case == "ps_one":
            await client.post("/api/chat", json={"model": "smollm2:135m", "messages": []})
        if case == "queue_full":
            got, answered = await fill_queue(fake, client, request)
            assert answered == response["refused"]
        else:
            got = await send(client, request)
    assert got.status_code == response["status"]
    for name, value in response.get("headers", {}).items():
        if name == "content-length":
            assert "transfer-encoding" not in got.headers
        else:
            assert got.headers[name] == value, name
    if isinstance(response["body"], list):
        assert got.headers["transfer-encoding"] == "chunked"
        lines_got = got.text.removesuffix("\n").split("\n")
        assert len(lines_got) == len(response["body"])
        for at, (want, line) in enumerate(zip(response["body"], lines_got, strict=True)):
            same_line(want, line, f"line {at}: $")
    elif response["body"].startswith("{"):
        assert got.text.endswith("\n") == response["body"].endswith("\n") or case == "openai_embeddings"
        same_line(response["body"], got.text, "$")
    else:
        assert got.text == response["body"]


async def fill_queue(
    fake: FakeOllama, client: httpx.AsyncClient, request: dict[str, Any]
) -> tuple[httpx.Response, int]:
    """700 requests at once for a model that is not loaded: one that was refused, and how many were."""
    fake.hold_loads()
    payload = json.dumps(request["body"]).encode()
    head = f"POST {request['path']} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
    streams = [await asyncio.open_connection("127.0.0.1", fake.port) for _ in range(699)]
    for _, writer in streams:
        writer.write(head + payload)
    await fake.wait_for(lambda f: f.received == 699 and f.in_flight == 513, timeout_s=15)
    refused = await send(client, request)
    fake.release_loads()
    texts = await asyncio.gather(*(reader.readuntil(b"}") for reader, _ in streams))
    for _, writer in streams:
        writer.close()
    return refused, 1 + sum(b" 503 " in text for text in texts)


def test_all_recordings_are_known() -> None:
    """No recording is left out, and none is missing."""
    named = re.findall(r"^\| (\w+) \| \d{3} \|", (WIRE / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == CASES
