"""Values of the core → messages of the contract.

Absent stays absent. Times are exact to the nanosecond. Text that came from a backend or a caller is made fit for
messages, which hold no half of a surrogate pair; everything else is taken over as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2, server_pb2
from unisono.core import events, report
from unisono.core import model as core
from unisono.core.events import BatchState, LoadState
from unisono.core.model import FinishReason, ItemState, PassMethod, SlotSource
from unisono.edge.grpc.wire import duration, embedding, timestamp
from unisono.edge.status import cut, to_status, utf8

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from enum import Enum

    from google.protobuf.duration_pb2 import Duration
    from google.rpc.status_pb2 import Status

    from unisono.core import passes, plan
    from unisono.core.batch import Ack
    from unisono.core.errors import UnisonoError
    from unisono.core.limits import Limits

# Bytes of an error among others in one message: as many as stand there by the contract stay below 4 MiB.
ACK_ERROR_BYTES: Final = 4096
PLAN_ERROR_BYTES: Final = 1024
# An id that is longer was refused, and comes back cut: it would make a message too large to be sent.
_ID_BYTES: Final = 256
_WARNING_BYTES: Final = 1024


def _name(one: Enum) -> str:
    """The contract's word for a value of an enum: the same, but for what is not known."""
    return "UNSPECIFIED" if one.name == "UNKNOWN" else one.name


_ITEM_STATES: Final = {one: event_pb2.ItemState.Value(f"ITEM_STATE_{_name(one)}") for one in ItemState}
_BATCH_STATES: Final = {one: event_pb2.BatchState.Value(f"BATCH_STATE_{_name(one)}") for one in BatchState}
_LOAD_STATES: Final = {one: event_pb2.Loading.State.Value(f"STATE_{_name(one)}") for one in LoadState}
_FINISH_REASONS: Final = {one: item_pb2.FinishReason.Value(f"FINISH_REASON_{_name(one)}") for one in FinishReason}
_SLOT_SOURCES: Final = {one: event_pb2.SlotSource.Value(f"SLOT_SOURCE_{_name(one)}") for one in SlotSource}
_PASS_METHODS: Final = {one: event_pb2.PassMethod.Value(f"PASS_METHOD_{_name(one)}") for one in PassMethod}


def _maybe(seconds: float | None) -> Duration | None:
    return None if seconds is None else duration(seconds)


def _error(error: UnisonoError | None) -> Status | None:
    return None if error is None else to_status(error)


# -- Events ----------------------------------------------------------------------------------------------------


def batch_event(event: events.Journalled | events.PassingEvent, at_ns: int) -> event_pb2.BatchEvent:
    """An event as it is streamed; `at_ns` is the time of one that passes, a lasting one has its own."""
    match event:
        case events.Journalled():
            made = _lasting(event.event)
            made.sequence = event.sequence
            made.time.CopyFrom(timestamp(event.at_ns))
            return made
        case events.Deltas():
            said = event_pb2.Deltas(items=[_delta(delta) for delta in event.items])
            return event_pb2.BatchEvent(time=timestamp(at_ns), deltas=said)
        case events.Heartbeat():
            return event_pb2.BatchEvent(time=timestamp(at_ns), heartbeat=event_pb2.Heartbeat())


def _lasting(event: events.LastingEvent) -> event_pb2.BatchEvent:
    match event:
        case events.Result():
            return event_pb2.BatchEvent(result=result(event))
        case events.ResultPart():
            return event_pb2.BatchEvent(result_part=_result_part(event))
        case report.Progress():
            return event_pb2.BatchEvent(progress=progress(event))
        case events.Released():
            return event_pb2.BatchEvent(released=_released(event))
        case report.GroupPlanned():
            return event_pb2.BatchEvent(group_planned=group_planned(event))
        case events.Loading():
            return event_pb2.BatchEvent(loading=_loading(event))
        case events.Accepted():
            accepted = event_pb2.Accepted(batch_id=event.batch_id, item_count=event.item_count)
            return event_pb2.BatchEvent(accepted=accepted)
        case events.Summary():
            return event_pb2.BatchEvent(summary=_summary(event))


def group_planned(planned: report.GroupPlanned) -> event_pb2.GroupPlanned:
    """Items of one runner."""
    runner = planned.runner
    return event_pb2.GroupPlanned(
        group=planned.group,
        backend=runner.backend,
        model=utf8(runner.model),
        digest=_digest(runner.digest, runner.model),
        runner=_runner_options(runner.options),
        item_count=planned.item_count,
        loaded=planned.is_loaded,
        slots=slot_count(planned.slots),
        shift=runner.shift,
    )


def slot_count(slots: core.Slots) -> event_pb2.SlotCount:
    """Slots of a runner."""
    return event_pb2.SlotCount(count=slots.count, source=_SLOT_SOURCES[slots.source])


def _digest(digest: str, name: str) -> str:
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


