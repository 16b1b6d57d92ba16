"""Sixteen questions on eight slots: what sharing forward passes is worth, proved by the engine's own counter.

Run with `-s` to see the figures.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from tests.embedded_service import EmbeddedService, embedded_service
from tests.engine import MODEL
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2

pytestmark = [pytest.mark.embedded, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SLOTS: Final = 8
COUNT: Final = 16
NUM_PREDICT: Final = 80
ROOT: Final = Path(__file__).parents[2]
# Of our own writing, so that the proof runs everywhere.
OURS: Final = ROOT / "tests" / "fixtures" / "questions.jsonl"
# The test questions of GSM8K, where they stand beside the checkout.
GSM8K: Final = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"

FILES = [
    pytest.param(OURS, id="ours"),
    pytest.param(
        GSM8K,
        id="gsm8k",
        marks=pytest.mark.skipif(not GSM8K.is_file(), reason="needs ../shared/data/gsm8k_test.jsonl"),
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncGenerator[EmbeddedService, None]:
    """A whole service over an engine of its own, with eight slots."""
    async with embedded_service(embedded_slots=SLOTS) as made:
        yield made


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run cost."""

    tokens: int
    # Forward passes by the engine's own counter, and as the report says.
    passes: int
    counted: int
    seconds: float
    # How many passes had so many members.
    sizes: dict[int, int]

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, ÷ {SLOTS} = {self.tokens / SLOTS:.1f}; passes by the engine {self.passes}, "
            f"counted {self.counted}; {self.seconds:.1f} s; items per pass {self.sizes}"
        )


def questions(file: Path) -> list[item_pb2.Item]:
    """The first sixteen questions of a file, as items."""
    lines = file.read_text(encoding="utf-8").splitlines()[:COUNT]
    texts = [json.loads(line)["question"] for line in lines]
    assert len(texts) == COUNT
    return [
        item_pb2.Item(
            item_id=f"q{n}",
            chat=item_pb2.ChatRequest(messages=[item_pb2.Message(role=item_pb2.ROLE_USER, content=text)]),
        )
        for n, text in enumerate(texts)
    ]


async def answer_all(service: EmbeddedService, file: Path) -> Figures:
    """Runs the questions as one batch, and looks at the engine's counter before and after."""
    before, began = await service.passes(), time.monotonic()
    seen = await service.run(
        questions(file), model=MODEL, options=item_pb2.Options(num_predict=NUM_PREDICT, temperature=0)
    )
    seconds, after = time.monotonic() - began, await service.passes()
    assert set(seen.states().values()) == {"COMPLETED"}
    assert len(seen.results) == COUNT
    tokens = sum(result.usage.completion_tokens for result in seen.results.values())
    assert all(0 < result.usage.completion_tokens <= NUM_PREDICT for result in seen.results.values())
    (group,) = seen.report.groups
    assert group.completion_tokens == tokens
    assert group.passes.method == event_pb2.PASS_METHOD_ARRIVAL
    assert group.group.slots.count == SLOTS
    listed = await service.stub.ListPasses(pb.ListPassesRequest(batch_id=seen.batch_id, page_size=1000))
    assert len(listed.passes) == group.passes.count
    sizes = Counter(len(one.item_indexes) for one in listed.passes)
    return Figures(
        tokens=tokens,
        passes=after - before,
        counted=group.passes.count,
        seconds=seconds,
        sizes=dict(sorted(sizes.items(), reverse=True)),
    )


def is_near(counted: int, passes: int, *, least: int) -> bool:
    """Whether a count is right within a few passes, or 2 %."""
    return abs(counted - passes) <= max(least, 0.02 * passes)


@pytest.mark.parametrize("file", FILES)
async def test_sixteen_questions_share_their_passes(service: EmbeddedService, file: Path) -> None:
    """Sixteen answers of 80 tokens take an eighth of their tokens in passes, and four more at most.

    One at a time they would take as many passes as tokens. The report says how many it were, within 2 passes or 2 %.
    """
    figures = await answer_all(service, file)
    print(f"\n{file.stem}: {figures}")  # noqa: T201 - the figures are the result
    assert figures.passes <= figures.tokens / SLOTS + 4, figures
    assert is_near(figures.counted, figures.passes, least=2), figures


async def test_sixteen_questions_are_counted_right_by_a_busy_service(service: EmbeddedService) -> None:
    """A service that has much else to do reads tokens late, and still counts the passes within 3, or 2 %."""
    with busy_loop():
        figures = await answer_all(service, OURS)
    print(f"\n{OURS.stem}, disturbed: {figures}")  # noqa: T201 - the figures are the result
    assert figures.passes <= figures.tokens / SLOTS + 4, figures
    assert is_near(figures.counted, figures.passes, least=3), figures


@contextmanager
def busy_loop(*, every_s: float = 0.015, for_s: float = 0.010) -> Iterator[None]:
    """Blocks the event loop again and again, as other work in the service would."""
    loop = asyncio.get_running_loop()
    never = threading.Event()
    handle: asyncio.TimerHandle | None = None

    def block() -> None:
        nonlocal handle
        _ = never.wait(for_s)
        handle = loop.call_later(every_s - for_s, block)

    block()
    try:
        yield
    finally:
        if handle is not None:
            handle.cancel()
