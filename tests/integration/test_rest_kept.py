"""Results and events of kept batches over HTTP, while they run: the same that gRPC and the command line see."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.described import HOOKS
from tests.integration.service import LIMIT_S, House, Seen, chat, chats, embed, generate, house, state_of
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.edge.cli.results import ResultsOptions, results
from unisono.edge.cli.terminal import Terminal

COMPLETIONS = "/v1/chat/completions"
LONG = "Go on [[tokens=4000]]"


@asynccontextmanager
async def served(keeps_in: Path, **settings: Any) -> AsyncGenerator[tuple[House, httpx.AsyncClient]]:
    """A service, and a client of its HTTP port."""
    async with (
        house(keeps_in=keeps_in, with_http=True, **settings) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        yield h, client


def line(custom_id: str, text: str = "Hello", **fields: Any) -> str:
    """A line of a batch's file."""
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body})


async def create(client: httpx.AsyncClient, *lines: str) -> str:
    """A batch of a new file; its id."""
    files = {"file": ("a.jsonl", "\n".join(lines).encode())}
    file = (await client.post("/v1/files", files=files, data={"purpose": "batch"})).json()
    asked = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    answer = await client.post("/v1/batches", json=asked)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def until(client: httpx.AsyncClient, batch_id: str, status: str) -> dict[str, Any]:
    """A batch, once it stands so."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            found: dict[str, Any] = (await client.get(f"/v1/batches/{batch_id}")).json()
            if found["status"] == status:
                return found
            await asyncio.sleep(0.01)


async def listed(client: httpx.AsyncClient, batch_id: str, limit: int = 100) -> list[dict[str, Any]]:
    """All results so far, page by page."""
    found: list[dict[str, Any]] = []
    after = 0
    while True:
        answer = await client.get(f"/v1/batches/{batch_id}/results?after={after}&limit={limit}")
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert set(page) == {"object", "data", "has_more", "last_sequence"}
        assert len(page["data"]) <= limit
        assert page["last_sequence"] == (page["data"][-1]["sequence"] if page["data"] else after)
        found += page["data"]
        after = page["last_sequence"]
        if not page["has_more"]:
            return found


class Sse:
    """Server-sent events, read as a browser reads them."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.events: list[tuple[int | None, str, dict[str, Any]]] = []
        self.comments = 0

    async def read(self) -> AsyncIterator[tuple[int | None, str, dict[str, Any]]]:
        """Each event: its number, its kind, what it says."""
        number, kind = None, ""
        async for text in self.answer.aiter_lines():
            name, _, value = text.partition(": ")
            if name == "id":
                number = int(value)
            elif name == "event":
                kind = value
            elif name == "data":
                self.events.append((number, kind, json.loads(value)))
                yield self.events[-1]
                number, kind = None, ""
            elif text.startswith(":"):
                self.comments += 1


