"""Values of the core in which everything is set, each number another."""

from __future__ import annotations

from array import array

from unisono.core import events, idle, memory, model, passes, plan, report
from unisono.core.commands import ReleaseReason
from unisono.core.errors import BackendBusyError, InvalidRequestError, LoadFailedError, Violation
from unisono.core.prefixes import Prefix

NOW_NS = 1_700_000_000_123_456_789
MIB = 1024 * 1024

OPTIONS = model.RunnerOptions(
    num_ctx=4096, num_batch=512, num_gpu=-1, main_gpu=0, use_mmap=False, num_thread=4, draft_num_predict=0
)
RUNNER = model.RunnerSpec(backend="local", model="m:1b", digest="sha", options=OPTIONS, shift=False)
SLOTS = model.Slots(count=8, source=model.SlotSource.LEARNED)
STATE = model.SlotState(slots=SLOTS, at_least=7, limit=6, reason="it is shared", remedy="ask the others")
PLANNED = report.GroupPlanned(
    group=2,
    runner=RUNNER,
    item_count=16,
    is_loaded=True,
    slots=SLOTS,
    state=STATE,
    context_reason="4,096 tokens: asked for",
    memory=memory.MemoryEstimate(weights_bytes=2**31, kv_cache_bytes=2**28, context_tokens=4096, slots=8),
    measured_bytes=2**32,
)
LOGPROBS = (
    model.TokenLogprob(
        token="Hi", logprob=-0.25, bytes=b"Hi", top=(model.TokenLogprob(token="Ho", logprob=-2.5, bytes=b"Ho"),)
    ),
)
VECTORS = (array("f", [0.1, -2.0, 3e8]), array("f"))
COMPLETION = model.Completion(
    model="m:1b",
    content="Hi",
    thinking="hm",
    tool_calls=(model.ToolCall(id="c1", name="look", arguments_json='{"b": 1}'),),
    finish_reason=model.FinishReason.TOOL_CALLS,
    finish_reason_raw="stop",
    logprobs=LOGPROBS,
    embeddings=VECTORS,
)
TIMINGS = model.Timings(
    queued_s=0.001,
    slot_wait_s=0.0,
    load_s=1.5,
    prompt_eval_s=0.25,
    eval_s=12.000000001,
    first_token_s=0.3,
    total_s=100.0,
)
RESULT = events.Result(
    item_id="a",
    index=3,
    state=model.ItemState.COMPLETED,
    completion=COMPLETION,
    usage=model.Usage(prompt_tokens=11, cached_prompt_tokens=0, completion_tokens=13),
    timings=TIMINGS,
    attempts=2,
    shared_with=7,
    passes=12,
    group=0,
    parts=4,
    variant_of="whole",
    release_reason=ReleaseReason.TAIL,
    disturbed=1,
)
FAILED = events.Result(item_id="b", index=4, state=model.ItemState.FAILED, error=BackendBusyError("full"))
PROGRESS = report.Progress(
    accepted=21,
    queued=22,
    in_flight=23,
    completed=24,
    failed=25,
    cancelled=26,
    expired=27,
    completion_tokens=2**33,
    passes=2**34,
)
GROUP_REPORT = report.GroupReport(
    group=PLANNED,
    passes=passes.PassCount(count=100, method=model.PassMethod.ARRIVAL, imputed_share=0.125, confidence=0.75),
    fewest_passes=90,
    waves=3,
    first_wave=report.WaveReport(item_count=8, release_spread_s=0.00084, first_token_spread_s=0.002),
    loads=1,
    load_s=2.5,
    duration_s=30.0,
    participations=700,
    prompt_tokens=1000,
    completion_tokens=700,
    cached_prompt_tokens=300,
    idle_s=((idle.IdleReason.REFILL, 0.25), (idle.IdleReason.NO_ITEMS, 12.0)),
    costs=report.Costs(
        pass_s=0.02, token_s=0.001, prompt_token_s=0.0005, passes_measured=77, single_stream_token_s=0.021
    ),
    one_at_a_time_s=90.0,
    families=(report.FamilyReport(prefix_tokens=620, item_count=16, computed=2),),
    context_used=0.625,
    runner_deaths=3,
)
REPORT = report.Report(
    batch_id="batch-1",
    duration_s=33.5,
    counts=PROGRESS,
    groups=(GROUP_REPORT,),
    prompt_tokens=1001,
    cached_prompt_tokens=0,
    completion_tokens=701,
    retries=5,
    journal_bytes=2**35,
    counted_since_ns=NOW_NS,
)
LASTING: list[events.LastingEvent] = [
    events.Accepted(batch_id="batch-1", item_count=24),
    PLANNED,
    events.Loading(group=2, state=events.LoadState.FAILED, duration_s=1.25, error=LoadFailedError("no memory")),
    events.Released(group=2, wave=1, item_count=8, others=2, spread_s=0.00084),
    events.ResultPart(item_id="a", index=3, part=1, content="c", thinking="t", embeddings=VECTORS, logprobs=LOGPROBS),
    RESULT,
    FAILED,
    PROGRESS,
    events.Summary(state=events.BatchState.EXPIRED, report=REPORT, error=BackendBusyError("cut short")),
]
DELTAS = events.Deltas(
    items=(
        events.Delta(
            item_id="a", index=3, attempt=2, content_offset=5, content="lo", thinking_offset=6, thinking="so"
        ),
    )
)
GROUP = plan.Group(
    runner=RUNNER,
    model=model.ModelInfo(backend="local", name="m:1b", digest="sha", size_bytes=2**31, kv_bytes_per_token=2**16),
    items=tuple(
        model.Item(
            item_id=f"i{index}",
            index=index,
            request=model.GenerateRequest(prompt="x" * 40),
            options=model.Options(num_predict=16),
        )
        for index in range(3)
    ),
    is_loaded=True,
    reason="it is loaded",
    measured_bytes=2**32,
    context_tokens=4096,
    context_reason="4,096 tokens: asked for",
    prefixes=(Prefix(7, (7,), (2480,)), None, Prefix(7, (7,), (2480,))),
)
WARNED = plan.Warned(
    item_id="i1", field="options.runner.num_ctx", reason="CONTEXT_MAY_BE_TOO_SMALL", message="raise it"
)
LOADED = model.LoadedRunner(
    model="m:1b",
    digest="sha",
    context_length=4096,
    size_bytes=2**33,
    size_vram_bytes=2**32,
    expires_at_ns=NOW_NS,
    slots=4,
)
INFO = model.ModelInfo(
    backend="local",
    name="m:1b",
    digest="sha",
    family="llama",
    parameter_size="1.2B",
    quantization="Q4_K_M",
    context_length=8192,
    capabilities=frozenset({"tools", "completion"}),
    size_bytes=2**31,
)
WRONG = InvalidRequestError("bad", violations=[Violation(field="item_id", description="is required")])
