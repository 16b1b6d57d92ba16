"""The workloads of `unisono bench` over stand-ins in a process of their own: what needs an Ollama, without one.

    python -m tests.bench.work [--workload W5 …] [--runs N] [--json FILE] [--plot FILE.svg] [--quick]

The stand-in has the costs of a small model on a small GPU (a pass 4 ms and 0.2 ms for each sequence in it, a prompt
token 0.1 ms, a load 0.5 s, a ping 0.3 ms), so the times are those of a schedule, not of a machine; its counters are
exact. W9 runs over another one, whose passes cost nothing: what is measured there is the service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tests.fakes.ollama import FakeModel, FakeOllama
from unisono.bench.workloads import WORKLOADS, find
from unisono.edge.cli.bench import BenchOptions, bench
from unisono.edge.cli.errors import StopError
from unisono.edge.cli.terminal import Terminal

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SLOTS = 8
COSTS = {"pass_s": 0.004, "member_s": 0.0002, "prefill_token_s": 0.0001, "load_s": 0.5, "health_s": 0.0003}
MODELS = ("first", "second", "third")
FLOOD = "W9"


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    async def serve() -> None:
        models = [FakeModel(name=name) for name in MODELS]
        async with FakeOllama(models, num_parallel=SLOTS, max_loaded_models=1, **settings) as fake:
            pipe.send(fake.url)
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    with contextlib.suppress(EOFError):
        asyncio.run(serve())


@contextlib.contextmanager
def stand_in(**settings: Any) -> Iterator[str]:
    """The address of a stand-in in a process of its own, which ends with the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
    process.start()
    try:
        yield ours.recv()
        ours.send("done")
    finally:
        ours.close()
        process.join(10)


def no_engine(
    *, slots: int | None, on_progress: Callable[[str], None]
) -> contextlib.AbstractAsyncContextManager[Any]:
    """Stands for the embedded engine, which is not asked here."""
    raise NotImplementedError


def run(workloads: Sequence[str], *, is_quick: bool, **options: Any) -> int:
    """Measures workloads over a stand-in, and prints what was found."""
    names = tuple(each.name for each in find(tuple(workloads)))
    costs: dict[str, float] = {} if names == (FLOOD,) else COSTS | ({"load_s": 0.03} if is_quick else {})
    with stand_in(**costs) as url:
        # All three, in this order, so that W7 has what it needs.
        wanted = BenchOptions(
            backend=url,
            backend_name="a stand-in for Ollama",
            workloads=names,
            models=MODELS,
            slots=SLOTS,
            is_quick=is_quick,
            **options,
        )
        try:
            return asyncio.run(bench(wanted, no_engine, Terminal.standard()))
        except StopError as error:
            print("\n".join(error.lines), file=sys.stderr)
            return error.code


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.work", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", "-w", action="append", help="one of them; may be repeated (default: all)")
    parser.add_argument("--runs", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--json", help="a file for all figures")
    parser.add_argument("--plot", help="a file for the picture (SVG)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work or so")
    parser.add_argument("--full", action="store_true", help="W6 with 5,000 items")
    parser.add_argument("--rpc", choices=["RunBatch", "Infer"], default="Infer", help="what W8's callers call")
    given = parser.parse_args()
    everything = [each.name for each in WORKLOADS]
    wanted = [each.name for each in find(tuple(given.workload))] if given.workload else everything
    more = {"runs": given.runs, "is_quick": given.quick, "is_full": given.full, "rpc": given.rpc}
    code = 0
    if rest := [name for name in wanted if name != FLOOD]:
        code = run(rest, json=given.json, plot=given.plot, **more)
    if FLOOD in wanted:
        # Its files only where it is alone: the others' are not overwritten.
        files = {} if rest else {"json": given.json, "plot": given.plot}
        code = max(code, run([FLOOD], **files, **more))
    sys.exit(code)


if __name__ == "__main__":
    main()