async def events(
    client: httpx.AsyncClient, batch_id: str, after: int = 0, **headers: str
) -> list[tuple[int | None, str, dict[str, Any]]]:
    """All events to the end of the stream."""
    url = f"/v1/batches/{batch_id}/events?after={after}"
    async with client.stream("GET", url, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        sse = Sse(answer)
        return [event async for event in sse.read()]


# -- The same, whoever asks ------------------------------------------------------------------------------------


Told = list[tuple[int, str, str, str, int]]


def by_rest(lines: list[dict[str, Any]]) -> Told:
    """What the lines tell of each result: number, item, state, content, tokens."""
    return [
        (
            one["sequence"],
            one["custom_id"],
            one["state"],
            one["response"]["body"]["choices"][0]["message"]["content"] if one["state"] == "completed" else "",
            one["response"]["body"]["usage"]["completion_tokens"] if one["state"] == "completed" else 0,
        )
        for one in lines
    ]


def by_grpc(seen: Seen) -> Told:
    """The same of what gRPC told."""
    return [
        (
            event.sequence,
            event.result.item_id,
            state_of(event.result).lower(),
            event.result.completion.content,
            event.result.usage.completion_tokens if event.result.HasField("completion") else 0,
        )
        for event in seen.events
        if event.HasField("result")
    ]


async def by_command(h: House, batch_id: str, path: Path) -> list[tuple[str, str, str, int]]:
    """The same of what `unisono results --follow` writes, which has no numbers."""
    from unisono.edge.cli.connect import Wish

    options = ResultsOptions(wish=Wish(server=h.target), batch_id=batch_id, output=str(path), follows=True)
    _ = await results(options, Terminal.standard())
    written = await asyncio.to_thread(path.read_text)
    found = [json.loads(text) for text in written.splitlines()]
    return [
        (one["id"], one["state"], one.get("content") or "", (one.get("usage") or {}).get("completion_tokens", 0))
        for one in found
    ]


async def test_results_are_the_same_events_whoever_reads_them(tmp_path: Path) -> None:
    """By REST in pages and as events, by gRPC listed and streamed, by the command line: while the batch runs."""
    items = [chat(f"i{n}", f"Question {n} [[tokens={5 + 7 * n % 40}]]") for n in range(24)]
    items.append(chat("bad", "Hello", model="absent"))
    async with served(tmp_path / "kept", pass_s=0.004) as (h, client):
        batch = await h.submit(items)
        streams = asyncio.gather(
            h.attach(batch.batch_id),
            events(client, batch.batch_id),
            by_command(h, batch.batch_id, tmp_path / "out.jsonl"),
        )
        seen_early = 0
        pages: list[dict[str, Any]] = []
        after = 0
        async with asyncio.timeout(LIMIT_S):
            while len(pages) < len(items):
                page = (await client.get(f"/v1/batches/{batch.batch_id}/results?after={after}&limit=4")).json()
                pages += page["data"]
                after = page["last_sequence"]
                stood = await h.kept(batch.batch_id)
                seen_early += bool(page["data"]) and stood.counts.queued > 0
                await asyncio.sleep(0.005)
        attached, sse, command = await streams
        of_list = await h.list_results(batch.batch_id, page_size=3)
        assert seen_early > 2, "nothing was read while the batch ran"
        told = by_rest(pages)
        assert len(told) == len(items)
        assert told == by_grpc(attached) == by_grpc(of_list)
        assert told == by_rest([value for _, kind, value in sse if kind == "result"])
        assert told == by_rest(await listed(client, batch.batch_id, limit=5))
        assert [each[1:] for each in told] == command
        # All events, not the results alone: the same numbers and kinds as gRPC's.
        assert [(number, kind) for number, kind, _ in sse] == [
            (event.sequence, event.WhichOneof("event")) for event in attached.events if event.HasField("sequence")
        ]
        ended = await h.kept(batch.batch_id)
        assert sse[-1][0] == ended.last_sequence


async def test_a_batch_of_a_file_is_told_alike_and_its_lines_are_those_of_its_file(tmp_path: Path) -> None:
    """The page's lines are the output file's, with a number and a state."""
    lines = [line(f"c{n}", f"Question {n}") for n in range(10)] + [line("bad", model="absent")]
    async with served(tmp_path) as (h, client):
        batch_id = await create(client, *lines)
        sse = asyncio.ensure_future(events(client, batch_id))
        batch = await until(client, batch_id, "completed")
        found = await listed(client, batch_id)
        assert by_rest(found) == by_grpc(await h.attach(batch_id))
        assert [value for _, kind, value in await sse if kind == "result"] == found
        written: list[dict[str, Any]] = []
        for name in ("output_file_id", "error_file_id"):
            content = await client.get(f"/v1/files/{batch[name]}/content")
            written += [json.loads(text) for text in content.text.splitlines()]
    plain = [{name: one[name] for name in one if name not in ("sequence", "state")} for one in found]
    assert sorted(plain, key=lambda one: one["custom_id"]) == sorted(written, key=lambda one: one["custom_id"])


async def test_answers_repeat_what_was_asked_as_those_of_the_file_do(tmp_path: Path) -> None:
    """Of /v1/responses: in pages, and as events."""
    url = "/v1/responses"
    lines = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": url,
            "body": {"model": "fake", "input": "Hi", "top_p": n / 10},
        }
        for n in range(5)
    ]
    async with served(tmp_path) as (_, client):
        files = {"file": ("a.jsonl", "\n".join(json.dumps(one) for one in lines).encode())}
        file = (await client.post("/v1/files", files=files, data={"purpose": "batch"})).json()
        asked = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
        batch_id = (await client.post("/v1/batches", json=asked)).json()["id"]
        batch = await until(client, batch_id, "completed")
        content = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text
        written = {one["custom_id"]: one for one in map(json.loads, content.splitlines())}
        found = await listed(client, batch_id, limit=2)
        assert [value for _, kind, value in await events(client, batch_id) if kind == "result"] == found
        for one in found:
            assert one["response"]["body"]["top_p"] == int(one["custom_id"][1:]) / 10
            assert {name: one[name] for name in one if name not in ("sequence", "state")} == written[one["custom_id"]]


