"""Who calls the service by OpenAI's Batch API: uploads a file, makes a batch of it, polls it and downloads its files.

That API has no name of the caller's for a request. So whoever lost the answer to a create looks first whether a batch
with its metadata is there, as such clients have to; and a file whose upload was not answered is uploaded again.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx

from tests.faults.backend import MODEL
from tests.faults.callers import Caller, calls_by_item
from tests.faults.history import COMPLETED, End, History, tokens_of
from tests.faults.service import AGAIN_S
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb

_URL = "/v1/chat/completions"
# In which order a batch passes through these.
_STATUSES = ("validating", "in_progress", "finalizing", "completed")
_LIMIT_S = 20.0
# Of a service that has no room, or is going: it is asked again.
_LATER = (429, 503, 507)


class Uploader(Caller):
    """As `Caller`, over HTTP; `target` is HOST:PORT."""

    letter = "f"

    def __init__(self, target: str, *, items: int, letter: str = "", settle_s: float = 0.0) -> None:
        """`settle_s`: how long a request may go on whose answer was lost, where its service was not killed."""
        super().__init__(target, items=items, letter=letter)
        self._settle_s = settle_s
        # The files of each batch that were told, and what was in them: the input, and the results.
        self.files: dict[str, bytes] = {}
        # Times that no answer came.
        self.lost = 0

    async def one(self, history: History) -> None:
        """One batch, to its end."""
        content = _lines(history.name, self.items)
        file_id = await self._upload(content)
        promise("no loss", await self._content(file_id) == content, f"{history.name}: its file is another one")
        await self._create(history, file_id)
        place = 0
        while True:
            batch = await self._json("GET", f"/v1/batches/{history.batch_id}")
            status = batch["status"]
            promise("well", status in _STATUSES, f"{history.name}: {status}, {batch['errors']}")
            promise("monotone", _STATUSES.index(status) >= place, f"{history.name}: {status} again")
            place = _STATUSES.index(status)
            counts = batch["request_counts"]
            history.progress.append(counts["completed"] + counts["failed"])
            if status == _STATUSES[-1]:
                break
            await asyncio.sleep(0.05)
        for kind in ("output_file_id", "error_file_id"):
            if batch[kind] is not None:
                history.events += (await self._content(batch[kind])).splitlines()
        history.ends = [_end(line) for line in history.events]
        history.over_at.append(len(history.events))
        history.counters.update(accepted=counts["total"], completed=counts["completed"], failed=counts["failed"])

    async def finish(self, stub: Any) -> None:
        """All is over: the files are read again, and what gRPC says of the same batches."""
        for file_id, content in self.files.items():
            promise("no loss", await self._content(file_id) == content, f"the file {file_id} is another one")
        for history in self.histories:
            batch = await self._json("GET", f"/v1/batches/{history.batch_id}")
            for kind in ("output_file_id", "error_file_id"):
                if batch[kind] is not None:
                    history.again += (await self._content(batch[kind])).splitlines()
            calls = await calls_by_item(stub, history.batch_id)
            promise("complete", set(calls) == history.wanted, f"{history.name}: gRPC has other items")
            history.ends = [replace(end, calls=calls[end.item_id]) for end in history.ends]
            kept = (await stub.GetBatch(pb.GetBatchRequest(batch_id=history.batch_id))).batch
            same = kept.counts.completed == history.counters["completed"]
            promise("accounted", same, f"{history.name}: gRPC counts {kept.counts}")

    # -- Requests ----------------------------------------------------------------------------------------------

    async def _upload(self, content: bytes) -> str:
        found = await self._json(
            "POST", "/v1/files", files={"file": ("requests.jsonl", content)}, data={"purpose": "batch"}
        )
        promise("no loss", found["bytes"] == len(content), found)
        self.files[found["id"]] = content
        return str(found["id"])

    async def _create(self, history: History, file_id: str) -> None:
        wanted = {"name": history.name}
        body = {"input_file_id": file_id, "endpoint": _URL, "completion_window": "24h", "metadata": wanted}
        while not history.ids:
            answer = await self._try("POST", "/v1/batches", json=body)
            if answer is not None:
                history.ids.append(answer["id"])
                continue
            # It may be there all the same.
            await asyncio.sleep(self._settle_s)
            listed = await self._json("GET", "/v1/batches", params={"limit": "5"})
            history.ids += [one["id"] for one in listed["data"] if one["metadata"] == wanted]

    async def _content(self, file_id: str) -> bytes:
        while True:
            response = await self._ask("GET", f"/v1/files/{file_id}/content")
            if response is not None:
                return response.content

    async def _json(self, method: str, path: str, **more: Any) -> Any:
        while True:
            found = await self._try(method, path, **more)
            if found is not None:
                return found

    async def _try(self, method: str, path: str, **more: Any) -> Any:
        response = await self._ask(method, path, **more)
        return None if response is None else response.json()

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response | None:
        """An answer that is none of an error; None: there was no answer, and a moment has passed."""
        try:
            # Made anew for each request; certificates would be read each time.
            async with httpx.AsyncClient(base_url=f"http://{self.target}", timeout=_LIMIT_S, verify=False) as client:
                response = await client.request(method, path, **more)
        except httpx.TransportError:
            self.lost += 1
            await asyncio.sleep(AGAIN_S)
            return None
        # What was taken ends on a full disk too, and its caller comes with the next file.
        is_full = response.status_code == 400 and "are kept for results" in response.text
        if response.status_code in _LATER or is_full:
            await asyncio.sleep(5 * AGAIN_S)
            return None
        promise("no loss", response.status_code == 200, f"{method} {path}: {response.status_code} {response.text}")
        return response


def _lines(name: str, count: int) -> bytes:
    lines = [
        {
            "custom_id": f"i{number}",
            "method": "POST",
            "url": _URL,
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"{name} i{number}"}],
                "max_tokens": tokens_of(f"i{number}"),
            },
        }
        for number in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _end(line: bytes) -> End:
    told = json.loads(line)
    response = told["response"]
    if response is not None and response["status_code"] == 200:
        tokens = response["body"]["usage"]["completion_tokens"]
        return End(item_id=told["custom_id"], state=COMPLETED, tokens=tokens)
    error = told["error"] if response is None else response["body"]["error"]
    return End(item_id=told["custom_id"], state="FAILED", reason=str(error["code"]))
