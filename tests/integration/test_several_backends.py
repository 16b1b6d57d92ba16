"""Several backends behind one service: which answers what, and what it means that one of them is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.fakes.ollama import FakeModel, FakeOllama, Fault, FaultKind
from tests.fakes.otlp import OtlpReceiver
from tests.integration.service import (
    LIMIT_S,
    WORK_PATHS,
    House,
    Seen,
    chat,
    chats,
    embed,
    house,
    is_load,
    refusal_of,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.app import failover
from unisono.bootstrap import running, usable_model
from unisono.config import SettingError, Settings

SHARED, ONLY_A, ONLY_B = FakeModel(name="fake"), FakeModel(name="only-a"), FakeModel(name="only-b")
NAMES = "abcdef"


@asynccontextmanager
async def several(
    *models: Sequence[FakeModel], away: str = "", settings: dict[str, Any] | None = None, **fake_settings: Any
) -> AsyncGenerator[tuple[House, list[FakeOllama]], None]:
    """A service over backends called a, b, …, each with models of its own; those in `away` are so from the start."""
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeOllama(mine, **fake_settings)) for mine in models]
        for name, fake in zip(NAMES, fakes, strict=False):
            if name in away:
                await fake.go_away()
        listed = ", ".join(f"{name}={fake.url}" for name, fake in zip(NAMES, fakes, strict=False))
        h = await stack.enter_async_context(house(settings={"backends": listed, "slots": 4, **(settings or {})}))
        yield h, fakes


def placed(seen: Seen) -> dict[str, str]:
    """The backend of each model of a batch."""
    return {planned.model.removesuffix(":latest"): planned.backend for planned in seen.of("group_planned")}


def work_of(fake: FakeOllama) -> list[Any]:
    """Requests for answers that a backend has received whole."""
    return [r for r in fake.requests if r.path in WORK_PATHS and r.last_byte_ns is not None and not is_load(r.body)]


async def load_on(fake: FakeOllama, model: str = "fake") -> None:
    """Another client had a model loaded there."""
    (await fake.foreign(slots=1, model=model)).leave()


# -- Which one ---------------------------------------------------------------------------------------------------


async def test_a_model_goes_to_the_backend_that_has_it() -> None:
    """One batch may use models of several; its results come as of one."""
    async with several([SHARED, ONLY_A], [SHARED, ONLY_B]) as (h, (a, b)):
        items = [chat(f"i{n}", model=("only-a", "only-b")[n % 2]) for n in range(8)]
        seen = await h.run(items)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert placed(seen) == {"only-a": "a", "only-b": "b"}
        assert (len(work_of(a)), len(work_of(b))) == (4, 4)


async def test_where_it_is_loaded_before_the_first_in_the_configuration() -> None:
    """All items of a model go to one backend."""
    async with several([SHARED], [SHARED]) as (h, (a, b)):
        await load_on(b)
        seen = await h.run(chats(6))
        assert placed(seen) == {"fake": "b"}
        assert (a.loads, len(work_of(a)), len(work_of(b))) == (0, 0, 6)


async def test_the_first_in_the_configuration_where_nothing_speaks_for_another() -> None:
    """And the next batch stays where the model is."""
    async with several([SHARED], [SHARED]) as (h, (_, b)):
        for _ in range(2):
            assert placed(await h.run(chats(2))) == {"fake": "a"}
        assert not b.loads


async def test_the_least_busy_where_both_have_it_loaded() -> None:
    """So that the other computes beside it."""
    async with several([SHARED], [SHARED], pass_s=0.005) as (h, (a, b)):
        for fake in (a, b):
            await load_on(fake)
        long = h.run_batch(chats(4, num_predict=200))
        _ = await long.until("released")
        assert placed(await h.run(chats(2, num_predict=2))) == {"fake": "b"}
        await h.cancel(long.seen.batch_id)
        assert placed(await long.to_end()) == {"fake": "a"}


async def test_a_model_that_is_being_loaded_is_not_loaded_elsewhere_too() -> None:
    """What is at work on a backend counts as loaded there, from the moment at which its items are on the way."""
    async with several([SHARED], [SHARED], load_s=0.2) as (h, (_, b)):
        first = h.run_batch(chats(4))
        _ = await first.until("loading")
        assert placed(await h.run(chats(4))) == {"fake": "a"}
        await first.to_end()
        assert not b.loads


async def test_batches_of_one_model_use_an_idle_backend_too() -> None:
    """Where more items wait than have slots, another backend loads the model: two queues rather than a long one."""
    async with several([SHARED], [SHARED], pass_s=0.005) as (h, (a, b)):
        calls = [h.run_batch(chats(40, num_predict=4)) for _ in range(4)]
        seen = [await call.to_end() for call in calls]
        assert sorted(placed(one)["fake"] for one in seen) == ["a", "a", "b", "b"]
        assert (a.loads, b.loads) == (1, 1)
        assert {state for one in seen for state in one.states().values()} == {"COMPLETED"}


async def test_different_models_are_spread() -> None:
    """A batch with two models that nobody has loaded uses both backends."""
    other = FakeModel(name="other")
    async with several([SHARED, other], [SHARED, other]) as (h, _):
        seen = await h.run([chat(f"i{n}", model=("fake", "other")[n % 2]) for n in range(6)])
        assert placed(seen) == {"fake": "a", "other": "b"}


async def test_a_batch_s_own_limit_counts_on_all_of_them() -> None:
    """max_concurrency is of the batch, not of each backend."""
    async with several([ONLY_A], [ONLY_B], pass_s=0.001) as (h, fakes):
        items = [chat(f"i{n}", model=("only-a", "only-b")[n % 2], num_predict=10) for n in range(12)]
        seen = await h.run(items, max_concurrency=2)
        assert set(seen.states().values()) == {"COMPLETED"}
        spans = [(one.started_ns, one.end_ns) for fake in fakes for one in work_of(fake)]
        moments = sorted([(begun, 1) for begun, _ in spans] + [(ended, -1) for _, ended in spans])
        level = most = 0
        for _, step in moments:
            level += step
            most = max(most, level)
        assert most == 2


async def test_an_item_without_a_model_needs_one_that_is_the_only_one() -> None:
    """On all backends together."""
    async with several([SHARED], [SHARED]) as (h, _):
        assert set((await h.run(chats(2), model="")).states().values()) == {"COMPLETED"}
    for theirs in ([ONLY_A], [SHARED, ONLY_A]):
        async with several([SHARED], theirs) as (h, _):
            (result,) = (await h.run(chats(1), model="")).results.values()
            assert refusal_of(result.error).reason == "MODEL_NOT_FOUND"
            assert "only-a" in result.error.message
    async with several([], [SHARED]) as (h, _):
        assert placed(await h.run(chats(1), model="")) == {"fake": "b"}


async def test_a_model_that_nobody_has() -> None:
    """All are named that were asked."""
    async with several([ONLY_A], [ONLY_B]) as (h, _):
        (result,) = (await h.run(chats(1), model="nosuch")).results.values()
        refusal = refusal_of(result.error)
        assert (refusal.reason, refusal.metadata["model"]) == ("MODEL_NOT_FOUND", "nosuch")
        assert "backends a, b" in refusal.message
        (result,) = (await h.run(chats(1), model="")).results.values()
        assert refusal_of(result.error).reason == "MODEL_NOT_FOUND"


# -- Away --------------------------------------------------------------------------------------------------------


async def test_one_that_is_away_does_not_keep_the_service_from_starting() -> None:
    """Nor does it hold up a model that another has; whoever asks is told that it is away."""
    async with several([SHARED], [SHARED], [ONLY_B], away="ac") as (h, _):
        began = time.monotonic()
        assert placed(await h.run(chats(4))) == {"fake": "b"}
        assert time.monotonic() - began < 1.0
        info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert {one.name: one.reachable for one in info.backends} == {"a": False, "b": True, "c": False}
        models = await h.stub.ListModels(pb.ListModelsRequest())
        assert [one.name for one in models.unreachable] == ["a", "c"]
        assert {(one.backend, one.name) for one in models.models} == {("b", "fake:latest")}
        only = await h.stub.ListModels(pb.ListModelsRequest(backend="c"))
        assert [one.name for one in only.unreachable] == ["c"]


async def test_a_model_that_only_one_that_is_away_may_have_is_waited_for() -> None:
    """It may have it; when it comes back, it is asked."""
    async with several([SHARED], [ONLY_B], away="b") as (h, (_, b)):
        waiting = h.run_batch(chats(2), model="only-b")
        _ = await waiting.until("accepted")
        assert placed(await h.run(chats(2))) == {"fake": "a"}
        await b.come_back()
        seen = await waiting.to_end()
        assert placed(seen) == {"only-b": "b"}
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_one_that_says_nothing_is_waited_for_a_moment_only() -> None:
    """And not at all the next time. Later, when it answers again, it takes part again."""
    async with several([ONLY_A, SHARED], [SHARED]) as (h, (a, b)):
        await load_on(a)
        silence = Fault(FaultKind.DELAY, path="/api/tags", until_released=True, times=None)
        a.faults.add(silence)
        spans = []
        for name in ("fake", "fake:latest"):
            began = time.monotonic()
            assert placed(await h.run(chats(2), model=name)) == {"fake": "b"}
            spans.append(time.monotonic() - began)
        assert 0.2 < spans[0] < 2.0
        assert spans[1] < 0.2
        silence.release()
        a.faults.clear()
        await asyncio.sleep(0.1)
        b.unload_all()
        assert placed(await h.run(chats(2), model="FAKE")) == {"fake": "a"}


async def test_one_that_has_gone_is_not_used_while_another_has_the_model() -> None:
    """Though it was just the right one. When it is back, it is one of them again."""
    async with several([SHARED, ONLY_A], [SHARED]) as (h, (a, _)):
        assert placed(await h.run(chats(2))) == {"fake": "a"}
        await a.go_away()
        seen = await h.run(chats(2))
        assert placed(seen) == {"fake": "b"}
        assert set(seen.states().values()) == {"COMPLETED"}
        # Now its driver has noticed too, and what is remembered of its models is asked again.
        waiting = h.run_batch(chats(1), model="only-a")
        await asyncio.sleep(0.1)
        assert placed(await h.run(chats(2))) == {"fake": "b"}
        await a.come_back()
        assert placed(await waiting.to_end()) == {"only-a": "a"}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is away for a moment only counts as staying away."""
    monkeypatch.setattr(failover, "AWAY_S", 0.3)
    monkeypatch.setattr(failover, "LOOK_S", 0.05)


