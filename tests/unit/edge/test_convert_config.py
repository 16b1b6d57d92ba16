"""What applies to a whole batch arrives as it was said, or is refused with the path of each field that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2 as it
from unisono.core import model
from unisono.core.batch import BatchConfig, ContextPolicy, CoScheduling, DeltaSettings
from unisono.core.commands import Priority
from unisono.core.errors import InvalidRequestError
from unisono.core.limits import Limits
from unisono.edge.contract import convert_config

CENTURY_S = 100 * 365 * 86_400
# A number that no enum of the contract has.
UNKNOWN: Any = 99
USER = it.Message(role=it.ROLE_USER, content="hello")


def refusals(convert: Callable[[], object]) -> list[str]:
    """The paths with which a request is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        convert()
    assert caught.value.message.startswith(f"{caught.value.violations[0].field}: ")
    return [one.field for one in caught.value.violations]


@pytest.mark.parametrize("field", list(pb.BatchConfig.DESCRIPTOR.fields), ids=lambda field: field.name)
def test_every_field_of_a_config_is_read(field: FieldDescriptor) -> None:
    """In the configuration, or in the settings for deltas."""
    values: dict[str, Any] = {
        "Options": it.Options(seed=1),
        "Duration": Duration(seconds=5),
        "DeltaConfig": pb.DeltaConfig(),
        "ReleasePolicy": pb.ReleasePolicy(size=1),
        "SharedContext": pb.SharedContext(messages=[USER]),
    }
    # Neither the default nor what is refused.
    numbers = {"priority": 3, "validation": 2}
    message = pb.BatchConfig()
    if field.message_type is not None:
        getattr(message, field.name).CopyFrom(values[field.message_type.name])
    else:
        is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        setattr(message, field.name, "x" if is_text else numbers.get(field.name, 2))
    before = (convert_config.config(pb.BatchConfig()), convert_config.delta_settings(pb.BatchConfig()))
    assert (convert_config.config(message), convert_config.delta_settings(message)) != before


def test_nothing_said_is_the_default() -> None:
    """STRICT, cancelled with its caller, three attempts, results only."""
    converted = convert_config.config(pb.BatchConfig())
    assert converted == BatchConfig()
    assert (converted.is_strict, converted.detaches, converted.max_attempts) == (True, False, 3)
    assert convert_config.delta_settings(pb.BatchConfig()) is None
    assert convert_config.delta_settings(pb.AttachBatchRequest(batch_id="b")) is None


def test_a_config_arrives_as_it_was_sent() -> None:
    """Each value in its place."""
    message = pb.BatchConfig(
        model="m",
        options=it.Options(num_predict=-1),
        keep_alive=Duration(seconds=0),
        validation=pb.VALIDATION_MODE_PER_ITEM,
        queue_timeout=Duration(seconds=1),
        item_timeout=Duration(seconds=2, nanos=500_000_000),
        batch_deadline=Duration(nanos=1),
        max_attempts=10,
        on_disconnect=pb.ON_DISCONNECT_DETACH,
        detach_grace=Duration(seconds=4),
        request_id="r" * 256,
        deltas=pb.DeltaConfig(flush_interval=Duration(seconds=10), flush_bytes=1),
        release=pb.ReleasePolicy(size=8, interval=Duration(nanos=100_000_000)),
        co_scheduling=pb.CO_SCHEDULING_FASTEST,
        max_concurrency=1,
        items_per_second=0.5,
        priority=pb.PRIORITY_LOW,
        weight=100,
        shared_context=pb.SharedContext(messages=[it.Message(role=it.ROLE_SYSTEM, content="Be brief."), USER]),
        context_policy=pb.CONTEXT_POLICY_REJECT,
    )
    assert convert_config.config(message) == BatchConfig(
        model="m",
        options=model.Options(num_predict=-1),
        keep_alive_s=0.0,
        is_strict=False,
        queue_timeout_s=1.0,
        item_timeout_s=2.5,
        deadline_s=1e-9,
        max_attempts=10,
        detaches=True,
        detach_grace_s=4.0,
        request_id="r" * 256,
        release_size=8,
        release_interval_s=0.1,
        co_scheduling=CoScheduling.FASTEST,
        max_concurrency=1,
        items_per_second=0.5,
        priority=Priority.LOW,
        weight=100,
        shared_messages=(
            model.Message(role=model.Role.SYSTEM, content="Be brief."),
            model.Message(role=model.Role.USER, content="hello"),
        ),
        context_policy=ContextPolicy.REJECT,
    )
    assert convert_config.delta_settings(message) == DeltaSettings(flush_interval_s=10.0, flush_bytes=1)


def test_zero_is_no_limit() -> None:
    """Of the queue and of the batch, as if absent; the item's is kept apart from the service's setting."""
    none = Duration()
    converted = convert_config.config(
        pb.BatchConfig(
            queue_timeout=none, batch_deadline=none, item_timeout=none, release=pb.ReleasePolicy(interval=none)
        )
    )
    assert (converted.queue_timeout_s, converted.deadline_s) == (None, None)
    assert (converted.item_timeout_s, converted.release_interval_s) == (0.0, 0.0)


