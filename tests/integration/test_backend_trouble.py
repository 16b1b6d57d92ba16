"""A backend in trouble, seen through the real port: what is tried again, what is not, and that nothing hangs."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.fakes.ollama import FakeModel, Fault, FaultKind
from tests.integration.service import (
    House,
    Seen,
    chat,
    chats,
    embed,
    house,
    is_load,
    reason_of,
    refusal_of,
    refused,
    span,
)
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.contract import convert_in, convert_out


def answers(body: Any) -> bool:
    """A request for an answer."""
    return not is_load(body)


def trouble(h: House, kind: FaultKind, *, times: int | None = 1, nth: int = 1, **fields: Any) -> Fault:
    """Arms a fault for requests for answers."""
    return h.fake.faults.add(Fault(kind, path="/api/chat", when=answers, times=times, nth=nth, **fields))


def all_completed(seen: Seen, count: int) -> None:
    """Every item was answered, and none was lost."""
    assert len(seen.results) == count
    assert set(seen.states().values()) == {"COMPLETED"}
    assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED


# -- One request goes wrong ------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[FaultKind, dict[str, Any], str]] = {
    "busy": (FaultKind.ANSWER, {}, "BACKEND_BUSY"),
    "closed without an answer": (FaultKind.CLOSE, {}, "CONNECTION_LOST"),
    "reset at once": (FaultKind.RESET, {}, "CONNECTION_LOST"),
    "reset in the middle": (FaultKind.RESET, {"after_lines": 3}, "CONNECTION_LOST"),
    "ended before done": (FaultKind.NO_DONE, {}, "CONNECTION_LOST"),
    "ended after two lines": (FaultKind.NO_DONE, {"after_lines": 2}, "CONNECTION_LOST"),
    "error line in a 200": (FaultKind.ERROR_LINE, {"after_lines": 2}, "RUNNER_DIED"),
    "a line that is no JSON": (FaultKind.BAD_LINE, {"after_lines": 2}, "BAD_ANSWER"),
    "the backend's own failure": (
        FaultKind.ANSWER,
        {"status": 500, "body": {"error": "something odd"}},
        "BACKEND_FAILED",
    ),
}


async def test_first_tokens_of_the_first_wave_are_of_its_own_attempts() -> None:
    """One that speaks in a later attempt did not begin with the others."""
    async with house(settings={"slots": 4}) as h:
        _ = trouble(h, FaultKind.ANSWER)
        seen = await h.run(chats(2, num_predict=8))
        all_completed(seen, 2)
        (group,) = seen.report.groups
        assert group.first_wave.item_count == 2
        assert not group.first_wave.HasField("first_token_spread")


@pytest.mark.parametrize("what", FAULTS)
async def test_an_attempt_that_fails_is_made_again(what: str) -> None:
    """One request of ten goes wrong once: it is sent again, its answer is whole, and the others do not notice."""
    kind, fields, _ = FAULTS[what]
    async with house() as h:
        truth = (await h.run(chats(10, num_predict=8))).results
        fault = trouble(h, kind, nth=4, **fields)
        seen = await h.run(chats(10, num_predict=8))
        assert fault.hits == 1
        all_completed(seen, 10)
        assert {name: r.completion.content for name, r in seen.results.items()} == {
            name: r.completion.content for name, r in truth.items()
        }
        assert sorted(result.attempts for result in seen.results.values()) == [1] * 9 + [2]
        assert seen.report.retries == 1
        assert seen.report.completion_tokens == 80


@pytest.mark.parametrize("what", FAULTS)
async def test_an_item_that_fails_each_time_fails_with_the_reason(what: str) -> None:
    """max_attempts 1: no second attempt, and the reason is told; the items beside it complete."""
    kind, fields, reason = FAULTS[what]
    async with house() as h:
        h.fake.faults.add(
            Fault(kind, path="/api/chat", when=lambda body: "cursed" in str(body), times=None, **fields)
        )
        seen = await h.run([*chats(4), chat("cursed", "cursed [[tokens=9]]")], max_attempts=1)
        assert seen.states().pop("cursed") == "FAILED"
        assert reason_of(seen.results["cursed"]) == reason
        assert seen.results["cursed"].attempts == 1
        assert seen.report.retries == 0
        assert list(seen.states().values()).count("COMPLETED") == 4


async def test_attempts_are_counted_and_bounded() -> None:
    """Three attempts by default, or as many as max_attempts says; each was sent, and the report counts them."""
    async with house() as h:
        fault = h.fake.faults.add(
            Fault(FaultKind.ANSWER, path="/api/chat", when=lambda body: "cursed" in str(body), times=None)
        )
        seen = await h.run([chat("a", "cursed"), chat("b")])
        no = refusal_of(seen.results["a"].error)
        assert (no.code, no.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BACKEND_BUSY")
        assert (seen.results["a"].attempts, fault.hits, seen.report.retries) == (3, 3, 2)
        assert seen.states()["b"] == "COMPLETED"
        seen = await h.run([chat("a", "cursed")], max_attempts=2)
        assert (seen.results["a"].attempts, fault.hits) == (2, 5)


async def test_an_embedding_is_tried_again() -> None:
    """A runner that dies under an embedding comes as a 400; it is no mistake of the caller's, and is tried again."""
    async with house() as h:
        fault = h.fake.faults.add(Fault(FaultKind.KILL_RUNNER, path="/api/embed", when=answers))
        seen = await h.run([embed("e", "red"), chat("a")])
        assert fault.hits == 1
        all_completed(seen, 2)
        assert seen.results["e"].attempts == 2