@pytest.mark.usefixtures("soon")
async def test_one_that_goes_in_the_middle_of_a_batch() -> None:
    """What it has not answered goes on at another that has the model, in a group of its own."""
    async with several([SHARED], [SHARED], pass_s=0.005) as (h, (a, b)):
        call = h.run_batch(chats(24, num_predict=10))
        _ = await call.until("result")
        await a.go_away()
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        first, second = seen.report.groups
        assert (first.group.backend, second.group.backend) == ("a", "b")
        assert first.group.item_count + second.group.item_count == 24
        assert second.group.item_count == len(work_of(b)) == sum(one.group == 1 for one in seen.results.values())
        assert first.fewest_passes <= first.passes.count
        assert second.fewest_passes == max(10, -(-second.group.item_count * 10 // 4))
        told = [one.item_count for one in seen.of("group_planned") if one.backend == "a"]
        assert told == [24, first.group.item_count]
        # Those that were on the way were broken off, and began anew.
        assert sum(one.disturbed + one.attempts - 1 for one in seen.results.values()) in range(4, 9)
        assert seen.report.counts.completed == 24
        assert not h.defects


async def test_the_log_tells_when_one_is_away_and_when_it_is_back() -> None:
    """Once each: its name, what is wrong, how many items wait, and after how long."""
    async with several([ONLY_A], [ONLY_B]) as (h, (a, _)):
        _ = await h.run(chats(2), model="only-a")
        with capture_logs() as lines:
            await a.go_away()
            call = h.run_batch(chats(3), model="only-a")
            _ = await call.until("group_planned")
            await asyncio.sleep(0.3)
            await a.come_back()
            assert set((await call.to_end()).states().values()) == {"COMPLETED"}
        away, back = lines
        assert (away["event"], away["log_level"], away["backend"], away["items_waiting"]) == (
            "backend away",
            "warning",
            "a",
            3,
        )
        assert a.url.removeprefix("http://") in away["error"]
        assert (back["event"], back["log_level"], back["backend"]) == ("backend back", "info", "a")
        assert 0 < back["after_s"] < LIMIT_S


@pytest.mark.usefixtures("soon")
async def test_a_group_that_all_items_left_tells_of_no_runner() -> None:
    """It is not loaded, and what others had seen of the runner is none of its own; nor was it idle for the group."""
    async with several([SHARED], [SHARED], pass_s=0.005) as (h, (a, b)):
        _ = await h.run(chats(6, num_predict=20))
        a.hold_passes()
        call = h.run_batch(chats(6, num_predict=20))
        assert (await call.until("group_planned")).loaded
        _ = await call.until("released")
        await a.go_away()
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        first, second = seen.report.groups
        assert (first.group.item_count, first.group.loaded, second.group.backend) == (0, False, "b")
        told = [(one.item_count, one.loaded) for one in seen.of("group_planned") if one.backend == "a"]
        assert told == [(6, True), (0, False)]
        idle_s = sum(one.slot_time.ToNanoseconds() / 1e9 for one in first.idle)
        assert 0 < idle_s <= 4 * first.duration.ToNanoseconds() / 1e9
        assert b.loads == 1


@pytest.mark.usefixtures("soon")
async def test_a_group_of_which_nothing_went_has_no_figures_of_the_runner() -> None:
    """The one before it has."""
    async with several([SHARED], [SHARED], pass_s=0.005) as (h, (a, _)):
        _ = await h.run(chats(6, num_predict=20))
        waiting = Fault(FaultKind.DELAY, path="/api/chat", until_released=True, times=None, when=is_load)
        a.unload_all()
        a.faults.add(waiting)
        call = h.run_batch(chats(2, num_predict=5))
        _ = await call.until("group_planned")
        await a.wait_for(lambda fake: fake.in_flight > 0)
        await a.go_away()
        seen = await call.to_end()
        first, second = seen.report.groups
        assert (first.group.backend, first.waves, second.group.backend) == ("a", 0, "b")
        assert not first.idle
        assert not first.HasField("duration")


@pytest.mark.usefixtures("soon")
async def test_embeddings_that_wait_for_one_that_is_away() -> None:
    """They go in requests of many items, and go on so elsewhere."""
    model = FakeModel(name="fake-embed", capabilities=("embedding",))
    async with several([model], [model]) as (h, (a, _)):
        for one in (a, a):
            assert placed(await h.run([embed("warm", "x")])) == {"fake-embed": "a"}, one
        a.faults.add(Fault(FaultKind.DELAY, path="/api/embed", until_released=True, times=None))
        call = h.run_batch([embed(f"e{n}", f"text {n}") for n in range(30)])
        await a.wait_for(lambda fake: fake.in_flight > 0)
        await a.go_away()
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert [one.group.backend for one in seen.report.groups] == ["a", "b"]
        assert [one.group.item_count for one in seen.report.groups] == [0, 30]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", ["only there", "required"])
async def test_items_that_cannot_go_elsewhere_wait(how: str) -> None:
    """For a model that nobody else has, or where all were to run at one time on slots that were counted."""
    model = ONLY_A if how == "only there" else SHARED
    fields = {"co_scheduling": pb.CO_SCHEDULING_REQUIRED} if how == "required" else {}
    async with several([model], [SHARED], pass_s=0.005) as (h, (a, b)):
        await load_on(a, model.name)
        call = h.run_batch(chats(4, num_predict=100), model=model.name, **fields)
        await a.wait_for(lambda fake: fake.passes > 20)
        await a.go_away()
        await asyncio.sleep(1.0)
        assert not call.seen.results
        await a.come_back()
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert placed(seen) == {model.name: "a"}
        assert not work_of(b)


@pytest.mark.usefixtures("soon")
async def test_an_item_without_a_model_does_not_go_on_with_another_one() -> None:
    """What was the only model when it was planned is what it waits for."""
    async with several([SHARED], [ONLY_B], away="b", pass_s=0.005) as (h, (a, b)):
        call = h.run_batch(chats(2, num_predict=100), model="")
        await a.wait_for(lambda fake: fake.passes > 20)
        await b.come_back()
        await a.go_away()
        await asyncio.sleep(1.0)
        assert not call.seen.results
        await a.come_back()
        assert placed(await call.to_end()) == {"fake": "a"}
        assert not work_of(b)


@pytest.mark.usefixtures("soon")
async def test_items_that_moved_keep_their_limits() -> None:
    """An attempt that was used up before is not given back."""
    async with several([SHARED], [SHARED], pass_s=0.005) as (h, (a, b)):
        busy = Fault(FaultKind.ANSWER, path="/api/chat", when=lambda body: not is_load(body), status=500, times=None)
        a.faults.add(busy)
        b.faults.add(busy)
        call = h.run_batch(chats(1, num_predict=5), max_attempts=2)
        await a.wait_for(lambda _: any(one.body and not is_load(one.body) for one in work_of(a)))
        await a.go_away()
        (result,) = (await call.to_end()).results.values()
        assert (result.attempts, len(work_of(a)), len(work_of(b))) == (2, 1, 1)
        assert refusal_of(result.error).metadata["backend"] == "b"


# -- Around ------------------------------------------------------------------------------------------------------


async def test_each_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for a single backend is sent to none of several."""
    monkeypatch.setenv("UNISONO_BACKEND_TOKEN", "everybody's")
    monkeypatch.setenv("UNISONO_BACKEND_TOKEN_B", "b's own")
    async with several([ONLY_A], [ONLY_B]) as (h, (a, b)):
        _ = await h.run([chat("x", model="only-a"), chat("y", model="only-b")])
        assert {one.headers.get("authorization") for one in a.requests} == {None}
        assert {one.headers.get("authorization") for one in b.requests} == {"Bearer b's own"}


async def test_a_trace_tells_where_each_group_went(otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend's name and its address."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with several([ONLY_A], [ONLY_B]) as (h, fakes):
        _ = await h.run([chat("x", model="only-a"), chat("y", model="only-b")])
    spans = await asyncio.to_thread(otlp.wait_for, lambda spans: sum("group " in s.name for s in spans) == 2)
    groups = [dict(span.attributes) for span in spans if span.name.startswith("group ")]
    assert {one["unisono.backend"]: one["server.port"] for one in groups} == {
        name: fake.port for name, fake in zip("ab", fakes, strict=True)
    }


async def test_a_service_tells_of_all_its_backends() -> None:
    """For the line that a start prints, and for programs that run it in their own process."""
    async with FakeOllama() as fake:
        settings = Settings.model_validate(
            {
                "backends": f"near={fake.url}, far=llama-server+127.0.0.1:1",
                "listen": "127.0.0.1:0",
                "state_dir": "none",
            }
        )
        async with asyncio.timeout(LIMIT_S), running(settings) as service:
            assert [backend.name for backend in service.backends] == ["near", "far"]
            assert service.backend is service.backends[0]
            assert service.backend_description == (
                f"near (Ollama {fake.version} at {fake.url}), "
                "far (llama.cpp's server at http://127.0.0.1:1, which does not answer yet)"
            )


@pytest.mark.parametrize("listed", ["a=127.0.0.1:1, b=http://127.0.0.1:1/", "a=http://host:port", "a=ftp://host"])
async def test_backends_that_cannot_be(listed: str) -> None:
    """Two drivers of one backend would know nothing of each other; an address must be one."""
    with pytest.raises(SettingError, match=r"\ba\b"):
        async with running(Settings.model_validate({"backends": listed, "listen": "127.0.0.1:0"})):
            pass


async def test_a_command_s_model_is_looked_for_on_all() -> None:
    """One that is loaded anywhere, else the smallest; a backend that is away is passed over."""
    small, large = FakeModel(name="small", size=1), FakeModel(name="large", size=2)
    async with FakeOllama([large]) as a, FakeOllama([small]) as b:
        settings = Settings.model_validate({"backends": f"a={a.url}, b={b.url}, e=embedded"})
        assert await usable_model(settings) == "small:latest"
        await load_on(a, "large")
        assert await usable_model(settings) == "large:latest"
        await a.go_away()
        assert await usable_model(settings) == "small:latest"
