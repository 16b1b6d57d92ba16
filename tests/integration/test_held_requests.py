"""A request that is held: which byte is missing, and that its holding is in no duration."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.fakes.ollama import RequestRecord
from tests.fakes.ollama import api as fake_api
from tests.fakes.ollama import http as fake_http
from tests.fakes.ollama import runner as fake_runner
from tests.fakes.ollama import turn as fake_turn
from tests.fakes.ollama import wire as fake_wire
from tests.integration.service import LIMIT_S, House, Reading, Seen, chat, embed, generate, house
from unisono import bootstrap
from unisono._generated.unisono.v1 import item_pb2
from unisono.adapters.held import exchange

HOLD_S = 30.0
# More than anything else takes here, and far less than the hold.
QUICK_S = 10.0
NAMES = ("running", "waiting", "held")
SCHEMA = '{"type": "object", "properties": {"answer": {"type": "string"}}}\n'


def held_of(h: House) -> list[RequestRecord]:
    """Requests of which all has come but the last byte."""
    return [one for one in h.fake.requests if one.body_bytes == int(one.headers.get("content-length", 0)) - 1]


@asynccontextmanager
async def last_is_held(h: House, *items: item_pb2.Item) -> AsyncGenerator[list[Seen], None]:
    """Each is a batch of its own: one has the only slot, one waits at the backend, and the third is held.

    What became of them is there at the end.
    """
    h.fake.hold_passes()
    calls: list[Reading] = []
    for item, (busy, waiting, held) in zip(items, ((1, 0, 0), (1, 1, 0), (1, 1, 1)), strict=True):
        calls.append(h.run_batch([item], model=item.model or "fake"))
        await h.fake.wait_for(
            lambda fake: (fake.busy_slots, fake.waiting, len(held_of(h))) == (busy, waiting, held),  # noqa: B023 - waited for here
            LIMIT_S,
        )
    seen: list[Seen] = []
    yield seen
    h.fake.release_passes()
    seen += [await call.to_end() for call in calls]


def with_schema() -> item_pb2.Item:
    """A question whose schema ends with a newline."""
    item = chat("held", "Question")
    item.chat.format.json_schema = SCHEMA
    return item


def with_tool() -> item_pb2.Item:
    """A question with a tool whose parameters end with a newline."""
    item = chat("held", "Question", model="fake-tools")
    item.chat.tools.append(item_pb2.Tool(name="weather", description="The weather", parameters_json=SCHEMA))
    return item


@pytest.mark.parametrize(
    ("before", "held"),
    [
        pytest.param(chat("before"), chat("held", "Question\n"), id="chat"),
        pytest.param(chat("before"), with_schema(), id="schema"),
        pytest.param(chat("before", model="fake-tools"), with_tool(), id="tool"),
        pytest.param(generate("before", "Once"), generate("held", "Once upon\n"), id="generate"),
        pytest.param(chat("before"), chat("held", extra_options_json='{"mirostat": 1}\n'), id="extra options"),
        pytest.param(embed("before", "one"), embed("held", "two\n"), id="embed"),
    ],
)
async def test_the_held_byte_is_the_brace(before: item_pb2.Item, held: item_pb2.Item) -> None:
    """While a request is held the backend cannot begin with it: a JSON value is whole with its brace.

    A newline after the brace would hold back nothing but the answer.
    """
    async with house(num_parallel=1, settings={"slots": 1}) as h:
        async with last_is_held(h, before, before, held) as seen:
            (request,) = held_of(h)
            assert (request.started_ns, request.slot_ns) == (None, None)
        assert [set(one.states().values()) for one in seen] == [{"COMPLETED"}] * 3
        assert h.work[-1].id == request.id
        assert all(one.started_ns == one.last_byte_ns for one in h.work)


class LaterClock:
    """The module `time`, some seconds on."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        """Seconds, later."""
        return time.monotonic() + self.ahead_s

    def monotonic_ns(self) -> int:
        """Nanoseconds, later."""
        return time.monotonic_ns() + round(self.ahead_s * 1e9)

    def time_ns(self) -> int:
        """Nanoseconds since 1970, later."""
        return time.time_ns() + round(self.ahead_s * 1e9)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


async def test_half_a_minute_of_holding_is_in_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's clock starts with a request's headers; what is reported starts with its last byte.

    Nobody waits: the clocks of the service and of the stand-in are put on.
    """
    clock = LaterClock()
    for module in (fake_api, fake_http, fake_runner, fake_turn, fake_wire, bootstrap, exchange):
        monkeypatch.setattr(module, "time", clock)
    async with house(num_parallel=1, settings={"slots": 1}, pass_s=0.002) as h:
        _ = await h.run([chat("warm", num_predict=1)])
        async with last_is_held(h, *(chat(name, num_predict=5) for name in NAMES)) as seen:
            clock.ahead_s = HOLD_S
            received = h.fake.received
        assert h.fake.received == received, "it was not sent anew"
        running, _, held = (one.results[name].timings for one, name in zip(seen, NAMES, strict=True))
        record = h.work[-1]
        assert (record.last_byte_ns or 0) - record.headers_ns >= HOLD_S * 1e9
        for name in ("load", "slot_wait", "prompt_eval", "eval", "first_token", "total"):
            assert getattr(held, name).ToNanoseconds() < QUICK_S * 1e9, name
        assert held.queued.ToNanoseconds() >= HOLD_S * 1e9
        # What the backend itself was so long at is reported.
        assert running.total.ToNanoseconds() >= HOLD_S * 1e9
        assert running.prompt_eval.ToNanoseconds() + running.slot_wait.ToNanoseconds() >= HOLD_S * 1e9
