"""One batch gives one connected trace: a scripted batch, the real exporter, and a real receiver."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, server_attributes
from opentelemetry.trace import NoOpTracerProvider

from tests.fakes.otlp import Kind, Node, OtlpReceiver, Status, tree_of
from tests.fakes.scripted_batch import (
    METHOD,
    MS,
    SECRET,
    START_NS,
    Place,
    ScriptedBatch,
    arrived,
    chat_item,
    context_of,
    named,
    of_item,
    play,
    tracing,
)
from unisono.adapters.telemetry import conventions
from unisono.adapters.telemetry.setup import configure
from unisono.adapters.telemetry.spans import ChosenIds
from unisono.adapters.telemetry.trace import TraceListener

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
CALLER_TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN = "b7ad6b7169203331"


def test_a_batch_is_one_connected_trace(otlp: OtlpReceiver) -> None:
    """Every span of a batch hangs, over its group, under the one of the rpc; also where the caller sent nothing."""
    telemetry = tracing(otlp)
    play(ScriptedBatch(telemetry.listener([Place()])))
    spans = arrived(telemetry, otlp)

    assert len({span.trace_id for span in spans}) == 1
    (root,) = tree_of(spans)
    assert root.lines() == [
        METHOD,
        "  plan",
        "  group smol",
        "    release",
        "    chat smol",
        "    chat smol",
        "      attempt 1",
        "      attempt 2",
        "    text_completion smol",
        "    release",
        "    item",
        "  group embedder",
        "    load",
        "    release",
        "    embeddings embedder",
        "  item",
        "  item",
    ]
    assert root.span.parent_id is None
    kinds = {node.span.name: node.span.kind for node in root.walk()}
    assert {name for name, kind in kinds.items() if kind is Kind.SERVER} == {METHOD}
    assert {name for name, kind in kinds.items() if kind is Kind.CLIENT} == {
        "chat smol",
        "text_completion smol",
        "embeddings embedder",
    }
    assert set(kinds.values()) == {Kind.SERVER, Kind.CLIENT, Kind.INTERNAL}
    # What adds up tokens, or counts calls, by these names finds each once.
    for span in spans:
        assert (span.kind is Kind.CLIENT) == any(name.startswith("gen_ai.") for name in span.attributes), span.name
    # A group begins and ends with what is in it, not with the plan and the batch.
    for group in (root.child("group smol"), root.child("group embedder")):
        assert group.span.start_ns == min(child.span.start_ns for child in group.children)
        assert group.span.end_ns == max(child.span.end_ns for child in group.children) < root.span.end_ns
    for node in root.walk():
        assert START_NS <= node.span.start_ns <= node.span.end_ns
        for child in node.children:
            assert node.span.start_ns <= child.span.start_ns, child.span.name
            assert child.span.end_ns <= node.span.end_ns, child.span.name


def test_spans_say_who_and_what(otlp: OtlpReceiver) -> None:
    """Root, group, load and release carry the figures of the batch; the resource names the service."""
    telemetry = tracing(otlp, OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=a%20desk")
    play(ScriptedBatch(telemetry.listener([Place()])))
    spans = arrived(telemetry, otlp)
    (root,) = tree_of(spans)

    resource = root.span.resource
    assert resource["service.name"] == "unisono"
    assert resource["service.version"] == "1.2.3"
    assert resource["deployment.environment.name"] == "a desk"
    assert (root.span.scope, root.span.scope_version) == ("unisono", "1.2.3")
    assert root.span.status is Status.UNSET
    assert dict(root.span.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "unisono.batch_id": "batch-1",
        "unisono.state": "completed",
        "unisono.items": 7,
        "unisono.items_completed": 4,
        "unisono.items_failed": 1,
        "unisono.items_cancelled": 1,
        "unisono.items_expired": 1,
        "unisono.retries": 1,
        "unisono.passes": 40,
        "unisono.prompt_tokens": 84,
        "unisono.cached_prompt_tokens": 40,
        "unisono.completion_tokens": 70,
    }
    assert dict(root.child("plan").span.attributes) == {
        "unisono.groups": 2,
        "unisono.items": 8,
        "unisono.families": 1,
        "unisono.context_reason": "2,048 tokens: asked for",
    }
    group = root.child("group embedder")
    assert dict(group.span.attributes) == {
        "server.address": "ollama.example",
        "server.port": 11434,
        "unisono.group": 1,
        "unisono.backend": "desk",
        "unisono.model": "embedder",
        "unisono.digest": "sha256:embedder",
        "unisono.is_loaded": False,
        "unisono.runner.num_ctx": 2048,
        "unisono.items": 4,
        "unisono.slots": 8,
        "unisono.slot_source": "learned",
        "unisono.slots_at_least": 8,
        "unisono.slots_limit": 6,
        "unisono.context_reason": "2,048 tokens: asked for",
        "unisono.memory_estimate_bytes": 123,
        "unisono.memory_measured_bytes": 110,
        "unisono.passes": 20,
        "unisono.pass_method": "created_at",
        "unisono.pass_confidence": 0.75,
        "unisono.pass_imputed_share": 0.25,
        "unisono.fewest_passes": 13,
        "unisono.items_per_pass": 2.5,
        "unisono.duration_s": 1.0,
        "unisono.one_at_a_time_s": 3.5,
        "unisono.gain": 3.5,
        "unisono.idle_refill_s": 0.25,
        "unisono.idle_no_items_s": 1.5,
        "unisono.pass_cost_s": 0.02,
        "unisono.token_cost_s": 0.001,
        "unisono.prompt_token_cost_s": 0.0005,
        "unisono.single_stream_token_cost_s": 0.0625,
        "unisono.passes_measured": 18,
        "unisono.families": 2,
        "unisono.largest_family": 3,
        "unisono.context_used": 0.125,
        "unisono.runner_deaths": 1,
        "unisono.waves": 2,
        "unisono.loads": 1,
        "unisono.prompt_tokens": 84,
        "unisono.cached_prompt_tokens": 20,
        "unisono.completion_tokens": 70,
    }
    load = group.child("load").span
    assert dict(load.attributes) == {"unisono.was_loaded": False, "unisono.slots": 8}
    assert load.end_ns - load.start_ns == 50 * MS
    first, second = [node.span for node in root.child("group smol").children if node.span.name == "release"]
    assert dict(first.attributes) == {
        "unisono.wave": 0,
        "unisono.items": 3,
        "unisono.others": 2,
        "unisono.stands_for_wave": True,
        "unisono.spread_s": 0.0005,
    }
    assert first.end_ns - first.start_ns == MS // 2
    assert second.attributes["unisono.wave"] == 1


def test_an_item_is_a_genai_call(otlp: OtlpReceiver) -> None:
    """An item's span covers all its attempts and carries what the GenAI conventions name."""
    telemetry = tracing(otlp)
    play(ScriptedBatch(telemetry.listener([Place()])))
    spans = arrived(telemetry, otlp)

    item = of_item(spans, 1)
    assert dict(item.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ollama",
        "gen_ai.output.type": "json",
        "gen_ai.request.stream": True,
        "gen_ai.request.model": "smol",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.seed": 7,
        "gen_ai.request.max_tokens": 80,
        "gen_ai.request.frequency_penalty": 0.25,
        "gen_ai.request.presence_penalty": 0.125,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.response.model": "smol:latest",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.5,
        "gen_ai.usage.input_tokens": 21,
        "gen_ai.usage.cache_read.input_tokens": 5,
        "gen_ai.usage.output_tokens": 13,
        "server.address": "ollama.example",
        "server.port": 11434,
        "unisono.item_id": "item-1",
        "unisono.index": 1,
        "unisono.state": "completed",
        "unisono.attempts": 2,
        "unisono.release_reason": "tail",
        "unisono.lane": 3,
        "unisono.held_s": 0.0015,
        "unisono.passes": 13,
        "unisono.shared_with": 3,
        "unisono.queued_s": 0.25,
        "unisono.slot_wait_s": 0.125,
    }
    assert item.status is Status.UNSET
    assert [(event.name, event.attributes["unisono.attempt"]) for event in item.events] == [
        ("released", 1),
        ("first_token", 1),
        ("retry", 1),
        ("released", 2),
        ("first_token", 2),
    ]
    times = [*(event.at_ns for event in item.events), item.end_ns]
    assert all(before < after for before, after in pairwise(times))
    assert item.start_ns == item.events[0].at_ns
    assert dict(item.events[0].attributes) == {
        "unisono.wave": 0,
        "unisono.release_reason": "longest",
        "unisono.lane": 1,
        "unisono.held_s": 0.0045,
        "unisono.attempt": 1,
    }
    assert dict(item.events[2].attributes) == {
        "error.type": "RUNNER_DIED",
        "unisono.again_in_s": 0.5,
        "unisono.attempt": 1,
    }
    embedding = named(spans, "embeddings embedder")
    assert embedding.attributes["gen_ai.embeddings.dimension.count"] == 64
    assert "gen_ai.output.type" not in embedding.attributes


