"""From samples to rows, to a table and to a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest

from unisono.bench.backend import OLLAMA, Answer, Backend
from unisono.bench.counters import Counters, Counts, count_passes
from unisono.bench.measure import (
    Measured,
    Measurement,
    Plan,
    Sample,
    as_json,
    least_prompt_tokens,
    rows_of,
    why_empty,
)
from unisono.bench.plot import draw_plot, relative
from unisono.bench.sides import GATHER, ONE_AT_A_TIME, SEMAPHORE, UNISONO, Ran
from unisono.bench.table import draw_table, number
from unisono.bench.workloads import WORKLOADS, Ask, Figure, Phase, Sending

BY_NAME = {each.name: each for each in WORKLOADS}
MS = 1_000_000


def sample(side: str, run: int, *, workload: str = "W1", phase: str = "", lost: int = 0, **figures: float) -> Sample:
    """A side's figures: `sample(GATHER, 0, SECONDS=1.5)`."""
    return Sample(
        workload=workload,
        phase=phase,
        side=side,
        run=run,
        items=8,
        lost=lost,
        completion_tokens=80,
        passes=10,
        fewest_passes=10,
        prompt_computed=None,
        prompt_least=None,
        loads=None,
        errors=("503 busy",) if lost else (),
        figures={Figure[name]: value for name, value in figures.items()},
    )


def some() -> list[Sample]:
    """Two runs of two figures."""
    return [
        sample(ONE_AT_A_TIME, 0, SECONDS=9.0, PASSES=8.0),
        sample(ONE_AT_A_TIME, 1, SECONDS=8.0, PASSES=8.0),
        sample(GATHER, 0, SECONDS=2.0, PASSES=1.3),
        sample(GATHER, 1, SECONDS=1.0, PASSES=1.2),
        sample(SEMAPHORE, 0, SECONDS=1.5, PASSES=1.4),
        sample(SEMAPHORE, 1, SECONDS=1.6, PASSES=1.1),
        sample(UNISONO, 0, SECONDS=0.75, PASSES=1.0),
        sample(UNISONO, 1, SECONDS=1.25, PASSES=1.1),
    ]


def test_ours_is_held_against_the_best_of_each_run() -> None:
    """0.75 ÷ 1.5 in the first run, 1.25 ÷ 1.0 in the second; one at a time is no rival."""
    passes, seconds = rows_of(some(), BY_NAME)
    assert (passes.figure, seconds.figure) == (Figure.PASSES, Figure.SECONDS)
    assert seconds.ratio is not None
    assert (seconds.ratio.low, seconds.ratio.median, seconds.ratio.high) == (0.5, 0.875, 1.25)
    assert seconds.best == GATHER
    assert seconds.sides[ONE_AT_A_TIME].median == 8.5
    assert relative(seconds)[GATHER] == 1.0
    assert relative(seconds)[UNISONO] == 0.875


def test_what_cannot_be_divided_has_no_ratio() -> None:
    """Lost items are counted, and a side that lost some has no time to be held against."""
    samples = [
        sample(GATHER, 0, workload="W6", lost=187, LOST=187),
        sample(SEMAPHORE, 0, workload="W6", LOST=0, SECONDS=3.0),
        sample(UNISONO, 0, workload="W6", LOST=0, SECONDS=2.0),
    ]
    lost, seconds = rows_of(samples, BY_NAME)
    assert lost.ratio is None
    assert lost.sides[GATHER].median == 187
    assert seconds.ratio is not None
    assert seconds.ratio.median == pytest.approx(2 / 3)
    assert GATHER not in seconds.sides
    shown = "\n".join(draw_table(Measured(rows=[lost, seconds]), {}))
    assert "187" in shown


def test_phases_have_rows_of_their_own() -> None:
    """A cold and a warm batch are two things."""
    samples = [sample(UNISONO, 0, workload="W4-2", phase=phase, SECONDS=1.0) for phase in ("cold", "warm")]
    assert [row.name for row in rows_of(samples, BY_NAME)] == ["W4-2 cold", "W4-2 warm"]


