"""For those who come from scripts: one call for a list of prompts, and one for a measurement.

    results = await batch_generate(prompts, model="llama3.2", max_concurrent=8, on_progress=print)

`unisono_client.sync` has both for code without an event loop.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unisono_client.client import DEFAULT_TARGET, Client
from unisono_client.config import BatchConfig, Options, invalid
from unisono_client.items import Generate, Item, check_items
from unisono_client.results import Report, Result
from unisono_client.run import OnProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRun:
    """All prompts, once, as one batch."""

    # From the batch's acceptance to its end, in seconds, by the service's clock.
    duration_s: float
    completed: int
    # Items without an answer.
    failed: int
    completion_tokens: int
    # Forward passes that they took, counted from outside.
    passes: int
    # How many times faster than one at a time; None where that was not measured.
    gain: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers in a second; 0 where there was none."""
        return self.completion_tokens / self.duration_s if self.duration_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBenchmark:
    """A model, measured."""

    model: str
    runs: tuple[BenchmarkRun, ...]
    # The first answer to the first prompt, and why the first item without one failed; "" where there is none.
    sample: str
    failure: str

    @property
    def duration_s(self) -> float:
        """The median of the runs, in seconds."""
        return statistics.median(run.duration_s for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """The median of the runs."""
        return statistics.median(run.tokens_per_second for run in self.runs)

    @property
    def gain(self) -> float | None:
        """The median of those runs that have one."""
        gains = [run.gain for run in self.runs if run.gain is not None]
        return statistics.median(gains) if gains else None


async def batch_generate(
    prompts: Iterable[Item],
    *,
    model: str | None = None,
    system: str | None = None,
    options: Options | None = None,
    max_concurrent: int | None = None,
    on_progress: OnProgress | None = None,
    target: str = DEFAULT_TARGET,
) -> list[Result]:
    """An answer for each prompt, in their order; a prompt that failed has a result with its error.

    `prompts` are texts, or any items; `system` is for the texts. `max_concurrent`: at most so many at the backend at
    one time; the service finds the best number itself. Raises UnreachableError, BatchLostError, RefusedError.
    """
    check_items(prompts)
    items = [item_of(each, system) for each in prompts]
    if not items:
        return []
    config = config_of(model=model, options=options, max_concurrent=max_concurrent)
    async with Client(target) as client:
        return [result async for result in client.run(items, in_order=True, on_progress=on_progress, **config)]


async def batch_benchmark(
    models: Sequence[str],
    prompts: Sequence[Item],
    *,
    num_runs: int = 3,
    options: Options | None = None,
    max_concurrent: int | None = None,
    on_progress: OnProgress | None = None,
    target: str = DEFAULT_TARGET,
) -> list[ModelBenchmark]:
    """All prompts asked of each model, `num_runs` times, each time as one batch; the models in the order given.

    The first prompt is asked once beforehand, so that no load is measured. Later runs find prompts in the backend's
    caches, as repeated work does; `unisono bench` measures with prompts that no cache has. `on_progress` counts
    answers of all models and runs. Raises ValueError where there is nothing to measure, and as `batch_generate`.
    """
    check_items(prompts)
    if isinstance(models, str):
        raise invalid("models", "is a single text; give a list of names")
    if not models or not prompts or num_runs < 1:
        raise ValueError("batch_benchmark needs a model, a prompt and a run at least")
    items = [item_of(each, None) for each in prompts]
    done, total = 0, len(models) * num_runs * len(items)
    found: list[ModelBenchmark] = []
    async with Client(target) as client:
        for model in models:
            config = config_of(model=model, options=options, max_concurrent=max_concurrent)
            async for _ in client.run(items[:1], **config):
                pass
            runs: list[BenchmarkRun] = []
            sample = failure = ""
            for _ in range(num_runs):
                run = client.run(items, in_order=True, **config)
                failed = 0
                async for result in run:
                    failed += not result.is_completed
                    sample = sample or result.content
                    failure = failure or str(result.error or "")
                    done += 1
                    if on_progress is not None:
                        on_progress(done, total)
                runs.append(_measured(run.report, len(items) - failed, failed))
            found.append(ModelBenchmark(model=model, runs=tuple(runs), sample=sample, failure=failure))
    return found


def item_of(prompt: Item, system: str | None) -> Item:
    """A text as the prompt that it is; all else stays."""
    return Generate(prompt, system=system or "") if isinstance(prompt, str) else prompt


def config_of(*, model: str | None, options: Options | None, max_concurrent: int | None) -> BatchConfig:
    """What applies to the batch, where it was given."""
    config = BatchConfig()
    if model is not None:
        config["model"] = model
    if options is not None:
        config["options"] = options
    if max_concurrent is not None:
        config["max_concurrency"] = max_concurrent
    return config


def _measured(report: Report | None, completed: int, failed: int) -> BenchmarkRun:
    """A run by the service's own report; figures that were lost on the way are 0."""
    return BenchmarkRun(
        duration_s=report.duration.total_seconds() if report else 0.0,
        completed=completed,
        failed=failed,
        completion_tokens=report.completion_tokens if report else 0,
        passes=report.passes if report else 0,
        gain=report.gain if report else None,
    )