async def test_results_in_parts_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a reader who asks for what comes after the first of the parts."""
    monkeypatch.setattr("unisono.core.paging.split.__defaults__", (2_500,))
    monkeypatch.setattr("unisono.core.paging._TEXT_STEP", 300)
    async with served(tmp_path) as (h, client):
        batch = await h.submit([chat("a", "[[tokens=900]]", num_predict=900), chat("b", "[[say=short]]")])
        seen = await h.attach(batch.batch_id)
        parts = [event.sequence for event in seen.events if event.HasField("result_part")]
        assert len(parts) > 2
        found = {one["custom_id"]: one for one in await listed(client, batch.batch_id, limit=1)}
        whole = found["a"]["response"]["body"]["choices"][0]["message"]["content"]
        assert whole == seen.results["a"].completion.content
        for after in parts:
            later = await events(client, batch.batch_id, after)
            assert next(value for _, kind, value in later if kind == "result") == found["a"]


async def test_a_page_ends_where_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says that there is more."""
    monkeypatch.setattr("unisono.edge.rest.kept._PAGE_BYTES", 1_000)
    async with served(tmp_path) as (h, client):
        batch = await h.submit(chats(20))
        _ = await h.attach(batch.batch_id)
        page = (await client.get(f"/v1/batches/{batch.batch_id}/results")).json()
        assert 1 <= len(page["data"]) < 10
        assert page["has_more"] is True
        assert len(await listed(client, batch.batch_id)) == 20


# -- Batches that came by gRPC, and batches that gRPC goes on with -----------------------------------------------


async def test_a_batch_of_grpc_is_a_batch_here(tmp_path: Path) -> None:
    """By its id, without what only a file would give it; and can be cancelled."""
    async with served(tmp_path, pass_s=0.004) as (h, client):
        batch = await h.submit([chat("a", LONG, num_predict=4000)], metadata={"job": "night"})
        found = await until(client, batch.batch_id, "in_progress")
        assert (found["object"], found["metadata"], found["expires_at"]) == ("batch", {"job": "night"}, None)
        assert (found["endpoint"], found["input_file_id"], found["completion_window"]) == (None, None, None)
        assert (await client.get("/v1/batches")).json()["data"] == []
        answer = await client.post(f"/v1/batches/{batch.batch_id}/cancel")
        assert answer.json()["status"] in ("cancelling", "cancelled")
        ended = await until(client, batch.batch_id, "cancelled")
        assert ended["request_counts"]["total"] == 1
        assert ended["cancelled_at"] >= ended["created_at"]
        assert (await client.post(f"/v1/batches/{batch.batch_id}/cancel")).status_code == 409
        (one,) = await listed(client, batch.batch_id)
        assert (one["state"], one["response"], one["error"]["code"]) == ("cancelled", None, "batch_cancelled")


