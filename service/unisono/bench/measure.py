"""Interleaved repeats: each workload through each side in turn, and again, so that what disturbs disturbs all alike.

A *sample* is one side's figures of one phase in one run. *Rows* hold what the samples of a phase say: each side's
median and extremes, and ours ÷ the best of the others, which is looked for in each run anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from unisono.bench.backend import OLLAMA, Answer, Backend, ask, unload, warm
from unisono.bench.counters import LEAST_CONFIDENCE, Counters, Counts, count_passes, until_idle
from unisono.bench.sides import RIVALS, UNISONO, Ran, Side
from unisono.bench.workloads import CALLERS, EQUAL, Ask, Figure, Phase, Shape, Workload
from unisono.core.benchmark import Spread, ratios, spread
from unisono.core.report import fewest_passes

# Of both figures less is better, and where the best of the others has none of it, no ratio says anything.
_COUNTED = (Figure.LOST, Figure.RSS)
# Answers whose lengths differ by more between sides make their times incomparable.
_SAME_WORK = 0.02
_TOGETHER = (
    "passes are not known where tokens came several at a time, as from a model that drafts: the runner's own counter "
    "tells them, --counters"
)
_DRAFTED = "a pass gave several tokens of an answer (the model drafts), so the fewest passes are not known"
_MEGA = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    workloads: tuple[Workload, ...]
    runs: int
    slots: int
    is_quick: bool = False
    is_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One side's figures of one phase in one run."""

    workload: str
    phase: str
    side: str
    run: int
    items: int
    lost: int
    completion_tokens: int
    # By the backend's own counter, or else by the side's own count; None where there is neither.
    passes: int | None
    fewest_passes: int | None
    # Prompt tokens that were computed, and the least that could have been; None where nobody counts them.
    prompt_computed: int | None
    prompt_least: int | None
    loads: int | None
    # Some of the errors, for people.
    errors: tuple[str, ...]
    figures: Mapping[Figure, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of a phase, of all sides."""

    workload: str
    # "W4-2 cold".
    name: str
    title: str
    figure: Figure
    sides: Mapping[str, Spread]
    # Ours ÷ the best of the others, in each run; None where there is nothing to divide.
    ratio: Spread | None
    # The best of the others by the median; "" where there is none.
    best: str


@dataclass(slots=True, kw_only=True)
class Measured:
    """All that was found."""

    samples: list[Sample] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Measurement:
    """Runs a plan."""

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        sides: Sequence[Side],
        counters: Counters,
        *,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._plan = plan
        self._backend = backend
        self._sides = sides
        self._counters = counters
        self._on_progress = on_progress
        # Of each workload with prefixes, what an item computes at least where its slot holds the prefix.
        self._rests: dict[str, int | None] = {}
        why_not = {workload.name: why_left_out(workload, backend) for workload in plan.workloads}
        self._notes = dict.fromkeys(why for why in why_not.values() if why)
        self._workloads = {each.name: each for each in plan.workloads if not why_not[each.name]}
        self._samples: list[Sample] = []
        # Runs of a workload, through all its sides.
        self.finished = 0
        self.wanted = plan.runs * len(self._workloads)

    async def run(self) -> None:
        """Everything, in turn; `found` has what is finished, also where this is broken off."""
        await self._warm_up()
        async with self._counters.watching():
            for run in range(self._plan.runs):
                for workload in self._workloads.values():
                    self._samples += await self._run_workload(workload, run)
                    self.finished += 1

    def found(self) -> Measured:
        """What the finished runs say."""
        empty = {name: why_empty(workload, self._samples) for name, workload in self._workloads.items()}
        notes = [*self._notes, *filter(None, empty.values()), *_other_lengths(self._samples)]
        kept = {name: workload for name, workload in self._workloads.items() if not empty[name]}
        return Measured(samples=self._samples, rows=rows_of(self._samples, kept), notes=notes)

    async def _warm_up(self) -> None:
        """A small batch through each side, that counts for nothing."""
        shape = Shape(slots=self._plan.slots, run=998, is_quick=True)
        for side in self._sides:
            self._on_progress(f"warming up: {side.name}")
            await side.run(EQUAL.phases(shape)[0], EQUAL.sending, callers=CALLERS)

    async def _run_workload(self, workload: Workload, run: int) -> list[Sample]:
        samples: list[Sample] = []
        sides = [side for side in self._sides if side.name not in workload.without]
        # Each run begins with another side, so that none is always the first, or always behind the same one.
        for place in range(len(sides)):
            side = sides[(place + run) % len(sides)]
            shape = self._shape(run, self._sides.index(side))
            for phase in workload.phases(shape):
                name = _name(workload.name, phase.name)
                self._on_progress(f"run {run + 1} of {self._plan.runs}: {name}, {side.name}")
                await self._prepare(workload)
                if workload.name not in self._rests:
                    self._rests[workload.name] = await self._measure_rest(workload)
                before = await self._counters.read()
                ran = await side.run(phase, workload.sending, callers=CALLERS)
                await until_idle(self._backend)
                counted = (await self._counters.read()).since(before)
                samples.append(self._sample(workload, phase, ran, counted, side=side.name, run=run))
        return samples

    def _shape(self, run: int, side: int) -> Shape:
        return Shape(
            slots=self._plan.slots,
            run=run,
            side=side,
            is_quick=self._plan.is_quick,
            is_full=self._plan.is_full,
        )

    async def _prepare(self, workload: Workload) -> None:
        """The model is loaded with its default options, or not loaded, as the workload wants."""
        await until_idle(self._backend)
        if workload.is_cold:
            for model in self._backend.models[: workload.models]:
                await unload(self._backend, model)
        else:
            await warm(self._backend, self._backend.models[0])

    async def _measure_rest(self, workload: Workload) -> int | None:
        """Prompt tokens that the second of two items with one prefix computes, by the backend's counter.

        One item after the other, so that the second finds the first one's prefix. No side has these prompts.
        """
        if Figure.PROMPT not in workload.figures:
            return None
        asks = workload.phases(self._shape(999, 99))[0].asks
        family = [one for one in asks if one.family == asks[0].family][:2]
        async with self._backend.client() as client:
            await ask(client, self._backend, family[0], streams=False)
            before = await self._counters.read()
            await ask(client, self._backend, family[1], streams=False)
        return (await self._counters.read()).since(before).prompt_tokens

    def _sample(self, workload: Workload, phase: Phase, ran: Ran, counted: Counts, *, side: str, run: int) -> Sample:
        answers = {answer.name: answer for answer in ran.answers}
        good = [answer for answer in ran.answers if not answer.error]
        passes = counted.passes if counted.passes is not None else self._passes(ran, good)
        fewest = self._fewest(passes, good)
        least = None
        if (rest := self._rests.get(workload.name)) is not None:
            least = least_prompt_tokens(phase.asks, answers, rest, is_warm=phase.name == "warm")
        lost = len(ran.answers) - len(good)
        figures: dict[Figure, float] = {Figure.LOST: lost}
        # A side that lost items did less work: its other figures would flatter it.
        if not lost:
            figures[Figure.SECONDS] = ran.seconds
            figures[Figure.ITEMS_PER_S] = len(good) / ran.seconds
            figures[Figure.LATENCY] = median(answer.latency_s for answer in good)
            if passes and fewest:
                figures[Figure.PASSES] = passes / fewest
            if counted.prompt_tokens and least:
                figures[Figure.PROMPT] = counted.prompt_tokens / least
            if counted.loads is not None:
                figures[Figure.LOADS] = counted.loads
            if ran.memory_growth is not None:
                figures[Figure.RSS] = ran.memory_growth / _MEGA
        return Sample(
            workload=workload.name,
            phase=phase.name,
            side=side,
            run=run,
            items=len(ran.answers),
            lost=lost,
            completion_tokens=sum(answer.tokens for answer in good),
            passes=passes,
            fewest_passes=fewest,
            prompt_computed=counted.prompt_tokens,
            prompt_least=least,
            loads=counted.loads,
            errors=tuple(dict.fromkeys(answer.error for answer in ran.answers if answer.error))[:3],
            figures=figures,
        )

    def _passes(self, ran: Ran, good: Sequence[Answer]) -> int | None:
        """Passes by the side's own count, or else by the tokens' times; None where neither is sure enough."""
        if ran.passes is not None:
            return ran.passes
        counted = count_passes(good, slots=self._plan.slots)
        if counted is None or counted.confidence >= LEAST_CONFIDENCE:
            return None if counted is None else counted.count
        self._notes[_TOGETHER] = None
        return None

    def _fewest(self, passes: int | None, good: Sequence[Answer]) -> int | None:
        """The fewest passes that these answers can have taken; None where a pass gave several of their tokens."""
        fewest = fewest_passes([answer.tokens for answer in good], self._plan.slots)
        if passes is None or fewest is None or passes >= (1 - _SAME_WORK) * fewest:
            return fewest
        self._notes[_DRAFTED] = None
        return None


def why_left_out(workload: Workload, backend: Backend) -> str:
    """Why a workload says nothing about a backend; "" where it does."""
    left_out = f"{workload.name} ({workload.title}) was left out"
    if workload.loads and backend.kind != OLLAMA:
        return (
            f"{left_out}: it is about loading models, which an Ollama does when asked, and a llama.cpp server once, "
            "at its start"
        )
    if workload.models > max(1, backend.named):
        named = "one is" if backend.named == 1 else f"{backend.named or 'none'} are"
        return (
            f"{left_out}: it needs {workload.models} models that take each other's place, named with --model; "
            f"{named} named"
        )
    return ""


def why_empty(workload: Workload, samples: Iterable[Sample]) -> str:
    """Why what was measured of a workload says nothing; "" where it does."""
    loads = [sample.loads for sample in samples if sample.workload == workload.name]
    if workload.loads and loads and not any(each is None or each for each in loads):
        return (
            f"{workload.name} ({workload.title}) was left out: it is about loading models, and no side had to load "
            "any. The backend keeps all of them in memory; an Ollama started with OLLAMA_MAX_LOADED_MODELS=1 does not"
        )
    return ""


def _other_lengths(samples: Iterable[Sample]) -> list[str]:
    """Where sides did not do the same work, because answers ended before their length, or were lost."""
    notes: dict[str, None] = {}
    tokens: dict[tuple[str, int], dict[str, int]] = {}
    for sample in samples:
        name = _name(sample.workload, sample.phase)
        if not sample.lost:
            tokens.setdefault((name, sample.run), {})[sample.side] = sample.completion_tokens
        if sample.lost:
            notes[f"{name}, {sample.side}: {sample.lost:,} of {sample.items:,} lost ({sample.errors[0]})"] = None
    for (name, _), by_side in tokens.items():
        if max(by_side.values()) > (1 + _SAME_WORK) * min(by_side.values()):
            notes[f"{name}: the sides' answers are not equally long, so times do not compare"] = None
    return list(notes)


def least_prompt_tokens(
    asks: Sequence[Ask], answers: Mapping[str, Answer], rest: int, *, is_warm: bool
) -> int | None:
    """The fewest prompt tokens that these answers can have cost: each prefix once, and each item's own rest.

    The first item of a family costs its whole prompt, all others `rest`; with a warm prefix that is all of them. None
    where an answer is missing.
    """
    total = 0
    known: set[int | None] = set()
    for one in asks:
        answer = answers.get(one.name)
        if answer is None or answer.error:
            return None
        is_first = one.family not in known and not is_warm
        known.add(one.family)
        total += answer.prompt_tokens if is_first else rest
    return total


def _name(workload: str, phase: str) -> str:
    return f"{workload} {phase}" if phase else workload


def rows_of(samples: Sequence[Sample], workloads: Mapping[str, Workload]) -> list[Row]:
    """What the samples say, by phase and figure, in the workloads' order."""
    rows: list[Row] = []
    for workload in workloads.values():
        of_it = [sample for sample in samples if sample.workload == workload.name]
        for phase in dict.fromkeys(sample.phase for sample in of_it):
            of_phase = [sample for sample in of_it if sample.phase == phase]
            for figure in workload.figures:
                row = _row(workload, phase, figure, of_phase)
                if row is not None:
                    rows.append(row)
    return rows


def _row(workload: Workload, phase: str, figure: Figure, samples: Sequence[Sample]) -> Row | None:
    by_side: dict[str, dict[int, float]] = {}
    for sample in samples:
        if figure in sample.figures:
            by_side.setdefault(sample.side, {})[sample.run] = sample.figures[figure]
    if not by_side:
        return None
    sides = {side: spread(values.values()) for side, values in by_side.items()}
    rivals = {side: values for side, values in by_side.items() if side in RIVALS}
    is_more_better = figure is Figure.ITEMS_PER_S
    found: list[float] = []
    if figure not in _COUNTED and not is_more_better:
        found = ratios(by_side.get(UNISONO, {}), rivals.values())
    chooses = max if is_more_better else min
    best = chooses(rivals, key=lambda side: sides[side].median) if rivals else ""
    return Row(
        workload=workload.name,
        name=_name(workload.name, phase),
        title=workload.title,
        figure=figure,
        sides=sides,
        ratio=spread(found) if found else None,
        best=best,
    )


def as_json(measured: Measured) -> dict[str, object]:
    """All samples and rows, for programs."""
    return {
        "rows": [
            {
                "workload": row.name,
                "title": row.title,
                "figure": row.figure.value,
                "sides": {side: dataclasses.asdict(found) for side, found in row.sides.items()},
                "best": row.best,
                "ratio": dataclasses.asdict(row.ratio) if row.ratio else None,
            }
            for row in measured.rows
        ],
        "samples": [
            {
                name: value
                for name, value in ((f.name, getattr(sample, f.name)) for f in dataclasses.fields(sample))
                if name != "figures"
            }
            | {"figures": {figure.value: value for figure, value in sample.figures.items()}}
            for sample in measured.samples
        ],
        "notes": measured.notes,
    }
