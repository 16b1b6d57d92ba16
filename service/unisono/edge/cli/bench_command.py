"""The command `unisono bench`: what may be written after it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from unisono.bench.models import SIZES
from unisono.edge.cli.bench import EMBEDDED, BenchOptions, bench
from unisono.edge.cli.options import Finish
from unisono.edge.cli.ports import StartEngine

_USUAL_SIZES = ",".join(map(str, SIZES))


class OneItemRpc(StrEnum):
    """How independent callers send their one request."""

    RUN_BATCH = "RunBatch"
    INFER = "Infer"


_BENCH_HELP = """Measures Unisono beside a client by itself; or, with --model alone, what each model gains.

The same work goes through a Unisono that is started for it, and directly: one
at a time, with asyncio.gather over httpx, the same behind a semaphore, and
through the ollama package; in turn, several times. Workloads:

    W1  as many equal items as slots     W2  heavy-tailed lengths
    W3  4, 16 and 64 prefix families     W4  one shared prompt, cold and warm
    W5  two values of num_ctx            W6  a burst on a model not loaded
    W7  three models, mixed              W8  32 independent callers
    W9  20,000 items in one stream

W5 to W7 need an Ollama, W7 three models (--model, three times) of which it
keeps one at a time. W3-16, W3-64, W4-2, W6, W7 and W9 run only when they are
named. On two cores all others take about ten minutes; --quick a part of that.

Examples:

    unisono bench
    unisono bench --workload W1 --workload W2 --runs 5 --plot bench.svg
    unisono bench --backend http://127.0.0.1:11434 --slots 8 --json -
    unisono bench --backend http://127.0.0.1:11434 --model llama3.2 --runs 5

Exit codes: 0 measured; 1 Unisono lost items, or a model could not be
measured; 2 wrong usage, or workloads that say nothing about this backend; 3
no backend or no service; 130 interrupted (the runs that are finished are
shown).
"""


def _sizes(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= 256 for word in words):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 to 256, such as 1,2,4,8")
    return tuple(sorted({int(word) for word in words}))


def add_bench(cli: typer.Typer, start_engine: StartEngine, finish: Finish) -> None:
    """Adds the command."""

    @cli.command("bench", help=_BENCH_HELP)
    def bench_command(
        *,
        backend: Annotated[
            str, typer.Option(metavar="embedded|URL", help="The embedded engine, an Ollama or a llama.cpp server.")
        ] = EMBEDDED,
        workload: Annotated[
            list[str] | None, typer.Option("--workload", "-w", metavar="NAME", help="One of them; may be repeated.")
        ] = None,
        model: Annotated[
            list[str] | None, typer.Option(help="A model; may be repeated. Without --workload: its gain is measured.")
        ] = None,
        runs: Annotated[int, typer.Option(min=1, max=100, help="How often each is measured.")] = 3,
        slots: Annotated[
            int | None, typer.Option(min=1, max=256, help="Slots of the backend, where it does not tell.")
        ] = None,
        items: Annotated[str, typer.Option(metavar="N,N,…", help="Sizes of batches, for models.")] = _USUAL_SIZES,
        num_predict: Annotated[int, typer.Option(min=1, help="Tokens of each answer, for models.")] = 48,
        rpc: Annotated[OneItemRpc, typer.Option(help="How W8's callers send their requests.")] = OneItemRpc.INFER,
        counters: Annotated[
            str, typer.Option(metavar="URL", help="The runner's /metrics, where it is not found by itself.")
        ] = "",
        json: Annotated[
            str | None, typer.Option(metavar="FILE", help="All figures as JSON; - is standard output.")
        ] = None,
        plot: Annotated[
            str | None, typer.Option(metavar="FILE", help="The ratios as SVG; - is standard output.")
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A tenth of the work or so, for a first look.")] = False,
        full: Annotated[bool, typer.Option("--full", help="W6 with 5,000 items.")] = False,
    ) -> None:
        options = BenchOptions(
            backend=backend,
            workloads=tuple(workload or ()),
            models=tuple(model or ()),
            runs=runs,
            slots=slots,
            sizes=_sizes(items),
            num_predict=num_predict,
            rpc=rpc.value,
            counters=counters,
            json=json,
            plot=plot,
            is_quick=quick,
            is_full=full,
        )
        finish(lambda terminal: bench(options, start_engine, terminal))
