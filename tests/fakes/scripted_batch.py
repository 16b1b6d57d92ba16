"""A batch played to a watcher, without a service: every call of `BatchWatch`, at times that the script sets.

Every text that a caller or a model wrote holds `SECRET`, so that a test can look for it where it must not be.
At the end of the file: what tests ask of the trace that comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count

from opentelemetry.context import Context
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tests.fakes.otlp import OtlpReceiver, SeenSpan
from unisono.adapters.telemetry.setup import Telemetry, configure
from unisono.app.ports import BatchWatch, Listener, LoadOutcome, ReleaseTimes
from unisono.core.commands import ReleaseReason
from unisono.core.errors import (
    CancelledItemError,
    ItemTimeoutError,
    ModelNotFoundError,
    RunnerDiedError,
    UnisonoError,
)
from unisono.core.events import BatchState, Result, Summary
from unisono.core.idle import IdleReason
from unisono.core.memory import MemoryEstimate
from unisono.core.model import (
    ChatRequest,
    Completion,
    EmbedRequest,
    FinishReason,
    Format,
    GenerateRequest,
    Item,
    ItemState,
    Message,
    Options,
    PassMethod,
    Role,
    RunnerOptions,
    RunnerSpec,
    Slots,
    SlotSource,
    SlotState,
    Timings,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)
from unisono.core.passes import PassCount
from unisono.core.report import (
    Costs,
    FamilyReport,
    GroupPlanned,
    GroupReport,
    Progress,
    Report,
)

SECRET = "xyzzy-plugh"
METHOD = "unisono.v1.BatchInference/RunBatch"
START_NS = 1_760_000_000_000_000_000
MS = 1_000_000
# Releases of the scripts that name none: below those that a script may name.
_own_waves = count(-1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A backend, as far as a trace knows it."""

    name: str = "desk"
    kind: str = "ollama"
    url: str = "http://ollama.example:11434"


def chat_item(index: int, *, model: str = "smol") -> Item:
    """A conversation with everything in it that could be said."""
    return Item(
        item_id=f"item-{index}",
        index=index,
        model=model,
        request=ChatRequest(
            messages=(
                Message(role=Role.SYSTEM, content=f"system {SECRET}"),
                Message(role=Role.USER, content=f"question {SECRET}", images=(SECRET.encode(),)),
                Message(
                    role=Role.ASSISTANT,
                    thinking=f"thought {SECRET}",
                    tool_calls=(ToolCall(id="c1", name="look_up", arguments_json=f'{{"what": "{SECRET}"}}'),),
                ),
                Message(role=Role.TOOL, content=f"found {SECRET}", tool_name="look_up", tool_call_id="c1"),
            ),
            tools=(Tool(name="look_up", description=SECRET, parameters_json=f'{{"title": "{SECRET}"}}'),),
            format=Format(json_schema=f'{{"title": "{SECRET}"}}'),
        ),
        options=Options(
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            seed=7,
            num_predict=80,
            frequency_penalty=0.25,
            presence_penalty=0.125,
            stop=("END",),
            extra_json=f'{{"x": "{SECRET}"}}',
        ),
    )


def generate_item(index: int) -> Item:
    """A prompt that names no model: its batch has only one."""
    request = GenerateRequest(prompt=f"prompt {SECRET}", system=f"system {SECRET}", suffix=SECRET, template=SECRET)
    return Item(item_id=f"item-{index}", index=index, request=request)


def embed_item(index: int) -> Item:
    """A text to embed."""
    request = EmbedRequest(input=(f"text {SECRET}",), dimensions=64)
    return Item(item_id=f"item-{index}", index=index, model="embedder", request=request)


def completed(item: Item, *, group: int = 0, attempts: int = 1, disturbed: int = 0) -> Result:
    """An item's answer."""
    return Result(
        item_id=item.item_id,
        index=item.index,
        state=ItemState.COMPLETED,
        completion=Completion(
            model="smol:latest",
            content=f"answer {SECRET}",
            thinking=f"thought {SECRET}",
            tool_calls=(ToolCall(name="look_up", arguments_json=f'{{"what": "{SECRET}"}}'),),
            finish_reason=FinishReason.STOP,
            logprobs=(TokenLogprob(token=SECRET, logprob=-0.5),),
        ),
        usage=Usage(prompt_tokens=21, cached_prompt_tokens=5, completion_tokens=13),
        timings=Timings(queued_s=0.25, slot_wait_s=0.125, first_token_s=0.5),
        attempts=attempts,
        shared_with=3,
        passes=13,
        group=group,
        disturbed=disturbed,
    )