def test_no_prompt_and_no_answer_leaves_the_process(otlp: OtlpReceiver) -> None:
    """No word of a caller or a model is in the bytes on the wire: not in spans, events, statuses or resources."""
    telemetry = tracing(otlp)
    play(ScriptedBatch(telemetry.listener([Place()])))
    spans = arrived(telemetry, otlp)
    assert len(spans) == 17
    assert otlp.bodies
    assert all(SECRET.encode() not in body for body in otlp.bodies)


def test_content_is_captured_where_asked_for(otlp: OtlpReceiver) -> None:
    """With the standard variable, an item's span holds its messages as the conventions' JSON."""
    telemetry = tracing(otlp, **{CAPTURE: "true"})
    play(ScriptedBatch(telemetry.listener([Place()])))
    spans = arrived(telemetry, otlp)

    chat = of_item(spans, 0)
    assert json.loads(str(chat.attributes["gen_ai.input.messages"])) == [
        {"role": "system", "parts": [{"type": "text", "content": f"system {SECRET}"}]},
        {
            "role": "user",
            "parts": [{"type": "text", "content": f"question {SECRET}"}, {"type": "image", "bytes": len(SECRET)}],
        },
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": f"thought {SECRET}"},
                {"type": "tool_call", "id": "c1", "name": "look_up", "arguments": f'{{"what": "{SECRET}"}}'},
            ],
        },
        {
            "role": "tool",
            "parts": [{"type": "tool_call_response", "id": "c1", "response": f"found {SECRET}"}],
        },
    ]
    (answer,) = json.loads(str(chat.attributes["gen_ai.output.messages"]))
    assert answer["role"] == "assistant"
    assert answer["finish_reason"] == "stop"
    assert {"type": "text", "content": f"answer {SECRET}"} in answer["parts"]
    generate = of_item(spans, 2)
    assert f"prompt {SECRET}" in str(generate.attributes["gen_ai.input.messages"])
    assert f"system {SECRET}" in str(generate.attributes["gen_ai.system_instructions"])
    assert generate.attributes["unisono.error_message"] == f"no model for {SECRET}"
    assert f"text {SECRET}" in str(of_item(spans, 4).attributes["gen_ai.input.messages"])
    # The reason alone stays the status.
    assert generate.status_message == "MODEL_NOT_FOUND"


