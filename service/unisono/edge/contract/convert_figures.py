"""Figures of batches and groups → messages of the contract; what nobody knows stays absent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.core import model as core
from unisono.core.idle import IdleReason
from unisono.core.model import PassMethod, SlotSource
from unisono.edge.contract.wire import duration, maybe, timestamp, word
from unisono.edge.status import utf8

if TYPE_CHECKING:
    from unisono.core import passes, report
    from unisono.core.memory import MemoryEstimate

# Families of a group that are told one by one.
MAX_FAMILIES: Final = 100

_SLOT_SOURCES: Final = {one: event_pb2.SlotSource.Value(f"SLOT_SOURCE_{word(one)}") for one in SlotSource}
_PASS_METHODS: Final = {one: event_pb2.PassMethod.Value(f"PASS_METHOD_{word(one)}") for one in PassMethod}
_IDLE_REASONS: Final = {one: event_pb2.IdleReason.Value(f"IDLE_REASON_{word(one)}") for one in IdleReason}
_NO_STATE: Final = core.SlotState()


def group_planned(planned: report.GroupPlanned) -> event_pb2.GroupPlanned:
    """Items of one runner."""
    runner = planned.runner
    return event_pb2.GroupPlanned(
        group=planned.group,
        backend=runner.backend,
        model=utf8(runner.model),
        digest=digest_of(runner.digest, runner.model),
        runner=_runner_options(runner.options),
        item_count=planned.item_count,
        loaded=planned.is_loaded,
        slots=slot_count(planned.slots, planned.state),
        shift=runner.shift,
        context_reason=utf8(planned.context_reason),
        memory=None if planned.memory is None else _memory(planned.memory, planned.measured_bytes),
    )


def _memory(estimated: MemoryEstimate, measured_bytes: int) -> event_pb2.MemoryEstimate:
    return event_pb2.MemoryEstimate(
        weights_bytes=estimated.weights_bytes,
        kv_cache_bytes=estimated.kv_cache_bytes,
        context_length=estimated.context_tokens,
        slots=estimated.slots,
        measured_bytes=measured_bytes or None,
    )


def slot_count(slots: core.Slots, state: core.SlotState = _NO_STATE) -> event_pb2.SlotCount:
    """Slots of a runner, and what else is known of them."""
    return event_pb2.SlotCount(
        count=slots.count,
        source=_SLOT_SOURCES[slots.source],
        at_least=state.at_least,
        limit=state.limit,
        reason=utf8(state.reason),
        remedy=utf8(state.remedy),
    )


def digest_of(digest: str, name: str) -> str:
    """Empty where the core holds the name, since the backend tells no digest."""
    return "" if digest == name else utf8(digest)


def _runner_options(options: core.RunnerOptions) -> item_pb2.RunnerOptions:
    return item_pb2.RunnerOptions(
        num_ctx=options.num_ctx,
        num_batch=options.num_batch,
        num_gpu=options.num_gpu,
        main_gpu=options.main_gpu,
        use_mmap=options.use_mmap,
        num_thread=options.num_thread,
        draft_num_predict=options.draft_num_predict,
    )


def progress(event: report.Progress) -> event_pb2.Progress:
    """How far a batch is."""
    return event_pb2.Progress(
        accepted=event.accepted,
        queued=event.queued,
        in_flight=event.in_flight,
        completed=event.completed,
        failed=event.failed,
        cancelled=event.cancelled,
        expired=event.expired,
        completion_tokens=event.completion_tokens,
        passes=event.passes,
    )


# -- Reports ---------------------------------------------------------------------------------------------------


def batch_report(figures: report.Report) -> event_pb2.Report:
    """The figures of a batch."""
    message = event_pb2.Report(
        batch_id=figures.batch_id,
        duration=duration(figures.duration_s),
        counts=progress(figures.counts),
        prompt_tokens=figures.prompt_tokens,
        cached_prompt_tokens=figures.cached_prompt_tokens,
        completion_tokens=figures.completion_tokens,
        groups=[group_report(group) for group in figures.groups],
        retries=figures.retries,
        journal_bytes=figures.journal_bytes,
    )
    if figures.counted_since_ns is not None:
        message.counted_since.FromNanoseconds(figures.counted_since_ns)
    return message


def group_report(figures: report.GroupReport) -> event_pb2.GroupReport:
    """The figures of a group."""
    return event_pb2.GroupReport(
        group=group_planned(figures.group),
        passes=_pass_count(figures.passes),
        fewest_passes=figures.fewest_passes,
        items_per_pass=figures.items_per_pass,
        waves=figures.waves,
        first_wave=None if figures.first_wave is None else _wave_report(figures.first_wave),
        loads=figures.loads,
        load_duration=duration(figures.load_s),
        duration=maybe(figures.duration_s),
        completion_tokens=figures.completion_tokens,
        prompt_tokens=figures.prompt_tokens,
        cached_prompt_tokens=figures.cached_prompt_tokens,
        idle=[
            event_pb2.SlotIdle(reason=_IDLE_REASONS[reason], slot_time=duration(idle_s))
            for reason, idle_s in figures.idle_s
        ],
        costs=None if figures.costs is None else _cost_model(figures.costs),
        one_at_a_time=maybe(figures.one_at_a_time_s),
        gain=figures.gain,
        families=[_family_report(family) for family in figures.families[:MAX_FAMILIES]],
        context_used=figures.context_used,
        runner_deaths=figures.runner_deaths,
    )


def _cost_model(costs: report.Costs) -> event_pb2.CostModel:
    return event_pb2.CostModel(
        # Called `pass` in the contract, which is a word of Python's own.
        **{"pass": duration(costs.pass_s)},
        token=duration(costs.token_s),
        prompt_token=maybe(costs.prompt_token_s),
        passes_measured=costs.passes_measured,
        single_stream_token=maybe(costs.single_stream_token_s),
    )


def _family_report(family: report.FamilyReport) -> event_pb2.FamilyReport:
    return event_pb2.FamilyReport(
        prefix_tokens=family.prefix_tokens, item_count=family.item_count, computed=family.computed
    )


def _pass_count(counted: passes.PassCount) -> event_pb2.PassCount:
    return event_pb2.PassCount(
        count=counted.count,
        # The contract has a word for "nothing to count", such as the passes of embeddings.
        method=_PASS_METHODS[counted.method] if counted.count else event_pb2.PASS_METHOD_UNSPECIFIED,
        imputed_share=counted.imputed_share,
        confidence=counted.confidence,
    )


def _wave_report(wave: report.WaveReport) -> event_pb2.WaveReport:
    return event_pb2.WaveReport(
        item_count=wave.item_count,
        release_spread=duration(wave.release_spread_s),
        first_token_spread=maybe(wave.first_token_spread_s),
    )


def forward_pass(group: int, one: passes.ForwardPass) -> pb.ForwardPass:
    """One pass of a group."""
    return pb.ForwardPass(group=group, number=one.number, time=timestamp(one.at_ns), item_indexes=one.members)