# -- The runner dies, the load fails ---------------------------------------------------------------------------


async def test_a_runner_that_dies_takes_no_item_with_it() -> None:
    """The runner is killed in the middle of a batch: what was finished stays, the rest is answered by a new one."""
    async with house(settings={"slots": 4}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(12, num_predict=4))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await h.fake.step(6)
        assert h.fake.kill_runners() == 1
        h.fake.release_passes()
        seen = await call.to_end()
        all_completed(seen, 12)
        assert seen.report.retries == 0
        assert sum(result.disturbed for result in seen.results.values()) >= 4
        assert {result.attempts for result in seen.results.values()} == {1}
        finished_before = [result for result in seen.results.values() if result.attempts == 1]
        assert len(finished_before) >= 4


async def test_an_item_that_kills_its_runner_ends_and_harms_no_other_batch() -> None:
    """The culprit fails with RUNNER_DIED after its attempts; what comes later is answered, and nothing hangs."""
    async with house(settings={"slots": 2}) as h:
        seen = await h.run([chat("culprit", "[[crash=2]]"), *chats(6)])
        assert seen.states()["culprit"] == "FAILED"
        assert reason_of(seen.results["culprit"]) == "RUNNER_DIED"
        assert len(seen.results) == 7
        all_completed(await h.run(chats(4)), 4)


async def test_a_load_that_fails_is_tried_again() -> None:
    """A load that fails once costs no item an attempt."""
    body = {"error": "llama runner process has terminated: exit status 2"}
    async with house() as h:
        h.fake.faults.add(Fault(FaultKind.ANSWER, path="/api/chat", when=is_load, status=500, body=body))
        seen = await h.run(chats(3))
        all_completed(seen, 3)
        assert {result.attempts for result in seen.results.values()} == {1}
        states = [loading.state for loading in seen.of("loading")]
        assert states.count(event_pb2.Loading.STATE_FAILED) == 1
        assert states[-1] == event_pb2.Loading.STATE_LOADED


@pytest.mark.parametrize("status", [502, 504])
async def test_a_proxy_that_finds_no_backend_for_items(status: int) -> None:
    """It lets probes and loads through: items fail once patience is over, after a few tries."""
    async with house(settings={"backend_patience": 1.0}) as h:
        _ = trouble(h, FaultKind.ANSWER, status=status, body=b"<html>", times=None)
        seen = await h.run(chats(3))
        assert {reason_of(result) for result in seen.results.values()} == {"BACKEND_UNAVAILABLE"}
        assert len(h.fake.requests) < 100


@pytest.mark.parametrize("kind", [FaultKind.RESET, FaultKind.CLOSE])
async def test_a_question_for_a_model_that_is_lost_is_asked_again(kind: FaultKind) -> None:
    """It costs no item anything; before, it was remembered as the answer, and failed all that came for 5 s."""
    async with house() as h:
        fault = h.fake.faults.add(Fault(kind, path="/api/tags", times=2))
        seen = await h.run(chats(3))
        assert fault.hits == 2
        all_completed(seen, 3)
        assert {result.attempts for result in seen.results.values()} == {1}


