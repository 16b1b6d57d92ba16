"""What applies to a whole batch, and how a model answers: fields named as in the contract, as plain dictionaries.

    client.run(items, model="llama3.2", options={"temperature": 0, "num_predict": 40}, max_concurrency=4)

The contract, protos/unisono/v1/, says what each field means and what applies where it is absent. Spans of time are
`timedelta`, or numbers of seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, TypedDict, TypeVar, cast

from google.protobuf import duration_pb2, message

from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client._generated.unisono.v1 import item_pb2
from unisono_client.errors import FieldViolation, RefusedError

_M = TypeVar("_M", bound=message.Message)
# A span of time; a number is of seconds.
Span = timedelta | float


class RunnerOptions(TypedDict, total=False):
    """How a model is loaded: items that differ here cannot share forward passes."""

    num_ctx: int
    num_batch: int
    num_gpu: int
    main_gpu: int
    use_mmap: bool
    num_thread: int
    draft_num_predict: int


class Options(RunnerOptions, total=False):
    """Options of the model, those of `RunnerOptions` beside them or under `runner`."""

    num_keep: int
    seed: int
    num_predict: int
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_last_n: int
    temperature: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: Sequence[str]
    runner: RunnerOptions
    # What the contract does not name; passed on to the backend unread.
    extra_options: Mapping[str, Any]


class Deltas(TypedDict, total=False):
    """How often text is sent as it is generated."""

    flush_interval: Span
    flush_bytes: int


class Release(TypedDict, total=False):
    """When the items of a session go by themselves: by their number, or by the time the oldest has waited."""

    size: int
    # 0: only by size, by `release()`, or when no more items come.
    interval: Span


class BatchConfig(TypedDict, total=False):
    """What applies to a whole batch; every field may be left out."""

    model: str
    options: Options
    keep_alive: Span
    # Absent, for this client: PER_ITEM. What is wrong with one item is its result, and the others run.
    validation: Literal["STRICT", "PER_ITEM"]
    queue_timeout: Span
    item_timeout: Span
    batch_deadline: Span
    max_attempts: int
    # CANCEL (absent): the batch is cancelled when its caller leaves it, or is gone for longer than the client tries
    # to come back. DETACH: it goes on without its caller, for `detach_grace`, and `attach` joins it.
    on_disconnect: Literal["CANCEL", "DETACH"]
    detach_grace: Span
    # The caller's own name for the request. Absent: the client makes one, to open a batch only once.
    request_id: str
    co_scheduling: Literal["FASTEST", "TOGETHER"]
    max_concurrency: int
    items_per_second: float
    priority: Literal["LOW", "NORMAL", "HIGH"]
    weight: int
    # Messages in front of each conversation's own, sent once.
    shared_context: Sequence[Any]
    context_policy: Literal["HARMONISE", "SEPARATE", "REJECT"]
    # For `session` only: `run` releases by itself.
    release: Release


# Fields of the contract that are enums, and what their values begin with.
_ENUMS: Final = {
    "validation": "VALIDATION_MODE_",
    "on_disconnect": "ON_DISCONNECT_",
    "co_scheduling": "CO_SCHEDULING_",
    "priority": "PRIORITY_",
    "context_policy": "CONTEXT_POLICY_",
}
_RUNNER: Final = frozenset(item_pb2.RunnerOptions.DESCRIPTOR.fields_by_name)


def invalid(field: str, description: str) -> RefusedError:
    """The error of a request that the client itself refuses to send."""
    violation = FieldViolation(field, description)
    return RefusedError(
        f"{field}: {description}", reason="INVALID_REQUEST", code="INVALID_ARGUMENT", fields=[violation]
    )


def span(value: Span) -> duration_pb2.Duration:
    """A span of time as the contract has it."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    made = duration_pb2.Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def options_of(options: Options | None) -> item_pb2.Options | None:
    """Options as the contract has them; raises RefusedError for a name or a type that it does not know."""
    if options is None:
        return None
    fields: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    runner = {**fields.pop("runner", {}), **{key: fields.pop(key) for key in _RUNNER & fields.keys()}}
    if "extra_options" in fields:
        fields["extra_options_json"] = json.dumps(fields.pop("extra_options"))
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    made = build(item_pb2.Options, fields, "options")
    if runner:
        made.runner.CopyFrom(build(item_pb2.RunnerOptions, runner, "options.runner"))
    return made


def deltas_of(deltas: Deltas | None) -> pb.DeltaConfig:
    """Settings of deltas as the contract has them."""
    return build(pb.DeltaConfig, _spans(dict(deltas or {}), pb.DeltaConfig), "deltas")


def config_of(
    config: BatchConfig, *, shared: Sequence[item_pb2.Message], request_id: str, least_grace_s: float
) -> pb.BatchConfig:
    """A config as the contract has it, for a call that is resumed after a lost connection.

    The service keeps a batch that the client may come back to for at least `least_grace_s` seconds.
    """
    fields = dict(config)
    fields.pop("shared_context", None)
    options = options_of(config.get("options"))
    fields.pop("options", None)
    release = fields.pop("release", None)
    is_left_alone = fields.pop("on_disconnect", "CANCEL") == "DETACH"
    grace = fields.pop("detach_grace", None)
    fields.setdefault("validation", "PER_ITEM")
    fields["request_id"] = fields.get("request_id") or request_id
    for name, prefix in _ENUMS.items():
        if name in fields:
            fields[name] = f"{prefix}{fields[name]}"
    made = build(pb.BatchConfig, _spans(fields, pb.BatchConfig), "config")
    made.on_disconnect = pb.ON_DISCONNECT_DETACH
    if not is_left_alone:
        made.detach_grace.CopyFrom(span(least_grace_s))
    elif grace is not None:
        made.detach_grace.CopyFrom(span(cast("Span", grace)))
    if options is not None:
        made.options.CopyFrom(options)
    if release is not None:
        made.release.CopyFrom(
            build(pb.ReleasePolicy, _spans({**cast("Release", release)}, pb.ReleasePolicy), "release")
        )
    made.shared_context.messages.extend(shared)
    if not shared:
        made.ClearField("shared_context")
    return made


def build(kind: type[_M], fields: Mapping[str, Any], path: str) -> _M:
    """A message of the contract; raises RefusedError that names a field where there is none of that name or type."""
    for name in fields:
        if name not in kind.DESCRIPTOR.fields_by_name:
            known = ", ".join(sorted(kind.DESCRIPTOR.fields_by_name))
            raise invalid(f"{path}.{name}", f"is not a field; there are: {known}")
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise invalid(path, f"cannot be taken: {error}") from None


def _spans(fields: dict[str, Any], kind: type[message.Message]) -> dict[str, Any]:
    """The fields with spans of time as the contract has them."""
    by_name = kind.DESCRIPTOR.fields_by_name
    is_span = duration_pb2.Duration.DESCRIPTOR
    return {
        name: span(value) if name in by_name and by_name[name].message_type is is_span else value
        for name, value in fields.items()
        if value is not None
    }
