"""Measurements of models: what is asked for, and what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import server_pb2
from unisono.app.benchmark import NUM_PREDICT, PROMPT, RUNS, SIZES, Benchmark, Measured, Verdict
from unisono.core import limits, model
from unisono.edge.contract.convert_figures import slot_count
from unisono.edge.contract.convert_in import LIMITS, options_of
from unisono.edge.contract.found import Found
from unisono.edge.contract.wire import duration
from unisono.edge.status import cut, utf8

if TYPE_CHECKING:
    from unisono.core.benchmark import Step

MAX_MODELS: Final = 16
MAX_SIZES: Final = 16
MAX_SIZE: Final = 256
MAX_RUNS: Final = 100
MAX_NUM_PREDICT: Final = 4096
# What stands in front of each prompt has room beside it.
_LEAD_BYTES: Final = 64
# The longest answer has 4,096 tokens, and some tokens are long.
_SAMPLE_BYTES: Final = 256 * 1024


def benchmark(message: pb.BenchmarkRequest, *, bounds: limits.Limits = LIMITS) -> Benchmark:
    """What is to be measured. Raises InvalidRequestError with all that is wrong."""
    found = Found()
    if not 1 <= len(message.models) <= MAX_MODELS:
        found.add("models", f"has {len(message.models):,} names; it may have 1 to {MAX_MODELS}")
    for i, name in enumerate(message.models[:MAX_MODELS]):
        for wrong in limits.check_model(name, bounds):
            found.add(f"models[{i}]", wrong.description)
    if len(message.sizes) > MAX_SIZES:
        found.add("sizes", f"has {len(message.sizes):,} numbers; at most {MAX_SIZES} are taken")
    for i, size in enumerate(message.sizes[:MAX_SIZES]):
        if not 1 <= size <= min(MAX_SIZE, bounds.max_items):
            found.add(f"sizes[{i}]", f"is {size:,}; it may be 1 to {min(MAX_SIZE, bounds.max_items):,}")
    if message.runs > MAX_RUNS:
        found.add("runs", f"is {message.runs:,}; it may be 1 to {MAX_RUNS}")
    if message.num_predict > MAX_NUM_PREDICT:
        found.add("num_predict", f"is {message.num_predict:,}; it may be 1 to {MAX_NUM_PREDICT:,}")
    size = len(message.prompt.encode())
    if size > (most := bounds.max_item_text_bytes - _LEAD_BYTES):
        found.add("prompt", f"has {size:,} bytes; at most {most:,} are taken")
    options = options_of(message.options, "options", found) if message.HasField("options") else model.Options()
    found.violations += limits.check_options(options, bounds)
    found.raise_if_any("")
    return Benchmark(
        # Each once, in the order given.
        models=tuple(dict.fromkeys(message.models)),
        sizes=tuple(sorted(set(message.sizes))) or SIZES,
        runs=message.runs or RUNS,
        prompt=message.prompt or PROMPT,
        options=replace(options, num_predict=message.num_predict or NUM_PREDICT),
    )


def response(measured: Measured | Verdict) -> pb.BenchmarkResponse:
    """A run, or what came of all runs of a model."""
    match measured:
        case Measured():
            return pb.BenchmarkResponse(run=_run(measured))
        case Verdict():
            return pb.BenchmarkResponse(verdict=_verdict(measured))


def _run(measured: Measured) -> server_pb2.BenchmarkRun:
    return server_pb2.BenchmarkRun(
        model=measured.model,
        size=measured.size,
        run=measured.run,
        duration=duration(measured.duration_s),
        completion_tokens=measured.completion_tokens,
        passes=measured.passes,
        failed=measured.failed,
        failure_reason=measured.failure_reason,
    )


def _verdict(verdict: Verdict) -> server_pb2.BenchmarkVerdict:
    # Gains are beside the smallest size; the contract's are beside one item.
    has_single = any(step.items == 1 for step in verdict.steps)
    return server_pb2.BenchmarkVerdict(
        model=verdict.model,
        points=[_point(step, has_single=has_single) for step in verdict.steps],
        sample_answer=cut(verdict.sample_answer, _SAMPLE_BYTES),
        slots=slot_count(verdict.slots.slots, verdict.slots),
        best_size=verdict.best_size,
        advice=utf8(verdict.advice),
    )


def _point(step: Step, *, has_single: bool) -> server_pb2.BenchmarkPoint:
    return server_pb2.BenchmarkPoint(
        size=step.items,
        duration=duration(step.duration_s.median),
        tokens_per_second=step.tokens_per_s.median,
        least_tokens_per_second=step.tokens_per_s.low,
        most_tokens_per_second=step.tokens_per_s.high,
        gain=step.gain if has_single else None,
        items_per_pass=step.items_per_pass or 0.0,
        runs=step.duration_s.count,
    )
