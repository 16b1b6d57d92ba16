"""Reports, plans and the state of the service reach the caller as they are; what nobody knows stays absent."""

from __future__ import annotations

from dataclasses import fields, replace

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from tests.unit.edge.samples import (
    GROUP,
    GROUP_REPORT,
    INFO,
    LOADED,
    NOW_NS,
    PLANNED,
    PROGRESS,
    REPORT,
    STATE,
    WARNED,
    WRONG,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2 as ev
from unisono._generated.unisono.v1 import server_pb2 as srv
from unisono.core import model, passes, report
from unisono.core.batch import Ack
from unisono.core.commands import ReleaseReason
from unisono.core.limits import Limits
from unisono.edge.contract import convert_figures, convert_out, convert_server


def test_progress_has_the_same_names_on_both_sides() -> None:
    """And the same numbers."""
    made = convert_figures.progress(PROGRESS)
    assert {field.name: getattr(PROGRESS, field.name) for field in fields(PROGRESS)} == {
        field.name: value for field, value in made.ListFields()
    }


def test_a_report_is_told_as_it_is() -> None:
    """Each figure in its field."""
    assert convert_figures.batch_report(REPORT) == ev.Report(
        batch_id="batch-1",
        duration=Duration(seconds=33, nanos=500_000_000),
        counts=convert_figures.progress(PROGRESS),
        prompt_tokens=1001,
        cached_prompt_tokens=0,
        completion_tokens=701,
        retries=5,
        journal_bytes=2**35,
        counted_since=Timestamp(seconds=1_700_000_000, nanos=123_456_789),
        groups=[
            ev.GroupReport(
                group=convert_figures.group_planned(PLANNED),
                passes=ev.PassCount(count=100, method=ev.PASS_METHOD_ARRIVAL, imputed_share=0.125, confidence=0.75),
                fewest_passes=90,
                items_per_pass=7.0,
                waves=3,
                first_wave=ev.WaveReport(
                    item_count=8,
                    release_spread=Duration(nanos=840_000),
                    first_token_spread=Duration(nanos=2_000_000),
                ),
                loads=1,
                load_duration=Duration(seconds=2, nanos=500_000_000),
                duration=Duration(seconds=30),
                prompt_tokens=1000,
                completion_tokens=700,
                cached_prompt_tokens=300,
                idle=[
                    ev.SlotIdle(reason=ev.IDLE_REASON_REFILL, slot_time=Duration(nanos=250_000_000)),
                    ev.SlotIdle(reason=ev.IDLE_REASON_NO_ITEMS, slot_time=Duration(seconds=12)),
                ],
                costs=ev.CostModel(
                    **{"pass": Duration(nanos=20_000_000)},
                    token=Duration(nanos=1_000_000),
                    prompt_token=Duration(nanos=500_000),
                    passes_measured=77,
                    single_stream_token=Duration(nanos=21_000_000),
                ),
                one_at_a_time=Duration(seconds=90),
                gain=3.0,
                families=[ev.FamilyReport(prefix_tokens=620, item_count=16, computed=2)],
                context_used=0.625,
                runner_deaths=3,
            )
        ],
    )


def test_figures_that_nobody_knows_are_absent() -> None:
    """Of a group that never ran, and of a batch whose backends do not tell."""
    group = replace(
        GROUP_REPORT,
        passes=passes.PassCount(count=0, method=model.PassMethod.CREATED_AT, imputed_share=0.0, confidence=1.0),
        fewest_passes=None,
        first_wave=None,
        duration_s=None,
        cached_prompt_tokens=None,
        costs=None,
        one_at_a_time_s=None,
        context_used=None,
    )
    made = convert_figures.group_report(group)
    absent = ["fewest_passes", "items_per_pass", "first_wave", "duration"]
    absent += ["cached_prompt_tokens", "costs", "one_at_a_time", "gain", "context_used"]
    assert not any(made.HasField(name) for name in absent)  # type: ignore[arg-type]  # fields, all of them
    assert made.passes.method == ev.PASS_METHOD_UNSPECIFIED
    alone = replace(
        GROUP_REPORT, first_wave=report.WaveReport(item_count=1, release_spread_s=0, first_token_spread_s=None)
    )
    assert not convert_figures.group_report(alone).first_wave.HasField("first_token_spread")
    assert not convert_figures.batch_report(replace(REPORT, cached_prompt_tokens=None)).HasField(
        "cached_prompt_tokens"
    )


def test_a_pass_names_its_items() -> None:
    """In the order in which they spoke."""
    one = passes.ForwardPass(number=7, at_ns=NOW_NS, members=(2, 0, 1))
    assert convert_figures.forward_pass(1, one) == pb.ForwardPass(
        group=1, number=7, time=Timestamp(seconds=1_700_000_000, nanos=123_456_789), item_indexes=[2, 0, 1]
    )


# -- Acknowledgements and plans --------------------------------------------------------------------------------


def test_an_accepted_item_has_a_place_and_a_refused_one_a_reason() -> None:
    """Place 0 is a place."""
    accepted = convert_out.acknowledgement(Ack(item_id="a", index=0))
    assert accepted.HasField("index")
    assert not accepted.HasField("refusal")
    refused = convert_out.acknowledgement(Ack(item_id="a", refusal=WRONG), "add_items.items[2].")
    assert not refused.HasField("index")
    assert field_of(refused.refusal) == "add_items.items[2].item_id"


def field_of(status: status_pb2.Status) -> str:
    """The one field that a status names."""
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    (one,) = bad.field_violations
    return one.field


def test_a_plan_names_items_and_fields_of_the_request() -> None:
    """The group whole, the ids of this page, the paths from the request on."""
    made = convert_server.group_plan(1, GROUP, STATE, [("i1", ReleaseReason.TAIL)])
    assert made == srv.GroupPlan(
        group=ev.GroupPlanned(
            group=1,
            backend="local",
            model="m:1b",
            digest="sha",
            runner=made.group.runner,
            item_count=3,
            loaded=True,
            slots=made.group.slots,
            shift=False,
            context_reason="4,096 tokens: asked for",
            memory=ev.MemoryEstimate(
                weights_bytes=2**31, kv_cache_bytes=2**31, context_length=4096, slots=8, measured_bytes=2**32
            ),
        ),
        item_ids=["i1"],
        estimated_prompt_tokens=30,
        max_completion_tokens=48,
        reason="it is loaded",
        families=[srv.FamilyPlan(estimated_prefix_tokens=620, item_count=2, example_item_id="i0")],
        release_reasons=[ev.RELEASE_REASON_TAIL],
    )
    assert made.group.slots.limit == 6
    endless = replace(GROUP, items=(replace(GROUP.items[0], options=model.Options()),), prefixes=(None,))
    assert not convert_server.group_plan(1, endless, STATE, []).HasField("max_completion_tokens")
    assert convert_server.plan_warning(WARNED, "items[1].").field == "items[1].options.runner.num_ctx"
    assert convert_server.plan_warning(replace(WARNED, field=""), "items[1].").field == ""
    refusal = convert_server.plan_refusal("a", 5, WRONG)
    assert (refusal.item_id, refusal.index, field_of(refusal.error)) == ("a", 5, "items[5].item_id")


# -- The service -----------------------------------------------------------------------------------------------


def test_a_model_is_told_as_it_is() -> None:
    """Capabilities in one order; a digest that the backend did not tell is absent."""
    assert convert_server.model(INFO) == srv.Model(
        backend="local",
        name="m:1b",
        digest="sha",
        family="llama",
        parameter_size="1.2B",
        quantization="Q4_K_M",
        context_length=8192,
        capabilities=["completion", "tools"],
        size_bytes=2**31,
    )
    unknown = convert_server.model(replace(INFO, digest="m:1b", capabilities=None))
    assert (unknown.digest, list(unknown.capabilities)) == ("", [])


def test_a_runner_has_the_slots_that_are_known_best() -> None:
    """What was seen here, or else what the backend tells, or else nothing."""
    made = convert_server.runner_status(LOADED)
    assert made == srv.RunnerStatus(
        model="m:1b",
        digest="sha",
        context_length=4096,
        size_bytes=2**33,
        size_vram_bytes=2**32,
        expires_at=Timestamp(seconds=1_700_000_000, nanos=123_456_789),
        slots=ev.SlotCount(count=4, source=ev.SLOT_SOURCE_TOLD),
    )
    assert convert_server.runner_status(LOADED, STATE).slots.source == ev.SLOT_SOURCE_LEARNED
    silent = convert_server.runner_status(replace(LOADED, slots=None, expires_at_ns=None))
    assert silent.slots == ev.SlotCount()
    assert not silent.HasField("expires_at")
    shown = convert_server.runner_status(LOADED, model.SlotState(at_least=3, limit=8))
    assert shown.slots == ev.SlotCount(at_least=3, limit=8)


def test_runners_of_a_model_are_those_loaded_and_those_learned() -> None:
    """Each once; a loaded one with what was learned of it; of a backend, the loaded ones only."""
    four = model.RunnerSpec(backend="local", model="m:1b", digest="sha", options=model.RunnerOptions(num_ctx=4096))
    eight = replace(four, options=model.RunnerOptions(num_ctx=8192))
    other = replace(four, model="n", digest="other")
    known = {
        four: STATE,
        eight: model.SlotState(slots=model.Slots(count=2, source=model.SlotSource.LEARNED)),
        other: STATE,
        replace(four, shift=False): model.SlotState(),
    }
    loaded = [LOADED, replace(LOADED, model="n", digest="other", slots=None)]
    mine = convert_server.runners("sha", loaded, known)
    assert [(one.model, one.context_length, one.slots.count) for one in mine] == [
        ("m:1b", 4096, 8),
        ("m:1b", 8192, 2),
    ]
    everyone = convert_server.runners(None, loaded, known)
    assert [(one.model, one.slots.count) for one in everyone] == [("m:1b", 8), ("n", 8)]
    assert [one.slots.source for one in convert_server.runners("sha", [LOADED], {})] == [ev.SLOT_SOURCE_TOLD]


def test_limits_are_told_as_they_are() -> None:
    """Those of the service, and those of its messages."""
    limits = Limits(max_items=1, max_item_text_bytes=2, max_image_bytes=3, max_batches=6, max_journal_bytes=7)
    assert convert_server.server_limits(limits, max_receive_bytes=4, max_send_bytes=5) == srv.ServerLimits(
        max_items=1,
        max_item_text_bytes=2,
        max_image_bytes=3,
        max_receive_bytes=4,
        max_send_bytes=5,
        max_batches=6,
        max_journal_bytes=7,
    )
