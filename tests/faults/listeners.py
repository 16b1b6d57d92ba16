"""Who follows batches by server-sent events: asks again from the last id that came, as a browser does.

Only whole events count: what came of one that was cut is thrown away.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx

from tests.faults.callers import Caller, dial, results_of, submit
from tests.faults.history import COMPLETED, End, History
from tests.faults.service import AGAIN_S
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

# Nothing is heard for so long: the connection may be gone without a word.
_SILENT_S = 20.0
_END = b"\n\n"


class Listener(Caller):
    """As `Caller`: submits by gRPC, and follows by HTTP, at HOST:PORT."""

    letter = "e"

    def __init__(self, target: str, http: str, *, items: int, letter: str = "") -> None:
        super().__init__(target, items=items, letter=letter)
        self.http = http

    async def one(self, history: History) -> None:
        """One batch, to its end."""
        async with dial(self.target) as channel:
            await submit(pb_grpc.BatchInferenceStub(channel), history)
        while not history.is_over:
            await self.listen(history)

    async def listen(self, history: History) -> None:
        """One connection that goes on from the last event that came, for as long as it lasts."""
        connection = history.connect()
        headers = {"Last-Event-ID": str(connection.after)} if connection.after else {}
        path = f"http://{self.http}/v1/batches/{history.batch_id}/events"
        try:
            async with (
                httpx.AsyncClient(timeout=_SILENT_S, verify=False) as client,
                client.stream("GET", path, headers=headers) as response,
            ):
                promise("no loss", response.status_code == 200, f"{path}: {response.status_code}")
                buffer = b""
                async for data in response.aiter_raw():
                    *whole, buffer = (buffer + data).split(_END)
                    for text in whole:
                        _heard(text, history)
        except httpx.TransportError:
            await asyncio.sleep(AGAIN_S)

    async def finish(self, stub: Any) -> None:
        """All is over: the events once more, and the same results by gRPC."""
        for history in self.histories:
            again = History(history.name, set(history.wanted), ids=[history.batch_id])
            await self.listen(again)
            history.again = again.events
            for event in await results_of(stub, history.batch_id):
                history.pages.append((event.result.item_id, b"%d" % event.sequence))


def _heard(text: bytes, history: History) -> None:
    fields = dict(_fields(text))
    if "id" not in fields:
        # A heartbeat.
        return
    number, kind, told = int(fields["id"]), fields["event"], json.loads(fields["data"])
    history.connections[-1].numbers.append(number)
    history.events.append(text)
    promise("stable", told["sequence"] == number, f"{history.name}: event {number} says {told['sequence']}")
    if kind == "result":
        item_id = told["custom_id"]
        tokens = told["response"]["body"]["usage"]["completion_tokens"] if told["state"] == COMPLETED.lower() else 0
        history.ends.append(End(item_id=item_id, state=told["state"].upper(), tokens=tokens))
        history.results[item_id] = b"%d" % number
    elif kind == "summary":
        history.over_at.append(len(history.events))
        counts = told["summary"]["report"]["counts"]
        history.counters.update(accepted=int(counts["accepted"]), completed=int(counts["completed"]))
        history.counters["last_sequence"] = number


def _fields(text: bytes) -> Iterator[tuple[str, str]]:
    for line in text.decode().splitlines():
        name, found, value = line.partition(":")
        if found and name:
            yield name, value.strip()