async def test_a_proxy_that_finds_the_backend_again() -> None:
    """No item is charged for it, and the next outage is another one."""
    async with house() as h:
        for _ in range(2):
            _ = trouble(h, FaultKind.ANSWER, status=502, body=b"<html>", times=4)
            seen = await h.run(chats(3))
            all_completed(seen, 3)


async def test_a_model_that_cannot_be_loaded_fails_its_items_alone() -> None:
    """LOAD_FAILED for its items, with what the backend said; the items of other models are answered."""
    body = {"error": "model requires more system memory (9.9 GiB) than is available (1.1 GiB)"}
    async with house() as h:
        h.fake.faults.add(
            Fault(
                FaultKind.ANSWER,
                path="/api/chat",
                when=lambda asked: is_load(asked) and asked["model"].startswith("fake-tools"),
                status=500,
                body=body,
                times=None,
            )
        )
        seen = await h.run([*chats(3), chat("t", model="fake-tools"), chat("u", model="fake-tools")])
        assert {name for name, state in seen.states().items() if state == "FAILED"} == {"t", "u"}
        no = refusal_of(seen.results["t"].error)
        assert (no.code, no.reason) == (grpc.StatusCode.UNAVAILABLE, "LOAD_FAILED")
        assert "9.9 GiB" in no.message
        assert seen.results["t"].attempts == 0
        failed = [loading for loading in seen.of("loading") if loading.state == event_pb2.Loading.STATE_FAILED]
        assert refusal_of(failed[0].error).reason == "LOAD_FAILED"


async def test_a_cold_model_never_meets_a_burst() -> None:
    """The model is loaded before anything is sent: a cold queue of two refuses none of forty items."""
    async with house(max_queue=2, load_s=0.2, num_parallel=4) as h:
        seen = await h.run(chats(40, num_predict=2))
        all_completed(seen, 40)
        assert {result.attempts for result in seen.results.values()} == {1}
        assert h.fake.loads == 1


# -- The backend goes away -------------------------------------------------------------------------------------


async def test_a_backend_that_is_away_at_first_is_waited_for() -> None:
    """Items of a batch that began while the backend was away are answered when it is there, at no attempt's cost."""
    async with house(starts_away=True) as h:
        call = h.run_batch(chats(5))
        _ = await call.until("accepted")
        await h.fake.come_back()
        seen = await call.to_end()
        all_completed(seen, 5)
        assert {result.attempts for result in seen.results.values()} == {1}


async def test_a_backend_that_goes_away_in_the_middle_is_waited_for() -> None:
    """What was finished stays; the rest is answered when the backend is back, by a model that is loaded again."""
    async with house(settings={"slots": 4}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(12, num_predict=2))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await h.fake.step(2)
        _ = await call.until("result")
        await h.fake.go_away()
        h.fake.release_passes()
        await h.fake.come_back()
        seen = await call.to_end()
        all_completed(seen, 12)
        assert h.fake.loads == 2
        assert max(result.attempts for result in seen.results.values()) <= 3


async def test_a_backend_that_stays_away_fails_what_is_left() -> None:
    """BACKEND_UNAVAILABLE when it was waited for long enough; what was finished stays, and nothing hangs."""
    async with house(settings={"slots": 4, "backend_patience": "500ms"}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(10, num_predict=2))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await h.fake.step(2)
        while len(call.seen.of("result")) < 4:
            _ = await call.until("result")
        await h.fake.go_away()
        seen = await call.to_end()
        assert sorted(seen.states().values()) == ["COMPLETED"] * 4 + ["FAILED"] * 6
        failed = [result for result in seen.results.values() if result.WhichOneof("outcome") == "error"]
        assert {reason_of(result) for result in failed} <= {"BACKEND_UNAVAILABLE", "CONNECTION_LOST"}
        assert "BACKEND_UNAVAILABLE" in {reason_of(result) for result in failed}
        assert {refusal_of(result.error).code for result in failed} == {grpc.StatusCode.UNAVAILABLE}
        h.fake.release_passes()
        await h.fake.come_back()
        all_completed(await h.run(chats(3)), 3)