@pytest.mark.parametrize("value", ["", "false", "NO_CONTENT", "EVENT_ONLY"])
def test_content_is_captured_nowhere_else(value: str) -> None:
    """Only a value that asks for content in spans puts it there."""
    telemetry = configure("1", {CAPTURE: value})
    assert telemetry is not None
    assert not telemetry.captures_content


def test_the_caller_s_trace_goes_on(otlp: OtlpReceiver) -> None:
    """The rpc's span is a child of the caller's, and keeps its tracestate."""
    telemetry = tracing(otlp)
    carrier = {
        "traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01",
        "tracestate": "shop=42",
        "authorization": f"Bearer {SECRET}",
    }
    play(ScriptedBatch(telemetry.listener([Place()]), carrier=carrier))
    spans = arrived(telemetry, otlp)

    assert {span.trace_id for span in spans} == {CALLER_TRACE}
    assert named(spans, METHOD).parent_id == CALLER_SPAN
    assert {span.trace_state for span in spans} == {"shop=42"}
    assert all(SECRET.encode() not in body for body in otlp.bodies)


def test_the_backend_is_told_the_item_s_span(otlp: OtlpReceiver) -> None:
    """The headers of a request name its own span, the same for every attempt, and pass the caller's baggage on."""
    telemetry = tracing(otlp)
    carrier = {
        "traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01",
        "tracestate": "shop=42",
        "baggage": "tenant=blue",
    }
    headers = play(ScriptedBatch(telemetry.listener([Place()]), carrier=carrier))
    spans = arrived(telemetry, otlp)

    expected = [of_item(spans, index).span_id for index in (0, 1, 2, 1, 4)]
    assert [context_of(header) for header in headers] == [(CALLER_TRACE, span_id, True) for span_id in expected]
    assert {header["tracestate"] for header in headers} == {"shop=42"}
    assert {header["baggage"] for header in headers} == {"tenant=blue"}


