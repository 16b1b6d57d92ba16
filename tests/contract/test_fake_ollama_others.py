"""The stand-in's pings, costs, other clients and counters, as a real server was read and measured to have them."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import FakeModel, FakeOllama


def chat(text: str, **more: Any) -> dict[str, Any]:
    """A chat of one message."""
    return {"model": "fake", "messages": [{"role": "user", "content": text}], "stream": False, **more}


def client_of(fake: FakeOllama) -> httpx.AsyncClient:
    """A client with as many connections as a test may want."""
    return httpx.AsyncClient(base_url=fake.url, timeout=20, limits=httpx.Limits(max_connections=None))


async def load(client: httpx.AsyncClient) -> None:
    """Load the model."""
    await client.post("/api/chat", json={"model": "fake", "messages": []})


async def ask(fake: FakeOllama, client: httpx.AsyncClient, *texts: str) -> list[asyncio.Task[httpx.Response]]:
    """Sends chats, each only when the server has begun with the one before."""
    tasks: list[asyncio.Task[httpx.Response]] = []
    for text in texts:
        began = fake.in_flight
        tasks.append(asyncio.create_task(client.post("/api/chat", json=chat(text))))
        await fake.wait_for(lambda f: f.in_flight == began + 1)  # noqa: B023 - waited for here
    return tasks


# Pings.


async def test_requests_ping_in_turn_before_they_get_a_slot() -> None:
    """Eight requests that come together have their slots a ping apart, though eight are free."""
    async with FakeOllama(num_parallel=8) as fake, client_of(fake) as client:
        await load(client)
        fake.health_s = 0.005
        await asyncio.gather(*(client.post("/api/chat", json=chat(f"{n} [[tokens=1]]")) for n in range(8)))
        slots = sorted(record.slot_ns or 0 for record in fake.requests[1:])
        assert min(after - before for before, after in pairwise(slots)) >= 4e6


async def test_order_at_the_socket_is_not_quite_order_at_the_runner() -> None:
    """Of many that wait for their ping, most keep their place, and some are overtaken."""
    async with FakeOllama(num_parallel=16) as fake, client_of(fake) as client:
        await load(client)
        fake.health_s = 0.002
        fake.hold_passes()
        tasks = await ask(fake, client, *(f"{n} [[tokens=1]]" for n in range(12)))
        fake.release_passes()
        await asyncio.gather(*tasks)
        came = [record.id for record in fake.requests[1:]]
        began = [record.id for record in sorted(fake.requests[1:], key=lambda record: record.slot_ns or 0)]
        assert came == sorted(came)
        assert began != came
        assert sorted(began) == came
        assert sum(one == other for one, other in zip(sorted(came), began, strict=True)) >= 4


async def test_one_that_gives_up_its_turn_keeps_nobody() -> None:
    """Clients that go away while they wait for a ping, or ping, let the next one go on."""
    async with FakeOllama(num_parallel=8) as fake, client_of(fake) as client:
        await load(client)
        fake.health_s = 0.02
        tasks = await ask(fake, client, "pinging", "waiting", "[[say=last]]")
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        assert (await tasks[2]).json()["message"]["content"] == "last"


# Costs.


async def test_a_pass_costs_more_with_more_members() -> None:
    """A pass with eight members lasts their share longer than one with a single member."""
    async with FakeOllama(num_parallel=8, pass_s=0.001, member_s=0.004) as fake, client_of(fake) as client:
        await load(client)
        for texts in (["alone [[tokens=3]]"], [f"{n} [[tokens=3]]" for n in range(8)]):
            fake.hold_passes()
            tasks = [asyncio.create_task(client.post("/api/chat", json=chat(text))) for text in texts]
            await fake.wait_for(lambda f: f.busy_slots == len(texts))  # noqa: B023 - waited for here
            fake.release_passes()
            await asyncio.gather(*tasks)
        lasted: dict[int, list[float]] = {}
        for one in fake.pass_log:
            lasted.setdefault(len(one.requests), []).append((one.ended_ns - one.started_ns) / 1e9)
        assert sorted(lasted) == [1, 8]
        assert min(lasted[1]) >= 0.005
        assert min(lasted[8]) >= 0.033
        assert min(lasted[8]) > min(lasted[1])


@pytest.mark.parametrize(("own", "is_similar"), [(13, True), (400, False)])
async def test_a_slot_is_chosen_by_its_prefix_only_above_a_tenth(own: int, *, is_similar: bool) -> None:
    """A prompt goes to the slot that holds more than a tenth of it; otherwise to the one unused for longest."""
    async with FakeOllama(num_parallel=3) as fake, client_of(fake) as client:
        start = "rule " * 24
        for text in (start, "beta " * 60, "gamma " * 60):
            await client.post("/api/chat", json=chat(text + "[[tokens=1]]"))
        await client.post("/api/chat", json=chat("beta " * 60 + "[[tokens=1]]"))
        await client.post("/api/chat", json=chat("rule " * 24 + "own " * own + "[[tokens=1]]"))
        first, second, third, again, last = fake.requests
        assert again.slot == second.slot
        if is_similar:
            assert last.slot == first.slot
            assert last.prompt_tokens_cached >= 24
        else:
            # Unused for longest is the first one too: make another one that, and ask once more.
            await client.post("/api/chat", json=chat("rule " * 24 + "other " * own + "[[tokens=1]]"))
            assert fake.requests[-1].slot == third.slot
            assert fake.requests[-1].prompt_tokens_cached < 24


# Drafts.


@pytest.mark.parametrize(
    ("right", "drafted", "asked", "passes"),
    [
        pytest.param((2,), 2, {"num_predict": 10}, [1, 3, 3, 3], id="three a pass"),
        pytest.param((2,), 2, {"num_predict": 9}, [1, 3, 3, 2], id="no more than are wanted"),
        pytest.param((2, 0, 1), 2, {"num_predict": 10}, [1, 3, 1, 2, 3], id="some are wrong"),
        pytest.param((2,), 1, {"num_predict": 5}, [1, 2, 2], id="no more than are drafted"),
        pytest.param((2,), 0, {"num_predict": 4}, [1, 1, 1, 1], id="not asked for"),
        pytest.param((), 2, {"num_predict": 4}, [1, 1, 1, 1], id="a model that cannot"),
    ],
)
async def test_drafted_tokens_that_are_right_come_from_one_pass(
    right: tuple[int, ...], drafted: int, asked: dict[str, int], passes: list[int]
) -> None:
    """Each has a line of its own, written when its pass is over; the pass of the prompt gives one token."""
    models = [FakeModel(name="fake", drafts=right)]
    async with FakeOllama(models) as fake, client_of(fake) as client:
        fake.hold_passes()
        options = {**asked, "draft_num_predict": drafted}
        task = asyncio.create_task(client.post("/api/chat", json=chat("x", stream=True, options=options)))
        await fake.wait_for(lambda f: f.busy_slots == 1)
        lines = [0]
        for _ in passes:
            await fake.step()
            lines.append(fake.requests[-1].lines)
        fake.release_passes()
        answer = await task
        # The last pass is followed by the done line in the same moment.
        lines[-1] -= 1
        assert [after - before for before, after in pairwise(lines)] == passes
        *said, done = (json.loads(line) for line in answer.text.splitlines())
        # Tokens of one pass are of one moment; those of two are not, as nobody steps so fast.
        times = [float(line["created_at"].rstrip("Z").rpartition(":")[2]) for line in said]
        within = [abs(after - before) < 1e-6 for before, after in pairwise(times)]
        assert within == [one for count in passes for one in (*[True] * (count - 1), False)][:-1]
        assert (done["eval_count"], done["done_reason"]) == (asked["num_predict"], "length")
        assert fake.passes == len(passes)
        assert {len(one.requests) for one in fake.pass_log} == {1}


async def test_drafts_end_with_the_answer() -> None:
    """The end token may be a drafted one, and counts; a runner that dies in a pass says no more of its drafts."""
    models = [FakeModel(name="fake", drafts=(2,))]
    async with FakeOllama(models) as fake, client_of(fake) as client:
        options = {"draft_num_predict": 2}
        done = (await client.post("/api/chat", json=chat("x [[tokens=5]]", options=options))).json()
        assert (done["eval_count"], done["done_reason"], fake.passes) == (6, "stop", 3)
        died = await client.post("/api/chat", json=chat("x [[tokens=9]] [[crash=3]]", stream=True, options=options))
        assert len(died.text.splitlines()) == 3 + 1
        assert "error" in died.text.splitlines()[-1]


# Other clients.


async def test_a_foreign_client_holds_slots_until_it_leaves() -> None:
    """With three of four slots taken one is left; afterwards all are."""
    async with FakeOllama(num_parallel=4) as fake, client_of(fake) as client:
        await load(client)
        guest = await fake.foreign(slots=3)
        assert (guest.holding, fake.busy_slots) == (3, 3)
        fake.hold_passes()
        tasks = await ask(fake, client, *(f"{n} [[tokens=2]]" for n in range(4)))
        assert (fake.busy_slots, fake.waiting) == (4, 3)
        guest.leave()
        guest.leave()
        assert (guest.holding, fake.busy_slots, fake.waiting) == (0, 4, 0)
        fake.release_passes()
        assert {task.status_code for task in await asyncio.gather(*tasks)} == {200}
        assert len(fake.requests_to("/foreign")) == 0
        assert [runner.refs for runner in fake.runners] == [0]


async def test_a_foreign_client_that_speaks_shares_the_passes() -> None:
    """Its tokens are computed beside ours, and it is request 0 of the pass log."""
    async with FakeOllama(num_parallel=4, pass_s=0.0005) as fake, client_of(fake) as client:
        guest = await fake.foreign(slots=2, speaks=True)
        await client.post("/api/chat", json=chat("x [[tokens=5]]"))
        ours = [one for one in fake.pass_log if 1 in one.requests]
        assert len(ours) == 6
        assert all(one.requests.count(0) == 2 for one in ours)
        guest.leave()
        assert fake.busy_slots == 0


async def test_a_foreign_reload_comes_between_two_requests() -> None:
    """It waits for those that use the runner; whoever comes with the former context afterwards loads again."""
    async with FakeOllama(num_parallel=2) as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        (first,) = await ask(fake, client, "a [[tokens=3]]")
        other = asyncio.create_task(fake.foreign_reload(num_ctx=512))
        await fake.wait_for(lambda f: f.busy_slots == 1)
        assert (fake.loads, other.done()) == (1, False)
        fake.release_passes()
        await asyncio.gather(first, other)
        assert (fake.loads, [runner.num_ctx for runner in fake.runners]) == (2, [512])
        assert (await client.post("/api/chat", json=chat("b [[tokens=3]]"))).status_code == 200
        assert (fake.loads, [runner.num_ctx for runner in fake.runners]) == (3, [4096])


# Counters.


async def test_its_counters_can_be_read_from_another_process() -> None:
    """Passes, prompt tokens that were computed, and loads, in the form of llama.cpp's /metrics."""
    async with FakeOllama() as fake, client_of(fake) as client:
        await client.post("/api/chat", json=chat("x [[tokens=5]]"))
        lines = dict(line.split() for line in (await client.get("/metrics")).text.splitlines())
        assert lines == {
            "llamacpp:n_decode_total": "6",
            "llamacpp:prompt_tokens_total": str(fake.prompt_tokens_computed),
            "ollama:loads_total": "1",
        }