async def test_a_backend_that_was_never_there_fails_all_items_of_all_models_in_one_patience() -> None:
    """Items of five models fail with BACKEND_UNAVAILABLE after one patience, not after one for each model."""
    async with house(starts_away=True, settings={"backend_patience": "400ms"}) as h:
        loop = asyncio.get_running_loop()
        began = loop.time()
        seen = await h.run([chat(f"i{n}", model=f"m{n}") for n in range(5)])
        assert loop.time() - began < 1.5
        assert set(seen.states().values()) == {"FAILED"}
        assert {reason_of(result) for result in seen.results.values()} == {"BACKEND_UNAVAILABLE"}
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED


async def test_a_backend_that_comes_back_within_the_patience_is_found() -> None:
    """Up to its end: the last pause between two tries is cut short. Who waited in vain is told how long."""
    async with house(starts_away=True, settings={"backend_patience": "1s"}) as h:
        loop = asyncio.get_running_loop()
        began = loop.time()
        seen = await h.run(chats(1))
        assert loop.time() - began >= 1.0
        assert "(waited 1 s for it)" in seen.results["i0"].error.message
        # After 0.25, 0.75 and 1.75 s at the latest it would be asked again.
        began = loop.time()
        call = h.run_batch(chats(1))
        await asyncio.sleep(0.85)
        await h.fake.come_back()
        all_completed(await call.to_end(), 1)


async def test_a_backend_that_says_nothing_at_all_is_given_up() -> None:
    """Requests that are answered nothing for the stall limit are BACKEND_STALLED; their connections are closed."""
    async with house(settings={"stall_timeout": "300ms"}) as h:
        fault = trouble(h, FaultKind.DELAY, times=None, until_released=True)
        seen = await h.run(chats(3), max_attempts=1)
        assert {reason_of(result) for result in seen.results.values()} == {"BACKEND_STALLED"}
        await h.fake.wait_for(lambda fake: fake.open_connections == 0)
        fault.release()


# -- Several batches, several models ---------------------------------------------------------------------------


async def test_batches_share_a_runner_and_take_turns() -> None:
    """Batches that come together are answered side by side by one runner, and none waits for all of another."""
    async with house(settings={"slots": 4}, pass_s=0.001) as h:
        _ = await h.run([chat("warm", num_predict=1)])
        h.fake.hold_passes()
        calls = [h.run_batch([chat(f"{b}{n}", f"{b} {n}", num_predict=3) for n in range(20)]) for b in "abc"]
        for call in calls:
            _ = await call.until("group_planned")
        h.fake.release_passes()
        seen = await asyncio.gather(*(call.to_end() for call in calls))
        for one in seen:
            all_completed(one, 20)
        assert h.fake.loads == 1
        released = sorted(h.work[1:], key=lambda request: request.last_byte_ns)
        order = [request.body["messages"][0]["content"][0] for request in released]
        # The first batch may have had its ten staged and sent before the others came; from then on they take turns.
        counts = {b: order[10:40].count(b) for b in "abc"}
        assert max(counts.values()) - min(counts.values()) <= 6, counts
        assert sum(one.report.groups[0].passes.count for one in seen) > 0


async def test_two_models_are_loaded_once_each() -> None:
    """Items of two models, mixed: each model is loaded once, and its items go together."""
    models = [FakeModel(name="one"), FakeModel(name="two")]
    async with house(models=models, max_loaded_models=1, settings={"slots": 4}) as h:
        seen = await h.run([chat(f"i{n}", model=("one", "two")[n % 2], num_predict=2) for n in range(24)])
        all_completed(seen, 24)
        assert h.fake.loads == 2
        assert sorted(h.loads) == ["one:latest", "two:latest"]
        models_asked = [request.body["model"] for request in h.work]
        assert models_asked == sorted(models_asked, key=models_asked.index)


async def test_the_model_that_is_loaded_goes_first() -> None:
    """A group whose model is in memory goes before a larger one whose model is not."""
    async with house(max_loaded_models=1) as h:
        _ = await h.run([chat("warm", model="fake-tools")])
        seen = await h.run([*chats(6), chat("t", model="fake-tools")])
        all_completed(seen, 7)
        assert [planned.model for planned in seen.of("group_planned")] == ["fake-tools:latest", "fake:latest"]
        assert seen.of("group_planned")[0].loaded
        assert h.fake.loads == 2


async def test_names_of_one_file_are_one_group() -> None:
    """Two names with one digest share a runner, and its passes."""
    models = [FakeModel(name="base", digest="ab" * 32), FakeModel(name="alias", digest="ab" * 32)]
    async with house(models=models) as h:
        seen = await h.run([chat("a", model="base"), chat("b", model="alias"), chat("c", model="BASE:latest")])
        all_completed(seen, 3)
        assert len(seen.of("group_planned")) == 1
        assert h.fake.loads == 1


