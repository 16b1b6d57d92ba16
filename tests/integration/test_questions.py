"""The questions of the contract through the real port: plans, pass maps, the state of the service, its health."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fakes.ollama import FakeModel, FakeOllama, Fault, FaultKind
from tests.integration.service import (
    LIMIT_S,
    MAX_SEND_BYTES,
    House,
    Reading,
    chat,
    chats,
    config,
    embed,
    house,
    refusal_of,
    refused,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2, server_pb2
from unisono.bootstrap import running
from unisono.config import Settings
from unisono.edge.grpc import questions

SERVICE = "unisono.v1.BatchInference"


async def plan(h: House, items: list[item_pb2.Item], *, size: int = 0, token: str = "", **fields: Any) -> Any:
    """One page of a plan."""
    request = pb.PlanBatchRequest(config=config(**fields), items=items, page_size=size, page_token=token)
    answer = await h.stub.PlanBatch(request)
    assert answer.ByteSize() <= MAX_SEND_BYTES
    return answer


# -- PlanBatch -------------------------------------------------------------------------------------------------


async def test_a_plan_says_what_would_happen_and_does_nothing() -> None:
    """Groups in the order in which they would go, with items, estimates and reasons; nothing is loaded or asked."""
    async with house() as h:
        _ = await h.run([chat("warm", model="fake-tools", num_predict=1)])
        before = len(h.fake.requests)
        items = [
            *chats(3, "x" * 40, num_predict=10),
            chat("t", "x" * 400, model="fake-tools", num_predict=5),
            embed("e", "y" * 80, "z" * 8),
            chat("endless", "x" * 4),
        ]
        answer = await plan(h, items)
        asked = {(request.method, request.path) for request in h.fake.requests[before:]}
        assert asked <= {("GET", "/api/tags"), ("GET", "/api/ps"), ("POST", "/api/show")}
        assert h.fake.loads == 1
        assert [group.group.model for group in answer.groups] == [
            "fake-tools:latest",
            "fake:latest",
            "fake-embed:latest",
        ]
        assert [list(group.item_ids) for group in answer.groups] == [["t"], ["endless", "i0", "i1", "i2"], ["e"]]
        assert [group.group.loaded for group in answer.groups] == [True, False, False]
        assert [group.group.group for group in answer.groups] == [0, 1, 2]
        assert [group.group.item_count for group in answer.groups] == [1, 4, 1]
        assert [group.estimated_prompt_tokens for group in answer.groups] == [100, 31, 22]
        assert answer.groups[0].max_completion_tokens == 5
        assert not answer.groups[1].HasField("max_completion_tokens")
        assert all(group.reason for group in answer.groups)
        assert not answer.next_page_token
        assert not answer.refusals
        # And so it happens.
        seen = await h.run(items)
        assert [planned.model for planned in seen.of("group_planned")] == [
            group.group.model for group in answer.groups
        ]


async def test_a_plan_lists_what_would_be_refused() -> None:
    """Malformed items, unknown models, what a model cannot do, and ids used twice, with the paths of their fields."""
    bad = chat("bad", top_p=2.0)
    _ = bad.chat.messages.add(content="nobody says this")
    items = [chat("a"), bad, chat("b", model="absent"), embed("c", "x", model="fake"), chat("a"), chat("ok")]
    async with house() as h:
        answer = await plan(h, items)
        refusals = {refusal.index: (refusal.item_id, refusal_of(refusal.error)) for refusal in answer.refusals}
        assert sorted(refusals) == [1, 2, 3, 4]
        assert [refusals[n][0] for n in (1, 2, 3, 4)] == ["bad", "b", "c", "a"]
        assert refusals[1][1].fields == ["items[1].chat.messages[1].role"]
        assert refusals[2][1].reason == "MODEL_NOT_FOUND"
        assert refusals[3][1].reason == "MODEL_LACKS_CAPABILITY"
        assert refusals[4][1].fields == ["items[4].item_id"]
        assert [list(group.item_ids) for group in answer.groups] == [["a", "ok"]]
        assert (await refused(h.stub.PlanBatch(pb.PlanBatchRequest()))).fields == ["items"]
        assert not h.work


async def test_a_plan_warns() -> None:
    """A context that may be too small is named with the item's path; a runner with one slot with the remedy."""
    async with house(settings={"slots": 1}) as h:
        items = [chat("fits", num_predict=5), chat("long", "x" * 8000, runner=item_pb2.RunnerOptions(num_ctx=512))]
        answer = await plan(h, [*items, chat("more", num_predict=5)])
        by_reason = {warning.reason: warning for warning in answer.warnings}
        assert set(by_reason) == {"CONTEXT_MAY_BE_TOO_SMALL", "ONE_SLOT"}
        small = by_reason["CONTEXT_MAY_BE_TOO_SMALL"]
        assert (small.item_id, small.field) == ("long", "items[1].options.runner.num_ctx")
        assert "OLLAMA_NUM_PARALLEL" in by_reason["ONE_SLOT"].message
        assert (by_reason["ONE_SLOT"].item_id, by_reason["ONE_SLOT"].field) == ("", "")