def test_deltas_that_are_asked_for_have_defaults() -> None:
    """An empty message asks for them, on each rpc."""
    assert convert_config.delta_settings(pb.BatchConfig(deltas=pb.DeltaConfig())) == DeltaSettings()
    assert convert_config.delta_settings(pb.AttachBatchRequest(deltas=pb.DeltaConfig())) == DeltaSettings()


SPANS = ["keep_alive", "queue_timeout", "item_timeout", "batch_deadline", "detach_grace"]
BAD_SPANS = [
    pytest.param(Duration(seconds=-1), id="negative"),
    pytest.param(Duration(nanos=-1), id="a little negative"),
    pytest.param(Duration(nanos=1_000_000_000), id="nanos"),
    pytest.param(Duration(seconds=1, nanos=-1), id="two signs"),
    pytest.param(Duration(seconds=10_000 * 365 * 86_400), id="too long"),
    pytest.param(Duration(seconds=2**63 - 1), id="far too long"),
]


@pytest.mark.parametrize("span", BAD_SPANS)
@pytest.mark.parametrize("name", SPANS)
def test_a_span_that_is_none_is_refused(name: str, span: Duration) -> None:
    """Negative, broken, or longer than a century."""
    message = pb.BatchConfig(**{name: span})  # type: ignore[arg-type]  # a field that holds a span
    assert refusals(lambda: convert_config.config(message)) == [f"config.{name}"]


@pytest.mark.parametrize("name", SPANS)
def test_a_century_is_taken(name: str) -> None:
    """Nobody means more."""
    message = pb.BatchConfig(**{name: Duration(seconds=CENTURY_S)})  # type: ignore[arg-type]  # as above
    assert CENTURY_S in vars_of(convert_config.config(message))


def vars_of(value: BatchConfig) -> list[Any]:
    """The values of a configuration's fields."""
    return [getattr(value, field.name) for field in fields(value)]


@pytest.mark.parametrize(
    ("message", "paths"),
    [
        pytest.param(pb.BatchConfig(max_attempts=0), ["config.max_attempts"], id="no attempt"),
        pytest.param(pb.BatchConfig(max_attempts=11), ["config.max_attempts"], id="attempts"),
        pytest.param(pb.BatchConfig(validation=UNKNOWN), ["config.validation"], id="validation"),
        pytest.param(pb.BatchConfig(on_disconnect=UNKNOWN), ["config.on_disconnect"], id="lost"),
        pytest.param(pb.BatchConfig(request_id="ü" * 129), ["config.request_id"], id="request_id"),
        pytest.param(pb.BatchConfig(model="m" * 257), ["config.model"], id="model"),
        pytest.param(pb.BatchConfig(release=pb.ReleasePolicy(size=0)), ["config.release.size"], id="release"),
        pytest.param(
            pb.BatchConfig(release=pb.ReleasePolicy(interval=Duration(seconds=-1))),
            ["config.release.interval"],
            id="interval",
        ),
        pytest.param(
            pb.BatchConfig(options=it.Options(temperature=-1, top_p=math.nan)),
            ["config.options.top_p", "config.options.temperature"],
            id="options",
        ),
        pytest.param(
            pb.BatchConfig(options=it.Options(runner=it.RunnerOptions(num_ctx=15))),
            ["config.options.runner.num_ctx"],
            id="runner",
        ),
        pytest.param(
            pb.BatchConfig(options=it.Options.FromString(b"\xb8\x3e\x01")), ["config.options"], id="unknown option"
        ),
        pytest.param(
            pb.BatchConfig(deltas=pb.DeltaConfig(flush_bytes=0, flush_interval=Duration(nanos=9_999_999))),
            ["config.deltas.flush_interval", "config.deltas.flush_bytes"],
            id="deltas",
        ),
        pytest.param(pb.BatchConfig(co_scheduling=UNKNOWN), ["config.co_scheduling"], id="co_scheduling"),
        pytest.param(pb.BatchConfig(context_policy=UNKNOWN), ["config.context_policy"], id="context_policy"),
        pytest.param(pb.BatchConfig(priority=UNKNOWN), ["config.priority"], id="priority"),
        pytest.param(pb.BatchConfig(max_concurrency=0), ["config.max_concurrency"], id="no concurrency"),
        pytest.param(pb.BatchConfig(weight=0), ["config.weight"], id="no weight"),
        pytest.param(pb.BatchConfig(weight=101), ["config.weight"], id="weight"),
        *(
            pytest.param(pb.BatchConfig(items_per_second=rate), ["config.items_per_second"], id=f"{rate} a second")
            for rate in (0.0, -1.0, math.inf, math.nan)
        ),
        *(
            pytest.param(
                pb.BatchConfig(items_per_second=1.0, co_scheduling=way),
                ["config.items_per_second"],
                id=f"one a second, {pb.CoScheduling.Name(way)}",
            )
            for way in (pb.CO_SCHEDULING_REQUIRED, pb.CO_SCHEDULING_TOGETHER)
        ),
        pytest.param(
            pb.BatchConfig(shared_context=pb.SharedContext(messages=[USER, it.Message(), it.Message(role=UNKNOWN)])),
            [
                "config.shared_context.messages[1].role",
                "config.shared_context.messages[2].role",
                "config.shared_context.messages[1].content",
                "config.shared_context.messages[2].content",
            ],
            id="shared messages",
        ),
        pytest.param(
            pb.BatchConfig(shared_context=pb.SharedContext(messages=[it.Message(role=it.ROLE_USER)] * 1025)),
            ["config.shared_context.messages"],
            id="many shared messages",
        ),
        pytest.param(
            pb.BatchConfig(shared_context=pb.SharedContext(messages=[USER] * 1024)),
            ["config.shared_context.messages"],
            id="no room for a message of one's own",
        ),
        pytest.param(
            pb.BatchConfig(shared_context=pb.SharedContext.FromString(b"\xb8\x3e\x01")),
            ["config.shared_context"],
            id="something newer that is shared",
        ),
        pytest.param(
            pb.BatchConfig(max_attempts=11, keep_alive=Duration(seconds=-1), model="m" * 257),
            ["config.model", "config.max_attempts", "config.keep_alive"],
            id="several",
        ),
    ],
)
def test_a_config_is_refused_with_all_that_is_wrong(message: pb.BatchConfig, paths: list[str]) -> None:
    """Each with its path, from the request on, or from wherever the caller has it."""
    assert refusals(lambda: convert_config.config(message)) == paths
    elsewhere = [path.replace("config", "open.config", 1) for path in paths]
    assert refusals(lambda: convert_config.config(message, path="open.config")) == elsewhere


