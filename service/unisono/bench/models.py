"""What each model gains on this machine by sharing passes: batches of 1, 2, 4 … items through the service.

Sizes and models take turns within a run, so that a machine that slows down slows all alike. Models take turns as a
whole, because a change of model may load it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as rpc_grpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.bench.through import Reader, run_batch
from unisono.core.benchmark import Advice, BatchRun, Step, advise, steps_of

SIZES = (1, 2, 4, 8, 16)
_QUESTIONS = (
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What is bread made of?",
    "Why do cats purr?",
    "How do boats float?",
    "What makes the wind blow?",
    "Why do leaves fall in autumn?",
    "How is glass made?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """What was found about one model."""

    model: str
    steps: tuple[Step, ...]
    # How many requests its runner computes side by side; None where that is not known, even afterwards.
    slots: int | None
    # Where that number comes from.
    slot_source: event_pb2.SlotSource.ValueType
    advice: Advice
    question: str
    # The beginning of what it answered.
    sample: str
    # Why it could not be measured; "" where it could.
    error: str = ""


@dataclass(slots=True)
class _Found:
    runs: list[BatchRun] = field(default_factory=list)
    slots: event_pb2.SlotCount = field(default_factory=event_pb2.SlotCount)
    sample: str = ""
    error: str = ""


class GainMeasurement:
    """Measures models, in the order given."""

    def __init__(
        self,
        stub: rpc_grpc.BatchInferenceStub,
        models: Sequence[str],
        *,
        runs: int,
        sizes: Sequence[int] = SIZES,
        num_predict: int = 48,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._stub = stub
        self._runs = runs
        self._sizes = sizes
        self._num_predict = num_predict
        self._on_progress = on_progress
        self._found = {model: _Found() for model in models}
        # Batches that were measured, and those that were to be.
        self.finished = 0
        self.wanted = runs * len(sizes) * len(self._found)

    async def run(self) -> None:
        """Everything, in turn; `found` has what is finished, also where this is broken off."""
        for model, each in self._found.items():
            self._on_progress(f"{model}: the first answer")
            # Loads the model, and counts for nothing.
            items = items_of(model, 1, run=-1, num_predict=self._num_predict)
            await _run(self._stub, each, items, counts=False)
        for run in range(self._runs):
            for model, each in self._found.items():
                for size in self._sizes:
                    if not each.error:
                        what = f"{size} {'items' if size > 1 else 'item'}"
                        self._on_progress(f"run {run + 1} of {self._runs}: {model}, {what}")
                        items = items_of(model, size, run=run, num_predict=self._num_predict)
                        await _run(self._stub, each, items, counts=True)
                    self.finished += 1

    def found(self) -> list[ModelFigures]:
        """The figures of the models that were measured so far; one that failed has its error instead."""
        return [_figures(model, each) for model, each in self._found.items() if each.runs or each.error]


def items_of(model: str, size: int, *, run: int, num_predict: int) -> list[item_pb2.Item]:
    """A batch of distinct questions; of another run, and another size, none begins alike."""
    items = []
    for number in range(size):
        question = _QUESTIONS[number % len(_QUESTIONS)]
        lead = f"({run + 1}.{size}.{number + 1}) " if run >= 0 else ""
        message = item_pb2.Message(role=item_pb2.ROLE_USER, content=f"{lead}{question}")
        items.append(
            item_pb2.Item(
                item_id=f"{number}",
                model=model,
                chat=item_pb2.ChatRequest(messages=[message]),
                options=item_pb2.Options(num_predict=num_predict, temperature=0),
            )
        )
    return items


async def _run(
    stub: rpc_grpc.BatchInferenceStub, found: _Found, items: Sequence[item_pb2.Item], *, counts: bool
) -> None:
    reader = Reader([item.item_id for item in items])
    began = time.perf_counter()
    async for event in run_batch(stub, items, rpc.BatchConfig()):
        reader.hear(event)
        if event.HasField("summary"):
            for group in event.summary.report.groups:
                found.slots = group.group.slots
    duration_s = time.perf_counter() - began
    found.sample = found.sample or reader.sample
    errors = [answer.error for answer in reader.answers if answer.error]
    if errors:
        found.error = errors[0]
    elif counts:
        found.runs.append(
            BatchRun(
                items=len(items),
                duration_s=duration_s,
                latencies_s=tuple(answer.latency_s for answer in reader.answers),
                completion_tokens=sum(answer.tokens for answer in reader.answers),
                passes=reader.passes,
            )
        )


def _figures(model: str, found: _Found) -> ModelFigures:
    steps = steps_of(found.runs)
    slots = found.slots.count or None
    return ModelFigures(
        model=model,
        steps=steps,
        slots=slots,
        slot_source=found.slots.source,
        advice=advise(steps, slots),
        question=_QUESTIONS[0],
        sample=found.sample,
        error=found.error,
    )
