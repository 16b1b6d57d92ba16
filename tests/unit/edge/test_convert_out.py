"""Everything that the core says reaches the caller, exactly; and what it does not say stays absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tests.unit.edge.samples import (
    DELTAS,
    FAILED,
    GROUP,
    INFO,
    LASTING,
    LOADED,
    MIB,
    NOW_NS,
    PLANNED,
    PROGRESS,
    RESULT,
    STATE,
    WARNED,
    WRONG,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2 as ev
from unisono._generated.unisono.v1 import item_pb2 as it
from unisono._generated.unisono.v1 import server_pb2 as srv
from unisono.app.benchmark import Measured, Verdict
from unisono.core import events, idle, model, passes
from unisono.core.batch import Ack
from unisono.core.benchmark import BatchRun, steps_of
from unisono.core.commands import ReleaseReason
from unisono.core.errors import DuplicateItemError
from unisono.core.limits import Limits
from unisono.edge.contract import convert_benchmark, convert_figures, convert_out, convert_server


def event(lasting: events.LastingEvent) -> ev.BatchEvent:
    """A lasting event as it is streamed."""
    return convert_out.batch_event(events.Journalled(sequence=9, at_ns=NOW_NS, event=lasting), 1)


def everything() -> list[Message]:
    """All that is ever sent, with everything set."""
    return [
        *(event(lasting) for lasting in LASTING),
        convert_out.batch_event(DELTAS, NOW_NS),
        convert_out.batch_event(events.Heartbeat(), NOW_NS),
        convert_out.acknowledgement(Ack(item_id="a", index=0)),
        convert_out.acknowledgement(Ack(item_id="a", refusal=DuplicateItemError("twice"))),
        convert_server.group_plan(1, GROUP, STATE, [("i0", ReleaseReason.TAIL)]),
        convert_server.plan_warning(WARNED),
        convert_server.plan_refusal("a", 5, WRONG),
        convert_figures.forward_pass(1, passes.ForwardPass(number=7, at_ns=NOW_NS, members=(2, 1))),
        convert_server.model(INFO, [convert_server.runner_status(LOADED, STATE)]),
        convert_benchmark.response(
            Measured(
                model="m",
                size=4,
                run=2,
                duration_s=1.5,
                completion_tokens=64,
                passes=16,
                failed=1,
                failure_reason="BACKEND_BUSY",
            )
        ),
        convert_benchmark.response(
            Verdict(
                model="m",
                steps=steps_of(
                    BatchRun(items=size, duration_s=2.0, latencies_s=(1.0,), completion_tokens=64, passes=64 // size)
                    for size in (1, 4)
                ),
                sample_answer="Once",
                slots=STATE,
                best_size=4,
                advice="nothing",
            )
        ),
        convert_server.server_limits(Limits(), max_receive_bytes=32 * MIB, max_send_bytes=4 * MIB),
    ]


# -- Every field of the contract -------------------------------------------------------------------------------


def set_fields(message: Message) -> Iterator[str]:
    """The full names of all fields that are set in a message, and in those within it."""
    for field, value in message.ListFields():
        yield field.full_name
        if field.message_type is not None and field.message_type.full_name.startswith("unisono."):
            for one in value if field.is_repeated else [value]:
                yield from set_fields(one)


def fields_of(kind: Any) -> set[str]:
    """The full names of all fields of a kind of message, and of those within it."""
    found: set[str] = set()
    waiting = [kind]
    while waiting:
        for field in waiting.pop().fields:
            if field.full_name not in found:
                found.add(field.full_name)
                if field.message_type is not None and field.message_type.full_name.startswith("unisono."):
                    waiting.append(field.message_type)
    return found


def test_every_field_of_the_contract_is_filled() -> None:
    """From some value of the core: a field that is added and forgotten would be missed here."""
    kinds = (
        ev.BatchEvent,
        pb.ItemAcknowledged,
        pb.ForwardPass,
        srv.GroupPlan,
        srv.PlanWarning,
        srv.PlanRefusal,
        srv.Model,
        srv.ServerLimits,
        pb.BenchmarkResponse,
    )
    promised = set().union(*(fields_of(kind.DESCRIPTOR) for kind in kinds))
    filled = {name for message in everything() for name in set_fields(message)}
    # Zero, where zero is no news, cannot be told from absent.
    assert promised - filled == set()


def test_what_is_sent_can_be_sent() -> None:
    """And read again."""
    for message in everything():
        assert type(message).FromString(message.SerializeToString()) == message


@pytest.mark.parametrize(
    ("table", "enum"),
    [
        (convert_out._ITEM_STATES, model.ItemState),
        (convert_out._BATCH_STATES, events.BatchState),
        (convert_out._LOAD_STATES, events.LoadState),
        (convert_out._FINISH_REASONS, model.FinishReason),
        (convert_figures._SLOT_SOURCES, model.SlotSource),
        (convert_figures._PASS_METHODS, model.PassMethod),
        (convert_figures._IDLE_REASONS, idle.IdleReason),
        (convert_out.RELEASE_REASONS, ReleaseReason),
    ],
    ids=lambda one: one.__name__ if isinstance(one, type) else "",
)
def test_each_word_of_the_core_has_its_own_number(table: dict[Enum, int], enum: type[Enum]) -> None:
    """And only what is not known is unspecified."""
    assert set(table) == set(enum)
    assert len(set(table.values())) == len(table)
    assert [one.name for one, number in table.items() if number == 0] == [
        one.name for one in enum if one.name == "UNKNOWN"
    ]


# -- Events ----------------------------------------------------------------------------------------------------


def test_lasting_events_have_their_sequence_and_time() -> None:
    """Passing ones have no sequence, and the time that they are given."""
    lasting = event(PROGRESS)
    assert (lasting.sequence, lasting.time.ToNanoseconds()) == (9, NOW_NS)
    for passing in (DELTAS, events.Heartbeat()):
        made = convert_out.batch_event(passing, NOW_NS)
        assert not made.HasField("sequence")
        assert made.time.ToNanoseconds() == NOW_NS


@pytest.mark.parametrize(
    ("lasting", "name"),
    list(
        zip(
            LASTING,
            [
                "accepted",
                "group_planned",
                "loading",
                "released",
                "result_part",
                "result",
                "result",
                "progress",
                "summary",
            ],
            strict=True,
        )
    ),
    ids=[str(i) for i in range(len(LASTING))],
)
def test_each_event_has_its_place(lasting: events.LastingEvent, name: str) -> None:
    """In the `oneof`."""
    assert event(lasting).WhichOneof("event") == name


def test_a_result_is_told_as_it_is() -> None:
    """Each value in its field."""
    assert event(RESULT).result == ev.Result(
        item_id="a",
        index=3,
        state=ev.ITEM_STATE_COMPLETED,
        completion=it.Completion(
            model="m:1b",
            content="Hi",
            thinking="hm",
            tool_calls=[it.ToolCall(id="c1", name="look", arguments_json='{"b": 1}')],
            finish_reason=it.FINISH_REASON_TOOL_CALLS,
            finish_reason_raw="stop",
            logprobs=[
                it.TokenLogprob(
                    token="Hi",
                    logprob=-0.25,
                    bytes=b"Hi",
                    top=[it.TokenLogprob(token="Ho", logprob=-2.5, bytes=b"Ho")],
                )
            ],
            embeddings=[it.Embedding(values=[0.1, -2.0, 3e8]), it.Embedding()],
        ),
        usage=it.Usage(prompt_tokens=11, cached_prompt_tokens=0, completion_tokens=13),
        timings=it.Timings(
            queued=Duration(nanos=1_000_000),
            slot_wait=Duration(),
            load=Duration(seconds=1, nanos=500_000_000),
            prompt_eval=Duration(nanos=250_000_000),
            eval=Duration(seconds=12, nanos=1),
            first_token=Duration(nanos=300_000_000),
            total=Duration(seconds=100),
        ),
        attempts=2,
        shared_with=7,
        passes=12,
        group=0,
        parts=4,
        variant_of="whole",
        release_reason=ev.RELEASE_REASON_TAIL,
        disturbed=1,
    )
    assert event(FAILED).result.release_reason == ev.RELEASE_REASON_UNSPECIFIED


def test_what_a_result_does_not_know_is_absent() -> None:
    """Not zero."""
    bare = event(events.Result(item_id="a", index=0, state=model.ItemState.CANCELLED)).result
    assert not any(bare.HasField(name) for name in ("outcome", "usage", "timings", "group"))
    told = replace(RESULT, usage=model.Usage(), timings=model.Timings(), group=None)
    made = event(told).result
    assert not made.usage.HasField("cached_prompt_tokens")
    assert [field.name for field, _ in made.timings.ListFields()] == []
    assert not made.HasField("group")


def test_an_error_of_an_item_is_a_rich_status() -> None:
    """With its reason, as everywhere."""
    status = event(FAILED).result.error
    assert (status.code, status.message) == (8, "full")
    assert reason_of(status) == "BACKEND_BUSY"


def reason_of(status: status_pb2.Status) -> str:
    """The reason in the first detail."""
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


def test_halves_of_characters_do_not_break_a_result() -> None:
    """Wherever a model or a backend left one."""
    half, whole = "x\ud83d", "x\ufffd"
    call = model.ToolCall(id=half, name=half, arguments_json=half)
    token = model.TokenLogprob(token=half, logprob=0.0, top=(model.TokenLogprob(token=half, logprob=0.0),))
    broken = model.Completion(
        model=half, content=half, thinking=half, tool_calls=(call,), finish_reason_raw=half, logprobs=(token,)
    )
    made = event(replace(RESULT, completion=broken)).result.completion
    assert (made.model, made.content, made.thinking, made.finish_reason_raw) == (whole,) * 4
    assert made.tool_calls[0] == it.ToolCall(id=whole, name=whole, arguments_json=whole)
    assert (made.logprobs[0].token, made.logprobs[0].top[0].token) == (whole, whole)
    said = replace(DELTAS.items[0], content=half, thinking=half)
    delta = convert_out.batch_event(events.Deltas(items=(said,)), 0).deltas.items[0]
    assert (delta.content, delta.thinking) == (whole, whole)


def test_an_id_of_megabytes_does_not_make_a_message_of_megabytes() -> None:
    """It was refused for its length, and comes back cut."""
    long = "x" * MIB
    failed = replace(FAILED, item_id=long)
    acknowledged = convert_out.acknowledgement(Ack(item_id=long, refusal=WRONG))
    planned = convert_server.plan_refusal(long, 0, WRONG)
    for message in (event(failed), acknowledged, planned):
        assert message.ByteSize() < 1024
    allowed = "x" * 256
    assert event(replace(FAILED, item_id=allowed)).result.item_id == allowed


def test_a_group_says_how_its_runner_is_loaded() -> None:
    """Options that nobody set are absent, and so is a digest that the backend did not tell."""
    assert event(PLANNED).group_planned == ev.GroupPlanned(
        group=2,
        backend="local",
        model="m:1b",
        digest="sha",
        runner=it.RunnerOptions(
            num_ctx=4096, num_batch=512, num_gpu=-1, main_gpu=0, use_mmap=False, num_thread=4, draft_num_predict=0
        ),
        item_count=16,
        loaded=True,
        slots=ev.SlotCount(
            count=8,
            source=ev.SLOT_SOURCE_LEARNED,
            at_least=7,
            limit=6,
            reason="it is shared",
            remedy="ask the others",
        ),
        shift=False,
        context_reason="4,096 tokens: asked for",
        memory=ev.MemoryEstimate(
            weights_bytes=2**31, kv_cache_bytes=2**28, context_length=4096, slots=8, measured_bytes=2**32
        ),
    )
    bare = model.RunnerSpec(backend="local", model="m", digest="m")
    made = convert_figures.group_planned(replace(PLANNED, runner=bare, memory=None))
    assert made.HasField("runner")
    assert made.runner == it.RunnerOptions()
    assert made.digest == ""
    assert not made.HasField("shift")
    assert not made.HasField("memory")
    unloaded = convert_figures.group_planned(replace(PLANNED, measured_bytes=0))
    assert not unloaded.memory.HasField("measured_bytes")