def stopped(
    item: Item, error: UnisonoError, state: ItemState = ItemState.FAILED, *, group: int | None = 0, attempts: int = 1
) -> Result:
    """An item's end without an answer."""
    return Result(item_id=item.item_id, index=item.index, state=state, error=error, attempts=attempts, group=group)


class ScriptedBatch:
    """One batch; each method is a step, and the clock goes on a millisecond with each thing that happens."""

    def __init__(
        self,
        listener: Listener,
        *,
        carrier: Mapping[str, str] | None = None,
        batch_id: str = "batch-1",
    ) -> None:
        self.now_ns = START_NS
        self.watch: BatchWatch = listener.batch_accepted(
            batch_id=batch_id, method=METHOD, carrier=carrier or {}, at_ns=self.now_ns
        )
        self.groups: list[GroupPlanned] = []

    def tick(self, ms: float = 1) -> int:
        """Lets time pass; the new time."""
        self.now_ns += int(ms * MS)
        return self.now_ns

    def plan(self, *models: str, items: int = 4) -> None:
        """Assigns items: a group for each model. Said again, it adds to them."""
        self.groups = [
            GroupPlanned(
                group=number,
                runner=RunnerSpec(
                    backend="desk", model=model, digest=f"sha256:{model}", options=RunnerOptions(num_ctx=2048)
                ),
                item_count=items,
                is_loaded=number == 0,
                # What a runner looks like before anything was seen of it.
                state=SlotState(
                    at_least=1, limit=4, reason="OLLAMA_NUM_PARALLEL is 1, its default", remedy="raise it"
                ),
                context_reason="2,048 tokens: asked for",
            )
            for number, model in enumerate(models)
        ]
        self.watch.planned(started_ns=self.now_ns, ended_ns=self.tick(), groups=self.groups, families=1)

    def load(self, group: int = 0, *, ms: float = 50, error: UnisonoError | None = None) -> None:
        """Makes the group's runner ready, or fails to."""
        outcome = None if error else LoadOutcome(was_loaded=False, duration_s=ms / 1000, slots=8)
        self.watch.group_loaded(
            group=group, started_ns=self.now_ns, ended_ns=self.tick(ms), outcome=outcome, error=error
        )

    def stage(self, *items: Item, group: int = 0, attempt: int = 1) -> list[Mapping[str, str]]:
        """Stages items; their headers."""
        headers = [
            self.watch.item_staging(item=item, group=group, attempt=attempt, at_ns=self.tick()) for item in items
        ]
        for item in items:
            self.watch.item_staged(index=item.index, at_ns=self.tick())
        return headers

    def release(
        self,
        *items: Item,
        group: int = 0,
        wave: int = 0,
        others: int = 0,
        wave_key: int | None = None,
        reason: ReleaseReason = ReleaseReason.LONGEST,
        lane: int | None = 0,
    ) -> None:
        """Releases them together, half a millisecond from the first to the last; each into the next lane."""
        key = next(_own_waves) if wave_key is None else wave_key
        times = ReleaseTimes(first_ns=self.now_ns, last_ns=self.tick(0.5))
        for place, item in enumerate(items):
            self.watch.item_released(
                index=item.index,
                wave=wave,
                wave_key=key,
                at_ns=times.last_ns,
                reason=reason,
                lane=None if lane is None else lane + place,
            )
        self.watch.wave_released(
            group=group, wave=wave, wave_key=key, item_count=len(items), others=others, times=times
        )

    def speak(self, *items: Item) -> None:
        """Their first tokens arrive."""
        for item in items:
            self.watch.item_first_token(index=item.index, at_ns=self.tick())

    def retry(self, item: Item, error: UnisonoError, *, attempt: int = 1, is_free: bool = False) -> None:
        """An attempt fails, and there will be another; `is_free`: it was broken off by another item's."""
        self.watch.item_retried(
            index=item.index,
            attempt=attempt,
            error=error,
            again_in_s=0.0 if is_free else 0.5,
            is_free=is_free,
            at_ns=self.tick(),
        )

    def finish(self, *results: Result) -> None:
        """Items end."""
        for result in results:
            self.watch.item_ended(result=result, at_ns=self.tick())

    def run(self, item: Item, *, group: int = 0, wave: int = 0) -> None:
        """An item from its staging to its answer."""
        self.stage(item, group=group)
        self.release(item, group=group, wave=wave)
        self.speak(item)
        self.finish(completed(item, group=group))

    def end(self, state: BatchState = BatchState.COMPLETED, error: UnisonoError | None = None) -> None:
        """The batch ends, with figures of the script's invention."""
        learned = Slots(count=8, source=SlotSource.LEARNED)
        groups = tuple(
            GroupReport(
                group=replace(
                    group,
                    slots=learned,
                    state=SlotState(slots=learned, at_least=8, limit=6),
                    memory=MemoryEstimate(weights_bytes=100, kv_cache_bytes=23, context_tokens=2048, slots=8),
                    measured_bytes=110,
                ),
                passes=PassCount(count=20, method=PassMethod.CREATED_AT, imputed_share=0.25, confidence=0.75),
                fewest_passes=13,
                waves=2,
                first_wave=None,
                loads=1,
                load_s=0.05,
                duration_s=1.0,
                participations=50,
                prompt_tokens=84,
                completion_tokens=70,
                cached_prompt_tokens=20,
                idle_s=((IdleReason.REFILL, 0.25), (IdleReason.NO_ITEMS, 1.5)),
                costs=Costs(
                    pass_s=0.02,
                    token_s=0.001,
                    prompt_token_s=0.0005,
                    passes_measured=18,
                    single_stream_token_s=0.0625,
                ),
                one_at_a_time_s=3.5,
                families=(
                    FamilyReport(prefix_tokens=300, item_count=3, computed=1),
                    FamilyReport(prefix_tokens=90, item_count=2, computed=2),
                ),
                context_used=0.125,
                runner_deaths=1,
            )
            for group in self.groups
        )
        report = Report(
            batch_id="batch-1",
            duration_s=(self.now_ns - START_NS) / 1e9,
            counts=Progress(accepted=7, completed=4, failed=1, cancelled=1, expired=1),
            groups=groups,
            prompt_tokens=84,
            cached_prompt_tokens=40,
            completion_tokens=70,
            retries=1,
        )
        self.watch.ended(summary=Summary(state=state, report=report, error=error), at_ns=self.tick())


