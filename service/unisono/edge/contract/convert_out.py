"""What happens to a batch → messages of the contract.

Absent stays absent. Times are exact to the nanosecond. Text that came from a backend or a caller is made fit for
messages, which hold no half of a surrogate pair; everything else is taken over as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.core import events, report
from unisono.core.commands import ReleaseReason
from unisono.core.events import BatchState, LoadState
from unisono.core.model import FinishReason, ItemState
from unisono.edge.contract.convert_figures import batch_report, group_planned, progress
from unisono.edge.contract.wire import MOST, duration, embedding, maybe, timestamp, word
from unisono.edge.status import cut, to_status, utf8

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.rpc.status_pb2 import Status

    from unisono.core import model as core
    from unisono.core.batch import Ack
    from unisono.core.errors import UnisonoError

# Bytes of an error among others in one message: as many as stand there by the contract stay below 4 MiB.
ACK_ERROR_BYTES: Final = 4096
# An id that is longer was refused, and comes back cut: it would make a message too large to be sent.
ID_BYTES: Final = 256

_ITEM_STATES: Final = {one: event_pb2.ItemState.Value(f"ITEM_STATE_{word(one)}") for one in ItemState}
_BATCH_STATES: Final = {one: event_pb2.BatchState.Value(f"BATCH_STATE_{word(one)}") for one in BatchState}
_LOAD_STATES: Final = {one: event_pb2.Loading.State.Value(f"STATE_{word(one)}") for one in LoadState}
_FINISH_REASONS: Final = {one: item_pb2.FinishReason.Value(f"FINISH_REASON_{word(one)}") for one in FinishReason}
RELEASE_REASONS: Final = {one: event_pb2.ReleaseReason.Value(f"RELEASE_REASON_{word(one)}") for one in ReleaseReason}


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


def _loading(event: events.Loading) -> event_pb2.Loading:
    return event_pb2.Loading(
        group=event.group,
        state=_LOAD_STATES[event.state],
        duration=maybe(event.duration_s),
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
        item_id=cut(event.item_id, ID_BYTES),
        index=event.index,
        state=_ITEM_STATES[event.state],
        completion=None if event.completion is None else _completion(event.completion),
        error=_error(event.error),
        usage=None if event.usage is None else _usage(event.usage),
        timings=None if event.timings is None else _timings(event.timings),
        attempts=event.attempts,
        shared_with=event.shared_with,
        passes=min(event.passes, MOST),
        group=event.group,
        parts=event.parts,
        variant_of=cut(event.variant_of, ID_BYTES),
        release_reason=_release_reason(event.release_reason),
        disturbed=event.disturbed,
    )


def _release_reason(reason: ReleaseReason | None) -> event_pb2.ReleaseReason.ValueType:
    return event_pb2.RELEASE_REASON_UNSPECIFIED if reason is None else RELEASE_REASONS[reason]


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


def _usage(usage: core.Usage) -> item_pb2.Usage:
    cached = usage.cached_prompt_tokens
    return item_pb2.Usage(
        prompt_tokens=min(usage.prompt_tokens, MOST),
        cached_prompt_tokens=None if cached is None else min(cached, MOST),
        completion_tokens=min(usage.completion_tokens, MOST),
    )


def _timings(timings: core.Timings) -> item_pb2.Timings:
    return item_pb2.Timings(
        queued=maybe(timings.queued_s),
        slot_wait=maybe(timings.slot_wait_s),
        load=maybe(timings.load_s),
        prompt_eval=maybe(timings.prompt_eval_s),
        eval=maybe(timings.eval_s),
        first_token=maybe(timings.first_token_s),
        total=maybe(timings.total_s),
    )


def acknowledgement(ack: Ack, prefix: str = "") -> pb.ItemAcknowledged:
    """What became of an added item; `prefix` goes before the paths of its fields."""
    refusal = None if ack.refusal is None else to_status(ack.refusal, prefix, max_bytes=ACK_ERROR_BYTES)
    return pb.ItemAcknowledged(item_id=cut(ack.item_id, ID_BYTES), index=ack.index, refusal=refusal)