async def test_a_plan_is_paged() -> None:
    """Item ids go on on the next page, in groups; the rest of the answer is the same on each."""
    items = [chat(f"i{n}", model=("fake", "fake-tools")[n % 3 == 0]) for n in range(20)]
    async with house() as h:
        whole = await plan(h, items)
        pages = [await plan(h, items, size=7)]
        while pages[-1].next_page_token:
            pages.append(await plan(h, items, size=7, token=pages[-1].next_page_token))
        assert [sum(len(group.item_ids) for group in page.groups) for page in pages] == [7, 7, 6]
        for number, group in enumerate(whole.groups):
            ids = [item_id for page in pages for item_id in page.groups[number].item_ids]
            assert ids == list(group.item_ids)
            assert {page.groups[number].group.item_count for page in pages} == {group.group.item_count}


async def test_a_plan_fits_in_its_messages_whatever_it_holds() -> None:
    """Ids of 250 bytes, a thousand warnings and a thousand refusals: no page is above 4 MiB, and no id is missing."""
    items = [chat(f"{'é' * 120}{n:07d}", num_predict=1_000_000) for n in range(9_000)]
    items += [chat(f"{'w' * 240}{n}", top_p=9.0) for n in range(1_500)]
    async with house() as h:
        ids: list[str] = []
        token, pages = "", 0
        while token or not pages:
            answer = await plan(h, items, size=50_000, token=token)
            ids += answer.groups[0].item_ids
            token, pages = answer.next_page_token, pages + 1
            assert (len(answer.warnings), len(answer.refusals)) == (1_000, 1_000)
        assert ids == [item.item_id for item in items[:9_000]]
        assert pages > 1


async def test_a_plan_needs_no_patience() -> None:
    """While the backend is away, a plan says at once that its items would have to wait for it."""
    async with house(starts_away=True) as h:
        answer = await plan(h, chats(2))
        assert {refusal_of(refusal.error).reason for refusal in answer.refusals} == {"BACKEND_UNAVAILABLE"}


# -- ListPasses ------------------------------------------------------------------------------------------------


async def test_the_pass_map_is_that_of_the_backend() -> None:
    """Number and members of the passes are the backend's own, within two passes or two per cent; tokens add up."""
    async with house(pass_s=0.004, settings={"slots": 4}) as h:
        items = [chat(f"i{n}", f"Question {n}", num_predict=5 + 7 * (n % 4)) for n in range(16)]
        seen = await h.run(items)
        answer = await h.stub.ListPasses(pb.ListPassesRequest(batch_id=seen.batch_id))
        truth = h.fake.pass_log
        (group,) = seen.report.groups
        assert len(answer.passes) == group.passes.count
        assert abs(len(answer.passes) - len(truth)) <= max(2, 0.02 * len(truth))
        assert answer.unmapped_passes == 0
        assert [one.number for one in answer.passes] == list(range(len(answer.passes)))
        assert {one.group for one in answer.passes} == {0}
        times = [one.time.ToNanoseconds() for one in answer.passes]
        assert times == sorted(times)
        taken = [index for one in answer.passes for index in one.item_indexes]
        for index, item in enumerate(items):
            result = seen.results[item.item_id]
            assert taken.count(index) == result.passes == result.usage.completion_tokens == 5 + 7 * (index % 4)
        # Who shared a pass with whom: as the backend says, but for the edges of waves.
        index_of = {r.id: int(r.body["messages"][0]["content"].split()[1]) for r in h.work}
        really = [frozenset(index_of[number] for number in one.requests if number in index_of) for one in truth]
        told = [frozenset(one.item_indexes) for one in answer.passes]
        alike = sum(1 for members in told if members in really)
        assert alike >= 0.9 * len(told)