async def test_items_of_every_kind_have_a_body(tmp_path: Path) -> None:
    """Texts as those of a chat, vectors as embeddings."""
    async with served(tmp_path) as (h, client):
        batch = await h.submit([chat("c"), generate("g", "[[say=Once]]"), embed("e", "one", "two")])
        _ = await h.attach(batch.batch_id)
        bodies = {one["custom_id"]: one["response"]["body"] for one in await listed(client, batch.batch_id)}
    assert bodies["c"]["object"] == bodies["g"]["object"] == "chat.completion"
    assert bodies["g"]["choices"][0]["message"]["content"] == "Once"
    assert [one["object"] for one in bodies["e"]["data"]] == ["embedding"] * 2


# -- Another try -----------------------------------------------------------------------------------------------


async def test_what_failed_is_tried_again_and_becomes_files(tmp_path: Path) -> None:
    """A batch of OpenAI's, with the parent's file and metadata; gRPC knows whose child it is."""
    async with served(tmp_path) as (h, client):
        parent = await create(client, line("a"), line("b", model="absent"))
        first = await until(client, parent, "completed")
        failed = first["request_counts"]["failed"]
        assert failed >= 1
        answer = await client.post(f"/v1/batches/{parent}/retry", json={"request_id": "again"})
        assert answer.status_code == 200, answer.text
        child = answer.json()
        assert child["id"] != parent
        assert (child["input_file_id"], child["endpoint"]) == (first["input_file_id"], COMPLETIONS)
        ended = await until(client, child["id"], "completed")
        assert ended["request_counts"]["total"] == failed
        assert ended["error_file_id"]
        assert (await h.kept(child["id"])).parent_batch_id == parent
        # Sent again, it is the same.
        again = await client.post(f"/v1/batches/{parent}/retry", json={"request_id": "again"})
        assert again.json()["id"] == child["id"]
        assert [one["id"] for one in (await client.get("/v1/batches")).json()["data"]] == [child["id"], parent]


async def test_what_failed_of_a_batch_of_grpc_is_tried_again(tmp_path: Path) -> None:
    """It is a batch like its parent."""
    async with served(tmp_path) as (h, client):
        parent = await h.submit([chat("a"), chat("b", model="absent")])
        _ = await h.attach(parent.batch_id)
        child = (await client.post(f"/v1/batches/{parent.batch_id}/retry")).json()
        assert child["input_file_id"] is None
        ended = await until(client, child["id"], "completed")
        assert ended["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
        (one,) = await listed(client, child["id"])
        assert (one["custom_id"], one["state"], one["response"]["status_code"]) == ("b", "failed", 404)


async def test_what_cannot_be_tried_again(tmp_path: Path) -> None:
    """What runs, what had no failure, what never ran, what is no batch; and bodies that are none."""
    async with served(tmp_path, pass_s=0.004) as (h, client):
        running = await h.submit([chat("a", LONG, num_predict=4000)])
        answer = await client.post(f"/v1/batches/{running.batch_id}/retry")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "batch_running")
        _ = await h.cancel(running.batch_id)
        whole = await create(client, line("a"))
        _ = await until(client, whole, "completed")
        assert (await client.post(f"/v1/batches/{whole}/retry")).status_code == 400
        wrong = await create(client, "{")
        _ = await until(client, wrong, "failed")
        assert "before any item ran" in (await client.post(f"/v1/batches/{wrong}/retry")).json()["error"]["message"]
        assert (await client.post("/v1/batches/batch_none/retry")).status_code == 404
        for body in (b"{", b"[]", b"\xff", b'{"id": 1}', b'{"request_id": 1}', json.dumps({"request_id": "x" * 999})):
            assert (await client.post(f"/v1/batches/{whole}/retry", content=body)).status_code == 400


# -- Events ----------------------------------------------------------------------------------------------------


async def test_a_connection_that_is_cut_goes_on_with_exactly_the_rest(tmp_path: Path) -> None:
    """After each event: by the number in the address, and by the header that browsers send."""
    async with served(tmp_path) as (h, client):
        batch = await h.submit(chats(60))
        _ = await h.attach(batch.batch_id)
        whole = await events(client, batch.batch_id)
        assert [number for number, _, _ in whole] == list(range(1, len(whole) + 1))
        assert len(whole) > 60
        for at, (number, _, _) in enumerate(whole[:-1], 1):
            rest = await events(client, batch.batch_id, number or 0)
            assert rest == whole[at:]
            resumed = await events(client, batch.batch_id, 0, **{"last-event-id": str(number)})
            assert resumed == whole[at:]


