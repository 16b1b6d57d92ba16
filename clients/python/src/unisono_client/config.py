"""What applies to a whole batch, and how a model answers: fields named as in the contract, as plain dictionaries.

    client.run(items, model="llama3.2", options={"temperature": 0, "num_predict": 40}, max_concurrency=4)

The contract, protos/unisono/v1/, says what each field means and what applies where it is absent. Spans of time are
`timedelta`, or numbers of seconds.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, TypedDict, TypeVar, cast

from google.protobuf import duration_pb2, message
from google.protobuf.descriptor import FieldDescriptor

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


def span(value: Span, field: str) -> duration_pb2.Duration:
    """A span of time as the contract has it. Raises RefusedError for what is none."""
    if isinstance(value, bool) or not isinstance(value, timedelta | float | int):
        raise invalid(field, f"is {value!r}; give a number of seconds, or a timedelta")
    made = duration_pb2.Duration()
    try:
        made.FromNanoseconds(round((value.total_seconds() if isinstance(value, timedelta) else value) * 1e9))
    except (ValueError, OverflowError) as error:
        raise invalid(field, f"is {value!r}, which is no span of time: {error}") from None
    return made


def plain(given: object) -> object:
    """Objects of other packages (Ollama's own, and pydantic's) as the dictionaries that they stand for."""
    dump = getattr(given, "model_dump", None)
    return dump(exclude_none=True) if callable(dump) and not isinstance(given, type) else given


def mapping_of(given: object, path: str) -> dict[str, Any]:
    """A mapping, or what stands for one; raises RefusedError for anything else."""
    found = plain(given)
    if not isinstance(found, Mapping):
        raise invalid(path, f"is {type(given).__name__}; give a mapping of names to values")
    return dict(found)


def options_of(options: Options | None) -> item_pb2.Options | None:
    """Options as the contract has them; raises RefusedError for a name or a type that it does not know."""
    if options is None:
        return None
    fields = {key: value for key, value in mapping_of(options, "options").items() if value is not None}
    check_names(fields, Options.__annotations__, "options")
    runner = {
        **mapping_of(fields.pop("runner", None) or {}, "options.runner"),
        **{key: fields.pop(key) for key in _RUNNER & fields.keys()},
    }
    if "extra_options" in fields:
        try:
            fields["extra_options_json"] = json.dumps(
                mapping_of(fields.pop("extra_options"), "options.extra_options")
            )
        except (TypeError, ValueError) as error:
            raise invalid("options.extra_options", f"is no JSON: {error}") from None
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    made = build(item_pb2.Options, fields, "options")
    if runner:
        made.runner.CopyFrom(build(item_pb2.RunnerOptions, runner, "options.runner"))
    return made


def deltas_of(deltas: Deltas | None) -> pb.DeltaConfig:
    """Settings of deltas as the contract has them."""
    return build(pb.DeltaConfig, _spans(mapping_of(deltas or {}, "deltas"), pb.DeltaConfig, "deltas"), "deltas")


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
    if fields.get("co_scheduling") == "REQUIRED":
        raise invalid(
            "config.co_scheduling",
            "is 'REQUIRED', which only a call with all of its items at once can be: client.stub.RunBatch. Here items"
            " follow each other; TOGETHER keeps them together wherever that is possible",
        )
    for name in _ENUMS.keys() & fields.keys():
        if (value := fields[name]) is not None and value not in (known := _choices(name)):
            raise invalid(f"config.{name}", f"is {value!r}; there are: {', '.join(known)}")
    is_left_alone = fields.pop("on_disconnect", "CANCEL") == "DETACH"
    grace = fields.pop("detach_grace", None)
    fields.setdefault("validation", "PER_ITEM")
    fields["request_id"] = fields.get("request_id") or request_id
    for name, prefix in _ENUMS.items():
        if fields.get(name) is not None:
            fields[name] = f"{prefix}{fields[name]}"
    made = build(pb.BatchConfig, _spans(fields, pb.BatchConfig, "config"), "config")
    made.on_disconnect = pb.ON_DISCONNECT_DETACH
    if not is_left_alone:
        made.detach_grace.CopyFrom(span(least_grace_s, "give_up_after_s"))
    elif grace is not None:
        made.detach_grace.CopyFrom(span(cast("Span", grace), "config.detach_grace"))
    if options is not None:
        made.options.CopyFrom(options)
    if release is not None:
        policy = _spans(mapping_of(release, "config.release"), pb.ReleasePolicy, "config.release")
        made.release.CopyFrom(build(pb.ReleasePolicy, policy, "config.release"))
    made.shared_context.messages.extend(shared)
    if not shared:
        made.ClearField("shared_context")
    return made


def build(kind: type[_M], fields: Mapping[str, Any], path: str) -> _M:
    """A message of the contract; raises RefusedError that names a field where there is none of that name or type."""
    by_name = kind.DESCRIPTOR.fields_by_name
    check_names(fields, by_name, path)
    made = kind()
    for name, value in fields.items():
        where = f"{path}.{name}" if path else name
        # Protobuf would take a truth for a number.
        if isinstance(value, bool) and by_name[name].cpp_type in _NUMBERS:
            raise invalid(where, f"is {value!r}; give {_NUMBERS[by_name[name].cpp_type]}")
        try:
            made.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            wanted = _WANTED.get(by_name[name].cpp_type)
            told = f"is {value!r}" if len(repr(value)) < _LONG else f"is {type(value).__name__}"
            many = "a list, each " if by_name[name].is_repeated else ""
            raise invalid(where, f"{told}; give {many}{wanted}" if wanted else f"{told}: {error}") from None
    return made


def check_names(fields: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
    """Raises RefusedError for the first name that is not known, with the nearest that is."""
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; {near[0]!r} is" if near else ""
            raise invalid(f"{path}.{name}", f"is not a field{hint}; there are: {', '.join(sorted(known))}")


_LONG: Final = 60
_NUMBERS: Final = {
    FieldDescriptor.CPPTYPE_INT32: "a whole number",
    FieldDescriptor.CPPTYPE_INT64: "a whole number",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number, not below 0",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number, not below 0",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
}
_WANTED: Final = {**_NUMBERS, FieldDescriptor.CPPTYPE_STRING: "a str", FieldDescriptor.CPPTYPE_BOOL: "True or False"}


def _choices(name: str) -> Sequence[str]:
    """What a field that is an enum may be."""
    kind = pb.BatchConfig.DESCRIPTOR.fields_by_name[name].enum_type
    return [each.name.removeprefix(_ENUMS[name]) for each in kind.values if each.number] if kind else []


def _spans(fields: dict[str, Any], kind: type[message.Message], path: str) -> dict[str, Any]:
    """The fields with spans of time as the contract has them."""
    by_name = kind.DESCRIPTOR.fields_by_name
    is_span = duration_pb2.Duration.DESCRIPTOR
    return {
        name: span(value, f"{path}.{name}") if name in by_name and by_name[name].message_type is is_span else value
        for name, value in fields.items()
        if value is not None
    }