def play(batch: ScriptedBatch) -> list[Mapping[str, str]]:
    """Two groups; a load, two waves, a retry, a failure, one cancelled, one that never had a group."""
    items = [chat_item(0), chat_item(1), generate_item(2), chat_item(3), embed_item(4), chat_item(5), chat_item(6)]
    batch.plan("smol", "embedder")
    headers = batch.stage(*items[:3])
    batch.release(*items[:3], others=2)
    batch.speak(items[0], items[1])
    batch.finish(completed(items[0]))
    batch.retry(items[1], RunnerDiedError(f"died at {SECRET}"))
    headers += batch.stage(items[1], attempt=2)
    batch.release(items[1], wave=1, reason=ReleaseReason.TAIL, lane=3)
    batch.speak(items[1])
    batch.finish(
        completed(items[1], attempts=2),
        stopped(items[2], ModelNotFoundError(f"no model for {SECRET}")),
        stopped(items[3], CancelledItemError(SECRET), ItemState.CANCELLED, attempts=0),
    )
    batch.load(1)
    headers += batch.stage(items[4], group=1)
    batch.release(items[4], group=1)
    batch.finish(
        completed(items[4], group=1),
        stopped(items[5], ItemTimeoutError(SECRET), ItemState.EXPIRED, group=None, attempts=0),
        stopped(items[6], ModelNotFoundError(SECRET), group=None, attempts=0),
    )
    batch.end()
    return headers


def tracing(otlp: OtlpReceiver, **variables: str) -> Telemetry:
    """Tracing that ends at the receiver."""
    telemetry = configure("1.2.3", {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint, **variables})
    assert telemetry is not None
    return telemetry


def arrived(telemetry: Telemetry, otlp: OtlpReceiver) -> tuple[SeenSpan, ...]:
    """Everything that was sent, once it is all there."""
    assert telemetry.shutdown(timeout_s=10)
    return otlp.spans


def context_of(headers: Mapping[str, str]) -> tuple[str, str, bool]:
    """Trace, parent and whether it is sampled, as the receiver of these headers reads them."""
    context = get_current_span(TraceContextTextMapPropagator().extract(headers, Context())).get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)


def named(spans: tuple[SeenSpan, ...], name: str) -> SeenSpan:
    """The one span of that name."""
    (found,) = [span for span in spans if span.name == name]
    return found


def of_item(spans: tuple[SeenSpan, ...], index: int) -> SeenSpan:
    """The one span of that item."""
    (found,) = [span for span in spans if span.attributes.get("unisono.index") == index]
    return found