async def test_a_connection_that_is_cut_while_the_batch_runs_loses_nothing(tmp_path: Path) -> None:
    """Cut after every few events, it goes on after the last that came; each comes once, in its order."""
    async with served(tmp_path, pass_s=0.002) as (h, client):
        batch = await h.submit([chat(f"i{n}", f"Question {n} [[tokens={20 + n}]]") for n in range(40)])
        got: list[tuple[int | None, str, dict[str, Any]]] = []
        cuts = 0
        async with asyncio.timeout(LIMIT_S):
            while not got or got[-1][1] != "summary":
                headers = {"last-event-id": str(got[-1][0])} if got else {}
                async with client.stream("GET", f"/v1/batches/{batch.batch_id}/events", headers=headers) as answer:
                    took = 0
                    async for event in Sse(answer).read():
                        got.append(event)
                        took += 1
                        if took == 3:
                            break
                cuts += 1
        assert cuts > 10
        assert got == await events(client, batch.batch_id)


async def test_a_stream_that_is_over_is_not_asked_for_again(tmp_path: Path) -> None:
    """After the last event the answer is 204, on which a browser gives up; beyond it, an error."""
    async with served(tmp_path) as (h, client):
        batch = await h.submit(chats(2))
        _ = await h.attach(batch.batch_id)
        last = (await h.kept(batch.batch_id)).last_sequence
        path = f"/v1/batches/{batch.batch_id}/events"
        assert (await client.get(path, headers={"last-event-id": str(last)})).status_code == 204
        for answer in (
            await client.get(path, params={"after": last + 1}),
            await client.get(path.replace("events", "results"), params={"after": last + 1}),
        ):
            assert answer.status_code == 416
            assert answer.json()["error"]["code"] == "sequence_out_of_range"


async def test_a_file_that_is_no_batch_has_no_events_but_says_so(tmp_path: Path) -> None:
    """One event without a number: the batch, and what is wrong with its file."""
    async with served(tmp_path) as (_, client):
        batch_id = await create(client, "{")
        ((number, kind, value),) = await events(client, batch_id)
        assert (number, kind, value["status"]) == (None, "batch", "failed")
        assert value["errors"]["data"][0]["line"] == 1
        page = (await client.get(f"/v1/batches/{batch_id}/results")).json()
        assert page == {"object": "list", "data": [], "has_more": False, "last_sequence": 0}
        assert (await client.get(f"/v1/batches/{batch_id}/events?after=3")).status_code == 416