def _loading(event: events.Loading) -> event_pb2.Loading:
    return event_pb2.Loading(
        group=event.group,
        state=_LOAD_STATES[event.state],
        duration=_maybe(event.duration_s),
        error=_error(event.error),
    )


def _released(event: events.Released) -> event_pb2.Released:
    return event_pb2.Released(
        group=event.group,
        wave=event.wave,
        item_count=event.item_count,
        others=event.others,
        spread=duration(event.spread_s),
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


def _summary(event: events.Summary) -> event_pb2.Summary:
    return event_pb2.Summary(
        state=_BATCH_STATES[event.state], report=batch_report(event.report), error=_error(event.error)
    )


def _delta(delta: events.Delta) -> event_pb2.Delta:
    return event_pb2.Delta(
        item_id=delta.item_id,
        index=delta.index,
        attempt=delta.attempt,
        content_offset=delta.content_offset,
        content=utf8(delta.content),
        thinking_offset=delta.thinking_offset,
        thinking=utf8(delta.thinking),
    )


# -- Results ---------------------------------------------------------------------------------------------------


def result(event: events.Result) -> event_pb2.Result:
    """How an item ended."""
    return event_pb2.Result(
        item_id=cut(event.item_id, _ID_BYTES),
        index=event.index,
        state=_ITEM_STATES[event.state],
        completion=None if event.completion is None else _completion(event.completion),
        error=_error(event.error),
        usage=None if event.usage is None else _usage(event.usage),
        timings=None if event.timings is None else _timings(event.timings),
        attempts=event.attempts,
        shared_with=event.shared_with,
        passes=min(event.passes, _MOST),
        group=event.group,
        parts=event.parts,
    )


def _result_part(event: events.ResultPart) -> event_pb2.ResultPart:
    return event_pb2.ResultPart(
        item_id=event.item_id,
        index=event.index,
        part=event.part,
        content=utf8(event.content),
        thinking=utf8(event.thinking),
        embeddings=[embedding(vector) for vector in event.embeddings],
        logprobs=_logprobs(event.logprobs),
    )


def _completion(done: core.Completion) -> item_pb2.Completion:
    return item_pb2.Completion(
        model=utf8(done.model),
        content=utf8(done.content),
        thinking=utf8(done.thinking),
        tool_calls=[
            item_pb2.ToolCall(id=utf8(call.id), name=utf8(call.name), arguments_json=utf8(call.arguments_json))
            for call in done.tool_calls
        ],
        finish_reason=_FINISH_REASONS[done.finish_reason],
        finish_reason_raw=utf8(done.finish_reason_raw),
        logprobs=_logprobs(done.logprobs),
        embeddings=[embedding(vector) for vector in done.embeddings],
    )


def _logprobs(tokens: Iterable[core.TokenLogprob]) -> list[item_pb2.TokenLogprob]:
    return [
        item_pb2.TokenLogprob(
            token=utf8(one.token), logprob=one.logprob, bytes=one.bytes, top=_logprobs(one.top) if one.top else None
        )
        for one in tokens
    ]


# What a field of 32 bits holds: a backend may tell any number.
_MOST = 2**32 - 1


def _usage(usage: core.Usage) -> item_pb2.Usage:
    cached = usage.cached_prompt_tokens
    return item_pb2.Usage(
        prompt_tokens=min(usage.prompt_tokens, _MOST),
        cached_prompt_tokens=None if cached is None else min(cached, _MOST),
        completion_tokens=min(usage.completion_tokens, _MOST),
    )


def _timings(timings: core.Timings) -> item_pb2.Timings:
    return item_pb2.Timings(
        queued=_maybe(timings.queued_s),
        slot_wait=_maybe(timings.slot_wait_s),
        load=_maybe(timings.load_s),
        prompt_eval=_maybe(timings.prompt_eval_s),
        eval=_maybe(timings.eval_s),
        first_token=_maybe(timings.first_token_s),
        total=_maybe(timings.total_s),
    )


def acknowledgement(ack: Ack, prefix: str = "") -> pb.ItemAcknowledged:
    """What became of an added item; `prefix` goes before the paths of its fields."""
    refusal = None if ack.refusal is None else to_status(ack.refusal, prefix, max_bytes=ACK_ERROR_BYTES)
    return pb.ItemAcknowledged(item_id=cut(ack.item_id, _ID_BYTES), index=ack.index, refusal=refusal)


# -- Reports ---------------------------------------------------------------------------------------------------


def batch_report(figures: report.Report) -> event_pb2.Report:
    """The figures of a batch."""
    return event_pb2.Report(
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
        duration=_maybe(figures.duration_s),
        completion_tokens=figures.completion_tokens,
        prompt_tokens=figures.prompt_tokens,
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
        first_token_spread=_maybe(wave.first_token_spread_s),
    )


def forward_pass(group: int, one: passes.ForwardPass) -> pb.ForwardPass:
    """One pass of a group."""
    return pb.ForwardPass(group=group, number=one.number, time=timestamp(one.at_ns), item_indexes=one.members)


# -- Plans -----------------------------------------------------------------------------------------------------


def group_plan(number: int, group: plan.Group, slots: core.Slots, item_ids: Iterable[str]) -> server_pb2.GroupPlan:
    """A group as planned, with those of its items' ids that stand on this page."""
    planned = report.GroupPlanned(
        group=number, runner=group.runner, item_count=len(group.items), is_loaded=group.is_loaded, slots=slots
    )
    return server_pb2.GroupPlan(
        group=group_planned(planned),
        item_ids=item_ids,
        estimated_prompt_tokens=group.estimated_prompt_tokens,
        max_completion_tokens=group.max_completion_tokens,
        reason=utf8(group.reason),
    )


def plan_warning(warned: plan.Warned, prefix: str = "") -> server_pb2.PlanWarning:
    """Something that will work, but perhaps not as meant; `prefix` ("items[3].") goes before the field's path."""
    return server_pb2.PlanWarning(
        item_id=cut(warned.item_id, _ID_BYTES),
        field=prefix + warned.field if warned.field else "",
        reason=warned.reason,
        message=cut(warned.message, _WARNING_BYTES),
    )


def plan_refusal(item_id: str, index: int, error: UnisonoError) -> server_pb2.PlanRefusal:
    """An item of a request that would fail at once; the paths of its fields are those of the request."""
    status = to_status(error, f"items[{index}].", max_bytes=PLAN_ERROR_BYTES)
    return server_pb2.PlanRefusal(item_id=cut(item_id, _ID_BYTES), index=index, error=status)


# -- The service -----------------------------------------------------------------------------------------------


def model(info: core.ModelInfo, runners: Iterable[server_pb2.RunnerStatus] = ()) -> server_pb2.Model:
    """A model that a backend can load, with the runners of it that are known."""
    return server_pb2.Model(
        backend=info.backend,
        name=utf8(info.name),
        digest=_digest(info.digest, info.name),
        family=utf8(info.family),
        parameter_size=utf8(info.parameter_size),
        quantization=utf8(info.quantization),
        context_length=info.context_length,
        capabilities=sorted(map(utf8, info.capabilities or ())),
        size_bytes=info.size_bytes,
        runners=runners,
    )


def runner_status(loaded: core.LoadedRunner, slots: core.Slots | None = None) -> server_pb2.RunnerStatus:
    """A model in a backend's memory, with its slots: as known here, or else as the backend tells."""
    if slots is None:
        told = loaded.slots or 0
        slots = core.Slots(count=told, source=SlotSource.TOLD if told else SlotSource.UNKNOWN)
    return server_pb2.RunnerStatus(
        model=utf8(loaded.model),
        digest=_digest(loaded.digest, loaded.model),
        context_length=loaded.context_length,
        size_bytes=loaded.size_bytes,
        size_vram_bytes=loaded.size_vram_bytes,
        expires_at=None if loaded.expires_at_ns is None else timestamp(loaded.expires_at_ns),
        slots=slot_count(slots),
    )


def runners(
    digest: str | None, loaded: Iterable[core.LoadedRunner], known: Mapping[core.RunnerSpec, core.Slots]
) -> list[server_pb2.RunnerStatus]:
    """The runners of one model, by its digest: those in memory, then others whose slots are known.

    None: of all models, those in memory alone. `known` is what one backend's runners have shown.
    """
    rows: list[server_pb2.RunnerStatus] = []
    left = {spec: slots for spec, slots in known.items() if slots.count}
    for there in loaded:
        if digest in (None, there.digest):
            own = [spec for spec in left if _is(spec, there)]
            rows.append(runner_status(there, left[own[0]] if own else None))
            for spec in own:
                del left[spec]
    for spec, slots in left.items():
        if digest == spec.digest:
            gone = core.LoadedRunner(model=spec.model, digest=spec.digest, context_length=spec.options.num_ctx or 0)
            rows.append(runner_status(gone, slots))
    return rows


def _is(spec: core.RunnerSpec, there: core.LoadedRunner) -> bool:
    """Whether what is in memory is this runner, as far as a backend tells."""
    return spec.digest == there.digest and spec.options.num_ctx in (None, there.context_length)


def server_limits(limits: Limits, *, max_receive_bytes: int, max_send_bytes: int) -> server_pb2.ServerLimits:
    """The limits of the service, with those of its messages."""
    return server_pb2.ServerLimits(
        max_items=limits.max_items,
        max_item_text_bytes=limits.max_item_text_bytes,
        max_image_bytes=limits.max_image_bytes,
        max_receive_bytes=max_receive_bytes,
        max_send_bytes=max_send_bytes,
        max_batches=limits.max_batches,
        max_journal_bytes=limits.max_journal_bytes,
    )