def test_more_items_a_second_are_better() -> None:
    """The best other side is the one with the most."""
    samples = [
        sample(GATHER, 0, workload="W9", ITEMS_PER_S=900.0),
        sample(SEMAPHORE, 0, workload="W9", ITEMS_PER_S=1000.0),
    ]
    (row,) = rows_of(samples, BY_NAME)
    assert (row.best, row.ratio) == (SEMAPHORE, None)


def test_the_table_has_every_side_and_figure() -> None:
    """Sides are columns, figures lines, the ratio with its spread last; what was noted stands below."""
    lines = draw_table(Measured(rows=rows_of(some(), BY_NAME), notes=["W5 was left out"]), {"cores": 2, "model": ""})
    assert lines[0] == "cores 2"
    assert lines[2].split() == ["one", "at", "a", "time", "gather", "semaphore", "unisono", "÷", "best"]
    assert lines[3] == "W1: as many equal items as slots"
    assert lines[5].split() == ["time,", "s", "8.50", "1.50", "1.55", "1.00", "0.88", "(0.50–1.25)"]
    assert lines[-1] == "  note: W5 was left out"
    assert max(len(line) for line in lines) < 130


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.01234, "0.0123"), (0.5, "0.50"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_numbers_have_three_figures(value: float, text: str) -> None:
    """Those that matter."""
    assert number(value) == text


def test_the_picture_is_well_formed() -> None:
    """XML that names every side, workload and ratio, nothing of it outside the picture."""
    rows = rows_of(some(), BY_NAME)
    root = ET.fromstring(draw_plot(rows, "A & B <title>", "2 cores"))
    name = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in root.iter(f"{name}text")]
    for text in ("A & B <title>", "2 cores", UNISONO, GATHER, "W1: as many equal items as slots", "0.88×", "1/2×"):
        assert text in texts
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    marks = list(root.iter(f"{name}circle"))
    assert len(marks) == 4 + 2 * 4
    assert all(0 < float(mark.attrib["cx"]) < width and 0 < float(mark.attrib["cy"]) < height for mark in marks)