async def test_silence_is_filled_with_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no proxy takes the connection for dead."""
    monkeypatch.setattr("unisono.edge.rest.kept.KeptRoutes.__init__.__kwdefaults__", {"heartbeat_s": 0.05})
    async with served(tmp_path, pass_s=0.01) as (h, client):
        batch = await h.submit([chat("a", "[[tokens=60]]")])
        async with client.stream("GET", f"/v1/batches/{batch.batch_id}/events") as answer:
            sse = Sse(answer)
            assert [kind async for _, kind, _ in sse.read()][-1] == "summary"
    assert sse.comments >= 3


async def test_a_reader_that_reads_nothing_slows_only_itself(tmp_path: Path) -> None:
    """The batch ends, others read all of it, and what waits for that reader is no more than a socket holds."""
    async with served(tmp_path, pass_s=0.001) as (h, client):
        batch = await h.submit([chat(f"i{n}", f"[[say={'word ' * 400}{n}]]", num_predict=2000) for n in range(200)])
        host, port = h.http_url.removeprefix("http://").split(":")
        idle = socket.create_connection((host, int(port)))
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.sendall(f"GET /v1/batches/{batch.batch_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        seen = await h.attach(batch.batch_id)
        assert len(seen.results) == 200
        assert len(await listed(client, batch.batch_id)) == 200
        found = await events(client, batch.batch_id)
        assert len([kind for _, kind, _ in found if kind == "result"]) == 200
        idle.close()


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("after=x", "after"),
        ("after=-1", "after"),
        ("after=1.5", "after"),
        ("after=²", "after"),
        ("after=" + "9" * 30, "after"),
        ("after=1&after=2", "after"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=1&limit=1", "limit"),
    ],
)
async def test_what_is_no_place(tmp_path: Path, query: str, param: str) -> None:
    """It is refused, with the parameter."""
    async with served(tmp_path) as (h, client):
        batch = await h.submit(chats(1))
        for path in ("results", "events"):
            if path == "events" and param == "limit":
                continue
            answer = await client.get(f"/v1/batches/{batch.batch_id}/{path}?{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert (await client.get(f"/v1/batches/batch_none/{path}")).status_code == 404
        answer = await client.get(f"/v1/batches/{batch.batch_id}/events", headers={"last-event-id": "x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


async def test_a_batch_that_is_deleted_is_gone_here_too(tmp_path: Path) -> None:
    """By gRPC, since OpenAI has no call for it."""
    async with served(tmp_path) as (h, client):
        batch = await h.submit(chats(1))
        _ = await h.attach(batch.batch_id)
        _ = await h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch.batch_id))
        for path in ("", "/results", "/events"):
            assert (await client.get(f"/v1/batches/{batch.batch_id}{path}")).status_code == 404


async def test_a_batch_of_a_file_that_is_deleted_is_gone_and_its_files_stay(tmp_path: Path) -> None:
    """A file is a thing of its own."""
    async with served(tmp_path) as (h, client):
        batch_id = await create(client, line("a"))
        ended = await until(client, batch_id, "completed")
        _ = await h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch_id))
        for path in ("", "/results", "/events"):
            assert (await client.get(f"/v1/batches/{batch_id}{path}")).status_code == 404
        assert (await client.post(f"/v1/batches/{batch_id}/retry")).status_code == 404
        assert (await client.get("/v1/batches")).json()["data"] == []
        content = await client.get(f"/v1/files/{ended['output_file_id']}/content")
        assert json.loads(content.text)["custom_id"] == "a"


async def test_a_service_that_stops_ends_its_streams(tmp_path: Path) -> None:
    """Soon, and without a defect: of a kept batch, and of one that lives on its call. The next service goes on."""
    async with httpx.AsyncClient(timeout=LIMIT_S) as client:
        async with house(keeps_in=tmp_path, with_http=True, pass_s=0.01, settings={"drain": 0}) as h:
            batch = await h.submit([chat("a", "Go on [[tokens=300]]", num_predict=300)])
            url = f"/v1/batches/{batch.batch_id}/events"
            stream = client.stream("GET", h.http_url + url)
            answer = await stream.__aenter__()
            reading = asyncio.ensure_future(all_of(answer))
            body = {"model": "fake", "requests": [{"prompt": LONG}]}
            calling = asyncio.ensure_future(client.post(f"{h.http_url}/api/batch/generate", json=body))
            await h.until_running(1)
            started_s = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started_s < LIMIT_S / 2
        got = await reading
        assert got
        assert "event: summary" not in got
        _ = await asyncio.gather(calling, return_exceptions=True)
        if not isinstance(calling.exception(), httpx.HTTPError):
            assert calling.result().json()["responses"][0]["reason"] == "SHUTTING_DOWN"
        await stream.__aexit__(None, None, None)
        last = int(got.rpartition("id: ")[2].split("\n")[0])
        async with house(keeps_in=tmp_path, with_http=True) as h:
            rest = await client.get(h.http_url + url, headers={"last-event-id": str(last)})
            assert rest.text.startswith(f"id: {last + 1}\n")
            assert "event: summary" in rest.text


async def all_of(answer: httpx.Response) -> str:
    """What comes, until the connection ends in whatever way."""
    got = ""
    try:
        async for text in answer.aiter_text():
            got += text
    except httpx.HTTPError:
        pass
    return got