async def test_the_pass_map_is_paged() -> None:
    """Pages follow one another through all groups, without a gap, and the last has no token."""
    async with house(pass_s=0.001) as h:
        seen = await h.run([chat("a", num_predict=12), chat("b", num_predict=9, model="fake-tools"), embed("e", "x")])
        assert sum(group.passes.count for group in seen.report.groups) == 21
        for size in (1, 5, 7, 21, 1000):
            found: list[tuple[int, int]] = []
            token, pages = "", 0
            while token or not pages:
                request = pb.ListPassesRequest(batch_id=seen.batch_id, page_size=size, page_token=token)
                answer = await h.stub.ListPasses(request)
                assert len(answer.passes) <= size
                found += [(one.group, one.number) for one in answer.passes]
                token, pages = answer.next_page_token, pages + 1
            first, second = seen.results["a"].group, seen.results["b"].group
            assert sorted(found) == sorted([(first, n) for n in range(12)] + [(second, n) for n in range(9)])
            assert found == sorted(found)
            assert pages == -(-21 // size)


async def test_the_pass_map_of_a_running_batch_grows() -> None:
    """While the batch runs, ListPasses answers with the passes so far."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(2, num_predict=200))
        batch_id = (await call.until("accepted")).batch_id
        assert not (await h.stub.ListPasses(pb.ListPassesRequest(batch_id=batch_id))).passes
        h.fake.release_passes()
        seen = await call.to_end()
        assert len((await h.stub.ListPasses(pb.ListPassesRequest(batch_id=batch_id))).passes) == 200
        assert seen.report.groups[0].passes.count == 200


# -- The state of the service ----------------------------------------------------------------------------------


async def test_the_service_tells_its_state() -> None:
    """Version, start, limits, backends with what they have loaded and how much waits there, batches that run."""
    async with house(settings={"slots": 4, "max_items": 1234}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(10))
        _ = await call.until("released")
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.version
        assert info.started_at.ToNanoseconds() > 1_700_000_000_000_000_000
        assert info.limits.max_items == 1234
        assert info.limits.max_receive_bytes == 32 * 1024 * 1024
        assert info.limits.max_send_bytes == 4 * 1024 * 1024
        for name in ("max_item_text_bytes", "max_image_bytes", "max_batches", "max_journal_bytes"):
            assert getattr(info.limits, name) > 0
        assert info.running_batches == 1
        (backend,) = info.backends
        assert (backend.name, backend.kind, backend.url) == ("ollama", "ollama", h.fake.url)
        assert (backend.version, backend.reachable) == ("0.32.15", True)
        assert backend.queued + backend.in_flight == 10
        assert backend.in_flight >= 4
        (runner,) = backend.runners
        assert (runner.model, runner.context_length) == ("fake:latest", 4096)
        assert (runner.slots.count, runner.slots.source) == (4, event_pb2.SLOT_SOURCE_CONFIGURED)
        assert runner.HasField("expires_at")
        h.fake.release_passes()
        _ = await call.to_end()
        info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.running_batches, info.backends[0].in_flight, info.backends[0].queued) == (0, 0, 0)


async def test_slots_are_learned_and_told() -> None:
    """Without a configured number, the slots that a runner has shown are told by GetServerInfo and ListModels."""
    async with house(pass_s=0.005, num_parallel=4) as h:
        seen = await h.run(chats(40, num_predict=12))
        info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
        slots = info.backends[0].runners[0].slots
        assert (slots.count, slots.source) == (4, event_pb2.SLOT_SOURCE_LEARNED)
        models = (await h.stub.ListModels(pb.ListModelsRequest())).models
        assert {model.name: [r.slots.count for r in model.runners] for model in models}["fake:latest"] == [4]
        assert seen.report.groups[0].fewest_passes == 120


async def test_configured_slots_are_told_before_there_was_any_work() -> None:
    """Of a model that is loaded, and of one that is not."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        for _ in range(2):
            models = (await h.stub.ListModels(pb.ListModelsRequest())).models
            slots = {model.name: [r.slots for r in model.runners] for model in models}["fake:latest"]
            assert [(one.count, one.source) for one in slots] == [(4, event_pb2.SLOT_SOURCE_CONFIGURED)]
            async with httpx.AsyncClient() as other:
                _ = await other.post(f"{h.fake.url}/api/generate", json={"model": "fake"})


async def test_models_are_listed() -> None:
    """By backend and name, with digest, family, size, context and capabilities."""
    async with house() as h:
        answer = await h.stub.ListModels(pb.ListModelsRequest())
        assert not answer.unreachable
        names = [model.name for model in answer.models]
        assert names == sorted(["fake:latest", "fake-think:latest", "fake-tools:latest", "fake-embed:latest"])
        model = answer.models[names.index("fake-tools:latest")]
        assert model.backend == "ollama"
        assert len(model.digest) == 64
        assert (model.family, model.parameter_size, model.quantization) == ("llama", "134.52M", "Q4_1")
        assert (model.context_length, model.size_bytes) == (8192, 98_362_432)
        assert list(model.capabilities) == ["completion", "tools"]
        assert answer == await h.stub.ListModels(pb.ListModelsRequest(backend="ollama"))
        assert (
            await refused(h.stub.ListModels(pb.ListModelsRequest(backend="none")))
        ).code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("how", ["away", "silent"])
async def test_questions_are_answered_while_the_backend_is_not_there(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GetServerInfo and ListModels answer soon, and name the backend that does not, and why."""
    monkeypatch.setattr(questions, "_STATUS_TIMEOUT_S", 0.2)
    async with house(starts_away=how == "away") as h:
        fault = Fault(FaultKind.DELAY, times=None, until_released=True)
        if how == "silent":
            h.fake.faults.add(fault)
        async with asyncio.timeout(LIMIT_S / 4):
            info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
            models = await h.stub.ListModels(pb.ListModelsRequest())
        statuses: list[server_pb2.BackendStatus] = [*info.backends, *models.unreachable]
        assert len(statuses) == 2
        for status in statuses:
            assert not status.reachable
            assert status.name == "ollama"
            assert refusal_of(status.error).reason == "BACKEND_UNAVAILABLE"
        assert not models.models
        fault.release()


# -- Health and reflection -------------------------------------------------------------------------------------


async def test_the_service_is_healthy_and_describes_itself() -> None:
    """grpc.health.v1 says SERVING, and reflection lists the service."""
    async with house(models=[FakeModel(name="fake")]) as h:
        health: Any = health_pb2_grpc.HealthStub(h.channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        channel: Any = h.channel
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = await call.read()
        assert SERVICE in {service.name for service in listed.list_services_response.service}
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
        described = await call.read()
        assert described.file_descriptor_response.file_descriptor_proto
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_service_that_drains_says_so() -> None:
    """NOT_SERVING while it drains, new batches refused with SHUTTING_DOWN, running ones end; then nobody listens."""
    async with FakeOllama() as fake:
        house_itself = running(Settings(listen="127.0.0.1:0", ollama_url=fake.url, drain=LIMIT_S, state_dir="none"))
        service = await house_itself.__aenter__()
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub: Any = pb_grpc.BatchInferenceStub(channel)
            health: Any = health_pb2_grpc.HealthStub(channel)
            fake.hold_passes()
            call = Reading(stub.RunBatch(pb.RunBatchRequest(config=config(), items=chats(2))))
            _ = await call.until("released")
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            closing = asyncio.get_running_loop().create_task(house_itself.__aexit__(None, None, None))
            async with asyncio.timeout(LIMIT_S):
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            no = await refused(Reading(stub.RunBatch(pb.RunBatchRequest(config=config(), items=chats(1)))))
            assert (no.code, no.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
            assert no.retry_after_s
            fake.release_passes()
            seen = await call.to_end()
            assert set(seen.states().values()) == {"COMPLETED"}
            _ = watch.cancel()
            async with asyncio.timeout(LIMIT_S):
                _ = await closing
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = await stub.GetServerInfo(pb.GetServerInfoRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
