"""Models are measured through the service itself."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.fakes.ollama import FakeModel, Fault, FaultKind
from tests.integration.service import LIMIT_S, House, house, refused
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2, server_pb2


async def measure(h: House, **fields: Any) -> tuple[list[server_pb2.BenchmarkRun], list[server_pb2.BenchmarkVerdict]]:
    """Runs a measurement to its end."""
    runs, verdicts = [], []
    async with asyncio.timeout(LIMIT_S):
        async for response in h.stub.Benchmark(pb.BenchmarkRequest(**{"models": ["fake"], **fields})):
            if response.HasField("run"):
                runs.append(response.run)
            else:
                verdicts.append(response.verdict)
    return runs, verdicts


async def test_each_run_is_told_and_then_the_verdict() -> None:
    """The sizes take turns; medians, gain and items a pass follow from the runs."""
    async with house(num_parallel=4, pass_s=0.004, settings={"slots": 4}) as h:
        runs, (verdict,) = await measure(h, sizes=[4, 1, 4], runs=2, num_predict=8)
        assert [(run.run, run.size) for run in runs] == [(1, 1), (1, 4), (2, 1), (2, 4)]
        assert [run.completion_tokens for run in runs] == [8, 32, 8, 32]
        assert all(run.failed == 0 and run.passes and run.duration.ToNanoseconds() for run in runs)
        one, four = verdict.points
        assert (verdict.model, one.size, four.size, four.runs) == ("fake", 1, 4, 2)
        assert one.gain == 1.0
        assert 2.0 < four.gain <= 4.5
        assert four.items_per_pass > 2
        assert four.least_tokens_per_second <= four.tokens_per_second <= four.most_tokens_per_second
        assert verdict.sample_answer
        assert (verdict.slots.count, verdict.slots.source) == (4, event_pb2.SLOT_SOURCE_CONFIGURED)
        assert verdict.best_size == 4
        assert "8 slots" in verdict.advice


async def test_no_prompt_is_asked_twice() -> None:
    """Else the second would be found in a cache."""
    async with house(num_parallel=4) as h:
        _ = await measure(h, sizes=[1, 2], runs=2, prompt="Why?", num_predict=2, options=item_pb2.Options(seed=3))
        asked = [work.body["messages"][0]["content"] for work in h.work]
        assert len(asked) == len(set(asked)) == 1 + 2 * 3
        assert all(text.endswith(": Why?") for text in asked)
        assert {work.body["options"]["num_predict"] for work in h.work} == {2}
        assert {work.body["options"]["seed"] for work in h.work} == {3}


async def test_models_are_measured_one_after_the_other() -> None:
    """The last message of each is its verdict; each is measured once."""
    models = [FakeModel(name="first"), FakeModel(name="second")]
    async with house(models=models) as h:
        request = pb.BenchmarkRequest(models=["second", "first", "second"], sizes=[1], runs=1, num_predict=2)
        told = [response async for response in h.stub.Benchmark(request)]
        order = [f"run {one.run.model}" if one.HasField("run") else f"verdict {one.verdict.model}" for one in told]
        assert order == ["run second", "verdict second", "run first", "verdict first"]


async def test_without_single_items_there_is_no_gain() -> None:
    """There is nothing to compare with."""
    async with house(num_parallel=4) as h:
        _, (verdict,) = await measure(h, sizes=[2, 4], runs=1, num_predict=2)
        assert not any(point.HasField("gain") for point in verdict.points)


@pytest.mark.parametrize(
    ("slots", "says"),
    [(1, "UNISONO_SLOTS is 1: unset UNISONO_SLOTS"), (None, "how many slots there are is not known yet")],
)
async def test_the_advice_says_why_there_is_one_slot(slots: int | None, says: str) -> None:
    """Or that nobody knows how many there are."""
    async with house(num_parallel=4, pass_s=0.002, settings={"slots": slots}) as h:
        _, (verdict,) = await measure(h, sizes=[1, 2], runs=1, num_predict=8)
        assert says in verdict.advice


async def test_runs_that_fail_are_told_and_do_not_count() -> None:
    """The verdict says why nothing was measured."""
    async with house() as h:
        h.fake.faults.add(Fault(FaultKind.ANSWER, path="/api/chat", status=400, body={"error": "no"}, times=None))
        runs, (verdict,) = await measure(h, sizes=[1, 2], runs=1)
        assert [(run.size, run.failed, run.failure_reason) for run in runs] == [
            (1, 1, "REFUSED_BY_BACKEND"),
            (2, 2, "REFUSED_BY_BACKEND"),
        ]
        assert not verdict.points
        assert verdict.best_size == 0
        assert verdict.advice == "Nothing could be measured: REFUSED_BY_BACKEND."


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"models": []}, ["models"]),
        ({"models": [f"m{n}" for n in range(17)]}, ["models"]),
        ({"models": ["x" * 300]}, ["models[0]"]),
        ({"sizes": [0, 4, 257]}, ["sizes[0]", "sizes[2]"]),
        ({"sizes": [1] * 17}, ["sizes"]),
        ({"runs": 101, "num_predict": 4097}, ["runs", "num_predict"]),
        ({"prompt": "x" * 4_194_304}, ["prompt"]),
        ({"options": item_pb2.Options(top_p=2.0)}, ["options.top_p"]),
    ],
)
async def test_what_makes_no_sense_is_refused(fields: dict[str, Any], paths: list[str]) -> None:
    """With all that is wrong."""
    async with house() as h:
        request = pb.BenchmarkRequest(**{"models": ["fake"], **fields})
        refusal = await first_word(h, request)
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, paths)


async def first_word(h: House, request: pb.BenchmarkRequest) -> Any:
    """The refusal of a measurement."""

    async def read() -> None:
        async for _ in h.stub.Benchmark(request):
            pass

    return await refused(read())


@pytest.mark.parametrize(
    ("model", "code", "reason"),
    [
        ("nosuch", grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ("fake-embed", grpc.StatusCode.FAILED_PRECONDITION, "MODEL_LACKS_CAPABILITY"),
    ],
)
async def test_models_that_cannot_be_measured(model: str, code: grpc.StatusCode, reason: str) -> None:
    """Are named before anything is run."""
    async with house() as h:
        refusal = await first_word(h, pb.BenchmarkRequest(models=["fake", model]))
        assert (refusal.code, refusal.reason) == (code, reason)
        assert not h.work


async def test_a_backend_that_is_away_measures_nothing() -> None:
    """And that is said at once."""
    async with house(starts_away=True) as h:
        refusal = await first_word(h, pb.BenchmarkRequest(models=["fake"]))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")


async def test_whoever_goes_away_ends_it() -> None:
    """The batch that runs is cancelled, and no other follows."""
    async with house(pass_s=0.005) as h:
        call = h.stub.Benchmark(pb.BenchmarkRequest(models=["fake"], sizes=[2], runs=50, num_predict=50))
        await h.fake.wait_for(lambda fake: fake.busy_slots > 0)
        _ = call.cancel()
        await h.fake.wait_for(lambda fake: fake.busy_slots == 0)
        await asyncio.sleep(0.1)
        assert h.batches.running == 0
        assert len(h.work) <= 3