@pytest.mark.parametrize(
    ("deltas", "path"),
    [
        pytest.param(pb.DeltaConfig(flush_interval=Duration(nanos=9_999_999)), "deltas.flush_interval", id="short"),
        pytest.param(
            pb.DeltaConfig(flush_interval=Duration(seconds=10, nanos=1)), "deltas.flush_interval", id="long"
        ),
        pytest.param(pb.DeltaConfig(flush_interval=Duration(nanos=-1)), "deltas.flush_interval", id="negative"),
        pytest.param(pb.DeltaConfig(flush_bytes=0), "deltas.flush_bytes", id="no bytes"),
        pytest.param(pb.DeltaConfig(flush_bytes=1_048_577), "deltas.flush_bytes", id="many bytes"),
    ],
)
def test_deltas_out_of_range_are_refused(deltas: pb.DeltaConfig, path: str) -> None:
    """On each rpc, with the path in its request."""
    assert refusals(lambda: convert_config.delta_settings(pb.AttachBatchRequest(deltas=deltas))) == [path]
    assert refusals(lambda: convert_config.delta_settings(pb.BatchConfig(deltas=deltas))) == [f"config.{path}"]
    assert refusals(lambda: convert_config.delta_settings(pb.BatchConfig(deltas=deltas), path="open.config")) == [
        f"open.config.{path}"
    ]


@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param(pb.DeltaConfig(flush_interval=Duration(nanos=10_000_000), flush_bytes=1_048_576), id="often"),
        pytest.param(pb.DeltaConfig(flush_interval=Duration(seconds=10), flush_bytes=1), id="seldom"),
    ],
)
def test_deltas_at_the_ends_of_their_ranges_are_taken(deltas: pb.DeltaConfig) -> None:
    """Both ends are allowed."""
    converted = convert_config.delta_settings(pb.AttachBatchRequest(deltas=deltas))
    assert converted is not None
    assert converted.flush_bytes == deltas.flush_bytes


def test_shared_text_counts_as_any_item_s() -> None:
    """What alone is too much for an item cannot stand in front of each."""
    message = pb.BatchConfig(shared_context=pb.SharedContext(messages=[USER]))
    assert convert_config.config(message, bounds=Limits(max_item_text_bytes=5)).shared_messages
    bounds = Limits(max_item_text_bytes=4)
    assert refusals(lambda: convert_config.config(message, bounds=bounds)) == ["config.shared_context.messages"]
    call = it.Message(role=it.ROLE_ASSISTANT, tool_calls=[it.ToolCall(name="", arguments_json="[")])
    pictures = it.Message(role=it.ROLE_USER, images=[b"no picture"])
    message = pb.BatchConfig(shared_context=pb.SharedContext(messages=[call, pictures]))
    assert refusals(lambda: convert_config.config(message)) == [
        "config.shared_context.messages[0].tool_calls[0].name",
        "config.shared_context.messages[0].tool_calls[0].arguments_json",
        "config.shared_context.messages[1].images[0]",
    ]