def test_a_picture_has_room_for_none_at_all() -> None:
    """Where ours needs no load, its ratio is 0, which has no logarithm."""
    samples = [sample(GATHER, 0, workload="W5", LOADS=12), sample(UNISONO, 0, workload="W5", LOADS=0)]
    root = ET.fromstring(draw_plot(rows_of(samples, BY_NAME), "loads", ""))
    assert "0.00×" in [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_of_nothing_is_well_formed_too() -> None:
    """Where no figure could be divided."""
    ET.fromstring(draw_plot([], "nothing", ""))


def test_json_has_all_figures() -> None:
    """Samples and rows, under the figures' names."""
    found = json.loads(json.dumps(as_json(Measured(samples=some(), rows=rows_of(some(), BY_NAME)))))
    assert found["rows"][1]["ratio"] == {"median": 0.875, "low": 0.5, "high": 1.25, "count": 2}
    assert found["samples"][0]["figures"] == {"time, s": 9.0, "passes ÷ fewest possible": 8.0}


def test_the_least_prompt_tokens() -> None:
    """Each prefix once, and of all other items the rest alone; of a warm batch only rests."""
    asks = [Ask(name=f"{n}", system="s", user="u", num_predict=1, family=n % 2) for n in range(5)]
    answers = {one.name: Answer(name=one.name, tokens=1, prompt_tokens=100) for one in asks}
    assert least_prompt_tokens(asks, answers, 10, is_warm=False) == 2 * 100 + 3 * 10
    assert least_prompt_tokens(asks, answers, 10, is_warm=True) == 5 * 10
    answers["3"].error = "lost"
    assert least_prompt_tokens(asks, answers, 10, is_warm=False) is None


def test_counters_tell_what_was_added() -> None:
    """Of one and the same runner; what it does not count, and what a new one counts, is not known."""
    before = Counts(passes=10, prompt_tokens=100, loads=1, page="a")
    assert Counts(passes=25, prompt_tokens=None, loads=2, page="a").since(before) == Counts(passes=15, loads=1)
    assert Counts(passes=3, loads=2, page="b").since(before) == Counts(loads=1)
    assert Counts(passes=3, page="a").since(before) == Counts()


def counted(answers: list[Answer], *, slots: int) -> tuple[int, float]:
    """The passes, and how sure that is."""
    found = count_passes(answers, slots=slots)
    assert found is not None
    return found.count, found.confidence


class Streams:
    """A side whose answers come in bursts of so many tokens, each one pass, 20 ms apart."""

    name = GATHER

    def __init__(self, together: int) -> None:
        self.together = together

    async def run(self, phase: Phase, sending: Sending, *, callers: int) -> Ran:
        """See Side."""
        answers = [Answer(name=one.name, tokens=12, prompt_tokens=9) for one in phase.asks]
        for answer in answers:
            answer.times_ns = [k // self.together * 20 * MS + k % self.together * 1000 for k in range(12)]
        return Ran(seconds=1.0, answers=answers)


async def measured(side: Streams, counters: Counters) -> Measured:
    """Equal answers, once."""
    backend = Backend(url="http://127.0.0.1:9", kind=OLLAMA, version="1", models=("m",), slots=8)
    measurement = Measurement(Plan(workloads=(BY_NAME["W1"],), runs=1, slots=8), backend, [side], counters)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("unisono.bench.measure.warm", AsyncMock())
        await measurement.run()
    return measurement.found()


async def test_passes_that_gave_several_tokens_are_not_counted_as_many() -> None:
    """Where a model drafts, the times of its tokens do not tell passes; that is said, and no figure is given."""
    found = await measured(Streams(1), Counters())
    assert found.samples[0].passes == 12
    assert Figure.PASSES in found.samples[0].figures
    assert not found.notes
    found = await measured(Streams(3), Counters())
    assert found.samples[0].passes is None
    assert Figure.PASSES not in found.samples[0].figures
    assert [note for note in found.notes if "came several at a time" in note]


class Engine(Counters):
    """A counter that a phase raises by so many passes."""

    passes = 0

    async def read(self) -> Counts:
        """The counters now."""
        self.passes += 4
        return Counts(passes=self.passes, page="here")


async def test_nobody_knows_the_fewest_passes_of_drafted_tokens() -> None:
    """Four passes gave twelve tokens of each answer: by the engine's own counter, and what is fewest is not said."""
    found = await measured(Streams(3), Engine())
    assert (found.samples[0].passes, found.samples[0].fewest_passes) == (4, None)
    assert Figure.PASSES not in found.samples[0].figures
    assert [note for note in found.notes if "the model drafts" in note]


def test_passes_can_be_counted_from_streamed_tokens() -> None:
    """Two answers side by side share theirs; without times nobody knows."""
    together = [Answer(name=f"{n}", tokens=3, times_ns=[k * 100 * MS + n * MS for k in range(3)]) for n in range(2)]
    assert counted(together, slots=8) == (3, 1.0)
    apart = [Answer(name=f"{n}", tokens=3, times_ns=[(3 * n + k) * 100 * MS for k in range(3)]) for n in range(2)]
    assert counted(apart, slots=1) == (6, 1.0)
    assert count_passes([Answer(name="a", tokens=3)], slots=1) is None


@pytest.mark.parametrize(
    ("name", "loads", "is_empty"),
    [
        ("W7", [0, 0], True),
        ("W7", [0, 3], False),
        ("W7", [0, None], False),
        ("W7", [], False),
        ("W1", [0, 0], False),
    ],
)
def test_loads_that_nobody_needed_prove_nothing(name: str, loads: list[int | None], *, is_empty: bool) -> None:
    """A backend that keeps all models in memory; where nobody counts loads, times are shown."""
    samples = [replace(sample(GATHER, run, workload=name), loads=each) for run, each in enumerate(loads)]
    assert bool(why_empty(BY_NAME[name], samples)) is is_empty
