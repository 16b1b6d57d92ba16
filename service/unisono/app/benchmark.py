"""Measures models: batches of 1, 2, 4 … equal items, in turn, run like any other batch's.

Each run is a batch of its own, so that its report says how long it took from the release to the last end, and how
many forward passes that was. A first item, which is not measured, has the model loaded and warm.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from unisono.app.follow import follow
from unisono.core.batch import BatchConfig
from unisono.core.benchmark import AdviceKind, BatchRun, advise, flattens_at, steps_of
from unisono.core.events import Journalled, Result, Summary
from unisono.core.model import ChatRequest, Item, ItemState, Message, Options, Role, SlotState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from unisono.app.batches import Batches
    from unisono.app.ports import Clock
    from unisono.core.benchmark import Step

# What is asked where the caller names nothing: answers of any length come from it.
PROMPT = "Tell a long story about a lighthouse and the people who kept it."
SIZES = (1, 2, 4, 8)
RUNS = 3
NUM_PREDICT = 64

_MORE = "{slots} slots (Ollama: OLLAMA_NUM_PARALLEL={slots})"
_FLAT = "More than {slots} items at a time bring less than a tenth more"
_ADVICE = {
    AdviceKind.RAISE: f"One request is answered at a time, so no forward pass is shared: give the backend {_MORE}.",
    AdviceKind.TRY_MORE: f"The last doubling still brought much: try {_MORE}.",
    AdviceKind.FEWER_DO: f"{_FLAT}: {_MORE} would do, and take less memory.",
    AdviceKind.RIGHT: "Nothing to change: {slots} slots serve this model well.",
    AdviceKind.FLAT: f"{_FLAT}. How many slots there are is not known yet; {_MORE} would do.",
    AdviceKind.UNKNOWN: "The gain still grows at the largest number measured, and how many slots there are is not "
    "known yet: measure more items at a time.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What is to be measured."""

    models: tuple[str, ...]
    # Items at a time, smallest first, each once.
    sizes: tuple[int, ...] = SIZES
    # How often each size is measured.
    runs: int = RUNS
    prompt: str = PROMPT
    # Of all items, the length of the answer included.
    options: Options = field(default_factory=lambda: Options(num_predict=NUM_PREDICT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A size was run once."""

    model: str
    size: int
    # From 1.
    run: int
    # From the release to the last end; 0 where nothing was released.
    duration_s: float
    completion_tokens: int
    passes: int
    # Items that did not complete, and the first one's reason.
    failed: int
    failure_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A model was measured."""

    model: str
    steps: tuple[Step, ...]
    sample_answer: str
    slots: SlotState
    best_size: int
    advice: str


@dataclass(slots=True)
class _Ended:
    """A batch that was run to its end."""

    results: list[Result] = field(default_factory=list)
    summary: Summary | None = None


async def measure(
    asked: Benchmark, batches: Batches, clock: Clock, *, method: str, carrier: Mapping[str, str]
) -> AsyncGenerator[Measured | Verdict, None]:
    """Yields each run as it is measured, and a verdict after the last run of each model.

    Raises what keeps a model from being measured at all: no such model, no chat, a backend that is away, a limit.
    When the generator is closed, the batch that runs is cancelled.
    """
    # Numbers that no prompt had before, so that none is found in a cache.
    numbers = count(clock.time_ns() // 1_000_000 % 10**9 * 1000)
    items = [_item(asked, name, f"model {place}", next(numbers)) for place, name in enumerate(asked.models)]
    refused = (await batches.plan(items, BatchConfig(is_strict=False))).refused
    if refused:
        raise refused[0][2]
    for name in asked.models:
        found = _measure_model(asked, name, numbers, batches, clock, method=method, carrier=carrier)
        async with aclosing(found) as measured:
            async for each in measured:
                yield each


async def _measure_model(
    asked: Benchmark,
    name: str,
    numbers: Iterator[int],
    batches: Batches,
    clock: Clock,
    *,
    method: str,
    carrier: Mapping[str, str],
) -> AsyncGenerator[Measured | Verdict, None]:
    runs: list[BatchRun] = []
    sample, slots, reason = "", SlotState(), ""
    for run in range(asked.runs + 1):
        # The run before the first has one item, and is not told.
        for size in asked.sizes if run else (1,):
            items = [_item(asked, name, f"i{place}", next(numbers)) for place in range(size)]
            ended = await _run(items, batches, clock, method=method, carrier=carrier)
            answers = [one.completion for one in ended.results if one.completion is not None]
            sample = sample or next((one.content for one in answers if one.content), "")
            measured = _measured(ended, name, size, run)
            reason = reason or measured.failure_reason
            for group in ended.summary.report.groups if ended.summary else ():
                slots = group.group.state
            if run:
                yield measured
                if not measured.failed:
                    runs.append(_batch_run(ended, measured))
    steps = steps_of(runs)
    yield Verdict(
        model=name,
        steps=steps,
        sample_answer=sample,
        slots=slots,
        best_size=flattens_at(steps) or max((step.items for step in steps), default=0),
        advice=_advice(steps, slots) if steps else f"Nothing could be measured: {reason or 'no answer had a token'}.",
    )


def _item(asked: Benchmark, model: str, item_id: str, number: int) -> Item:
    message = Message(role=Role.USER, content=f"{number}: {asked.prompt}")
    request = ChatRequest(messages=(message,))
    return Item(item_id=item_id, index=0, request=request, model=model, options=asked.options)


async def _run(
    items: list[Item], batches: Batches, clock: Clock, *, method: str, carrier: Mapping[str, str]
) -> _Ended:
    config = BatchConfig()
    checked = await batches.check(items, config)
    batch, _ = batches.open(config, method=method, carrier=carrier, item_count=len(checked))
    ended = _Ended()
    # The batch lives on this call: whoever leaves it cancels the batch.
    batch.callers.join()
    try:
        batch.run_whole(checked)
        async with aclosing(follow(batch, clock)) as events:
            async for event in events:
                match event:
                    case Journalled(event=Result() as result):
                        ended.results.append(result)
                    case Journalled(event=Summary() as summary):
                        ended.summary = summary
                    case _:
                        pass
    finally:
        batch.callers.lose()
    # Nobody was told its name; kept, it would push out batches that somebody may still ask for.
    batches.forget(batch)
    return ended


def _measured(ended: _Ended, model: str, size: int, run: int) -> Measured:
    groups = ended.summary.report.groups if ended.summary else ()
    errors = [one.error for one in ended.results if one.error is not None]
    return Measured(
        model=model,
        size=size,
        run=run,
        duration_s=max((group.duration_s or 0.0 for group in groups), default=0.0),
        completion_tokens=sum(group.completion_tokens for group in groups),
        passes=sum(group.passes.count for group in groups),
        failed=sum(1 for one in ended.results if one.state is not ItemState.COMPLETED),
        failure_reason=errors[0].reason if errors else "",
    )


def _batch_run(ended: _Ended, measured: Measured) -> BatchRun:
    spans = [one.timings.total_s for one in ended.results if one.timings is not None]
    return BatchRun(
        items=measured.size,
        duration_s=measured.duration_s,
        latencies_s=tuple(span for span in spans if span is not None),
        completion_tokens=measured.completion_tokens,
        passes=measured.passes or None,
    )


def _advice(steps: Sequence[Step], state: SlotState) -> str:
    """What to set, in words."""
    given = advise(steps, state.slots.count or None)
    if given.kind is AdviceKind.RAISE and state.remedy:
        # One slot may have a reason that no setting changes.
        return f"{state.reason[:1].upper()}{state.reason[1:]}: {state.remedy}."
    return _ADVICE[given.kind].format(slots=given.slots)