async def test_keep_alive_stands_on_the_load_alone() -> None:
    """No request for an answer carries keep_alive; the load does, and 0 unloads the model after the batch."""
    async with house() as h:
        all_completed(await h.run(chats(3), keep_alive=span(77)), 3)
        assert not [request for request in h.work if "keep_alive" in request.body]
        (load,) = [request.body for request in h.fake.requests if is_load(request.body)]
        assert load["keep_alive"] == 77
        all_completed(await h.run(chats(3), keep_alive=span(0)), 3)
        await h.fake.wait_for(lambda fake: not fake.runners)


# -- Defects of this service -----------------------------------------------------------------------------------


async def _lives(h: House) -> None:
    all_completed(await h.run(chats(3)), 3)


async def test_a_defect_in_a_converter_costs_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that cannot be converted ends its own call with INTERNAL, is reported, and harms no other."""
    right = convert_out.result

    def wrong(event: Any) -> Any:
        if event.item_id == "cursed":
            raise ZeroDivisionError
        return right(event)

    monkeypatch.setattr(convert_out, "result", wrong)
    async with house() as h:
        h.expected_defects.add("a call")
        for call in (h.run_batch([chat("cursed")]), await h.stream().open()):
            if hasattr(call, "add"):
                _ = await call.add(chat("cursed"))
            no = await refused(call)
            assert (no.code, no.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert "ZeroDivisionError" in no.message
        assert len(h.defects) == 2
        await _lives(h)


async def test_a_defect_while_items_are_read_costs_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that breaks the conversion is INTERNAL; no batch is left behind."""

    def wrong(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    async with house() as h:
        h.expected_defects.add("a call")
        with monkeypatch.context() as patch:
            patch.setattr(convert_in, "item", wrong)
            assert (await refused(h.run_batch(chats(1)))).reason == "INTERNAL"
        assert h.batches.running == 0
        await _lives(h)


@pytest.mark.parametrize("method", ["stage", "release", "load", "find_model", "loaded"])
async def test_a_defect_in_the_adapter_costs_its_items(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an adapter raises that it should not, its items fail with INTERNAL, and the service lives."""

    def wrong(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    async with house() as h:
        h.expected_defects |= {"a call"}
        with monkeypatch.context() as patch:
            patch.setattr(h.backend, method, wrong)
            seen = await h.run(chats(3), max_attempts=3)
        assert len(seen.results) == 3
        assert {reason_of(result) for result in seen.results.values()} == {"INTERNAL"}
        assert h.defects
        h.expected_defects |= {where for where, _ in h.defects}
        await _lives(h)


@pytest.mark.parametrize("method", ["version", "unload"])
async def test_a_defect_on_an_errand_does_not_end_the_driver(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes and unloads that raise what they should not are reported, and the backend is used as before."""

    def wrong(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    async with house(settings={"backend_patience": "300ms"}) as h:
        await _lives(h)
        with monkeypatch.context() as patch:
            patch.setattr(h.backend, method, wrong)
            if method == "version":
                h.fake.hold_passes()
                call = h.run_batch(chats(2))
                await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
                await h.fake.go_away()
                assert len((await call.to_end()).results) == 2
                h.fake.release_passes()
                await h.fake.come_back()
            else:
                all_completed(await h.run(chats(2), keep_alive=span(0)), 2)
        assert h.defects
        h.expected_defects |= {where for where, _ in h.defects}
        await _lives(h)


@pytest.mark.parametrize("place", [0, 9, 19])
async def test_one_poisoned_item_among_twenty(place: int) -> None:
    """It fails with RUNNER_DIED; all others are answered, and none of them is charged an attempt."""
    async with house(num_parallel=8, settings={"slots": 8}) as h:
        items = chats(20, num_predict=6)
        items[place] = chat("culprit", "[[crash]]")
        seen = await h.run(items)
        assert reason_of(seen.results["culprit"]) == "RUNNER_DIED"
        others = [result for name, result in seen.results.items() if name != "culprit"]
        assert len(others) == 19
        assert {result.state for result in others} == {event_pb2.ITEM_STATE_COMPLETED}
        assert {result.attempts for result in others} == {1}