def test_a_trace_that_the_caller_does_not_sample_is_not_exported(otlp: OtlpReceiver) -> None:
    """Nothing is sent and nothing kept, but the backend still learns the trace, marked as not sampled."""
    telemetry = tracing(otlp)
    carrier = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"}
    headers = play(ScriptedBatch(telemetry.listener([Place()]), carrier=carrier))
    assert arrived(telemetry, otlp) == ()
    assert not otlp.bodies
    assert {(trace_id, sampled) for trace_id, _, sampled in map(context_of, headers)} == {(CALLER_TRACE, False)}


def test_without_tracing_the_caller_s_context_passes_through() -> None:
    """With a provider that does nothing, the backend gets what the caller sent, unchanged, or nothing."""
    carrier = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01", "tracestate": "shop=42"}
    listener = TraceListener(NoOpTracerProvider())
    assert [dict(headers) for headers in play(ScriptedBatch(listener, carrier=carrier))] == [carrier] * 5
    assert [dict(headers) for headers in play(ScriptedBatch(listener))] == [{}] * 5


def test_a_provider_must_let_ids_be_chosen() -> None:
    """Else requests would name spans that nobody makes."""
    with pytest.raises(ValueError, match="id_generator=ChosenIds"):
        TraceListener(TracerProvider(shutdown_on_exit=False))


def test_a_chosen_id_is_given_once() -> None:
    """To the next span of this thread, and not to one outside; all others are random."""
    ids = ChosenIds()
    chosen = ids.choose()
    with ids.giving(chosen):
        assert ids.generate_span_id() == chosen
        assert ids.generate_span_id() != chosen
    with ids.giving(chosen):
        pass
    assert ids.generate_span_id() != chosen
    with ThreadPoolExecutor(1) as pool, ids.giving(chosen):
        assert pool.submit(ids.generate_span_id).result() != chosen


def test_names_are_those_of_the_conventions() -> None:
    """Every attribute that is not this service's own is known to the installed semantic conventions."""
    known = {
        value
        for module in (gen_ai_attributes, rpc_attributes, error_attributes, http_attributes, server_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {name: value for name, value in vars(conventions).items() if name.isupper() and "." in value}
    assert {name for name, value in ours.items() if not value.startswith("unisono.") and value not in known} == set()
    # None twice, and none the namespace of another.
    assert len(set(ours.values())) == len(ours)
    for value in ours.values():
        assert not any(other.startswith(f"{value}.") for other in ours.values()), value


def test_the_tree_helper_finds_what_is_missing(otlp: OtlpReceiver) -> None:
    """A span whose parent never arrived stands alone, so the tests above would see a broken trace."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    batch.run(chat_item(0))
    # The batch never ends, so its own span and the group's never leave.
    roots: tuple[Node, ...] = tree_of(arrived(telemetry, otlp))
    assert sorted(root.span.name for root in roots) == ["chat smol", "plan", "release"]
