"""What applies to a whole batch → a value of the core.

Absent fields get the defaults of `core/batch.py`. All that is wrong is listed, with paths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.core import batch, limits, model
from unisono.core.batch import ContextPolicy, CoScheduling
from unisono.core.commands import Priority
from unisono.edge.contract.convert_in import LIMITS, messages_of, options_of
from unisono.edge.contract.found import Found

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.duration_pb2 import Duration

# Spans above a century are slips; backends count in nanoseconds of 64 bits, which end at 292 years.
LONGEST_SPAN_S: Final = 100 * 366 * 86_400
MAX_ATTEMPTS: Final = 10
MAX_REQUEST_ID_BYTES: Final = 256
MAX_FLUSH_BYTES: Final = 1024 * 1024
FLUSH_INTERVALS_S: Final = (0.01, 10.0)
MAX_WEIGHT: Final = 100

_STRICT: Final[Mapping[int, bool]] = {
    pb.VALIDATION_MODE_UNSPECIFIED: True,
    pb.VALIDATION_MODE_STRICT: True,
    pb.VALIDATION_MODE_PER_ITEM: False,
}
_DETACHES: Final[Mapping[int, bool]] = {
    pb.ON_DISCONNECT_UNSPECIFIED: False,
    pb.ON_DISCONNECT_CANCEL: False,
    pb.ON_DISCONNECT_DETACH: True,
}
_CO_SCHEDULINGS: Final[Mapping[int, CoScheduling]] = {
    pb.CO_SCHEDULING_UNSPECIFIED: CoScheduling.FASTEST,
    pb.CO_SCHEDULING_FASTEST: CoScheduling.FASTEST,
    pb.CO_SCHEDULING_TOGETHER: CoScheduling.TOGETHER,
    pb.CO_SCHEDULING_REQUIRED: CoScheduling.REQUIRED,
}
# Those that release many items in one moment, and what each does.
_RELEASED_AT_ONCE: Final[Mapping[int, str]] = {
    pb.CO_SCHEDULING_TOGETHER: "TOGETHER, which fills all slots",
    pb.CO_SCHEDULING_REQUIRED: "REQUIRED, which releases all items",
}
_CONTEXT_POLICIES: Final[Mapping[int, ContextPolicy]] = {
    pb.CONTEXT_POLICY_UNSPECIFIED: ContextPolicy.HARMONISE,
    pb.CONTEXT_POLICY_HARMONISE: ContextPolicy.HARMONISE,
    pb.CONTEXT_POLICY_SEPARATE: ContextPolicy.SEPARATE,
    pb.CONTEXT_POLICY_REJECT: ContextPolicy.REJECT,
}
_PRIORITIES: Final[Mapping[int, Priority]] = {
    pb.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    pb.PRIORITY_LOW: Priority.LOW,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_HIGH: Priority.HIGH,
}
_DEFAULTS: Final = batch.BatchConfig()


def config(message: pb.BatchConfig, *, path: str = "config", bounds: limits.Limits = LIMITS) -> batch.BatchConfig:
    """What applies to the batch; deltas are checked, too, and read by `delta_settings`.

    Raises InvalidRequestError with all that is wrong, its paths beginning with `path`.
    """
    found = Found()
    options = model.Options()
    if message.HasField("options"):
        options = options_of(message.options, "options", found)
        found.violations += limits.check_options(options, bounds)
    found.violations += limits.check_model(message.model, bounds)
    if message.max_attempts > MAX_ATTEMPTS or (message.HasField("max_attempts") and not message.max_attempts):
        found.add("max_attempts", f"is {message.max_attempts}; it may be 1 to {MAX_ATTEMPTS}")
    if (size := len(message.request_id.encode())) > MAX_REQUEST_ID_BYTES:
        found.add("request_id", f"has {size:,} bytes; at most {MAX_REQUEST_ID_BYTES} are taken")
    release = message.release
    if release.HasField("size") and not release.size:
        found.add("release.size", "is 0; it may be 1 or more")
    interval_s = _span(release, "interval", "release.interval", found)
    _ = _deltas(message, "deltas", found)
    max_concurrency, items_per_second, weight = _shares(message, found)
    made = batch.BatchConfig(
        model=message.model,
        options=options,
        keep_alive_s=_span(message, "keep_alive", "keep_alive", found),
        is_strict=found.choice(_STRICT, message.validation, "validation", "way to validate"),
        # 0 is no limit, as absent is; but for the item's, where absent is the service's setting.
        queue_timeout_s=_span(message, "queue_timeout", "queue_timeout", found) or None,
        item_timeout_s=_span(message, "item_timeout", "item_timeout", found),
        deadline_s=_span(message, "batch_deadline", "batch_deadline", found) or None,
        max_attempts=message.max_attempts or _DEFAULTS.max_attempts,
        detaches=found.choice(_DETACHES, message.on_disconnect, "on_disconnect", "way to go on"),
        detach_grace_s=_span(message, "detach_grace", "detach_grace", found),
        request_id=message.request_id,
        release_size=release.size or _DEFAULTS.release_size,
        release_interval_s=_DEFAULTS.release_interval_s if interval_s is None else interval_s,
        co_scheduling=found.choice(_CO_SCHEDULINGS, message.co_scheduling, "co_scheduling", "way to co-schedule"),
        context_policy=found.choice(_CONTEXT_POLICIES, message.context_policy, "context_policy", "context policy"),
        max_concurrency=max_concurrency,
        items_per_second=items_per_second,
        priority=found.choice(_PRIORITIES, message.priority, "priority", "priority"),
        weight=weight,
        shared_messages=_shared(message, found, bounds),
    )
    found.raise_if_any(path)
    return made


def _shares(message: pb.BatchConfig, found: Found) -> tuple[int | None, float | None, int]:
    """How much of the backends a batch may have: items at a time, items a second, and its weight."""
    max_concurrency = message.max_concurrency if message.HasField("max_concurrency") else None
    if max_concurrency == 0:
        found.add("max_concurrency", "is 0; it may be 1 or more")
    items_per_second = message.items_per_second if message.HasField("items_per_second") else None
    # Written so that NaN, which is no number, is refused too.
    if items_per_second is not None and not 0 < items_per_second < math.inf:
        found.add("items_per_second", f"is {items_per_second:g}; it must be above 0, and finite")
    elif items_per_second is not None and message.co_scheduling in _RELEASED_AT_ONCE:
        found.add(
            "items_per_second",
            f"cannot be kept with co_scheduling {_RELEASED_AT_ONCE[message.co_scheduling]} at one time: "
            "leave one of the two out, or ask for co_scheduling FASTEST",
        )
    weight = message.weight if message.HasField("weight") else _DEFAULTS.weight
    if not 1 <= weight <= MAX_WEIGHT:
        found.add("weight", f"is {weight:,}; it may be 1 to {MAX_WEIGHT}")
    return max_concurrency, items_per_second, weight


def _shared(message: pb.BatchConfig, found: Found, bounds: limits.Limits) -> tuple[model.Message, ...]:
    """The messages in front of all conversations."""
    asked, path = message.shared_context, "shared_context"
    found.refuse_unknown(asked, path, "a field")
    if len(asked.messages) > bounds.max_messages:
        # Converting them would itself be the harm.
        what = f"has {len(asked.messages):,} messages; at most {bounds.max_messages - 1:,} are taken"
        found.add(f"{path}.messages", what)
        return ()
    messages = messages_of(asked.messages, f"{path}.messages", found)
    found.violations += limits.check_shared(messages, bounds)
    return messages


_HoldsDeltas = pb.BatchConfig | pb.AttachBatchRequest | pb.ReopenBatch


def delta_settings(message: _HoldsDeltas, *, path: str | None = None) -> batch.DeltaSettings | None:
    """How text is to be sent as it is generated; None: not at all.

    Takes the message that holds `deltas`, since only that tells whether they are asked for. Raises
    InvalidRequestError, whose paths begin with `path`: "config" for a config, nothing for others, unless said.
    """
    found = Found()
    settings = _deltas(message, "deltas", found)
    found.raise_if_any(("config" if isinstance(message, pb.BatchConfig) else "") if path is None else path)
    return settings


def _deltas(
    message: pb.BatchConfig | pb.AttachBatchRequest | pb.ReopenBatch, path: str, found: Found
) -> batch.DeltaSettings | None:
    if not message.HasField("deltas"):
        return None
    made = batch.DeltaSettings()
    asked = message.deltas
    interval_s = _span(asked, "flush_interval", f"{path}.flush_interval", found)
    least_s, most_s = FLUSH_INTERVALS_S
    if interval_s is not None and not least_s <= interval_s <= most_s:
        found.add(f"{path}.flush_interval", f"is {interval_s:g} s; it may be 10 ms to 10 s")
    flush_bytes = asked.flush_bytes if asked.HasField("flush_bytes") else made.flush_bytes
    if not 1 <= flush_bytes <= MAX_FLUSH_BYTES:
        found.add(f"{path}.flush_bytes", f"is {flush_bytes:,}; it may be 1 to {MAX_FLUSH_BYTES:,}")
    return batch.DeltaSettings(
        flush_interval_s=made.flush_interval_s if interval_s is None else interval_s, flush_bytes=flush_bytes
    )


def _span(
    message: pb.BatchConfig | pb.ReleasePolicy | pb.DeltaConfig, name: str, path: str, found: Found
) -> float | None:
    """The seconds of a span of time; None where it is absent or wrong."""
    span: Duration | None = next((value for field, value in message.ListFields() if field.name == name), None)
    if span is None:
        return None
    seconds = span.seconds + span.nanos / 1e9
    if not -1_000_000_000 < span.nanos < 1_000_000_000 or span.seconds * span.nanos < 0:
        found.add(path, f"is no duration: {span.seconds:,} seconds and {span.nanos:,} nanoseconds")
    elif seconds < 0:
        found.add(path, f"is {seconds:g} s; it may not be negative")
    elif seconds > LONGEST_SPAN_S:
        found.add(path, f"is {span.seconds:,} seconds, more than a century")
    else:
        return seconds
    return None
