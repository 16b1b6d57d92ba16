"""`unisono bench`: the workloads through Unisono and as a client does it by itself; or what each model gains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc.aio
import httpx
from rich.status import Status

from unisono._generated.unisono.v1 import batch_inference_pb2_grpc
from unisono.bench.backend import OLLAMA, Backend, BenchError, look, warm
from unisono.bench.counters import Counters, find_counters
from unisono.bench.measure import Measured, Measurement, Plan, as_json, why_left_out
from unisono.bench.models import SIZES, GainMeasurement, ModelFigures
from unisono.bench.plot import draw_plot
from unisono.bench.service import ServiceProcess, service_process
from unisono.bench.sides import Side, direct_sides
from unisono.bench.table import draw_table
from unisono.bench.through import ONE_ITEM_RPCS, ThroughUnisono, channel_to
from unisono.bench.workloads import Workload, find
from unisono.core.errors import UnisonoError
from unisono.edge.cli.errors import ExitCode, StopError, stop_for_call
from unisono.edge.cli.gain import draw_models, models_as_json
from unisono.edge.cli.ports import StartEngine
from unisono.edge.cli.terminal import Terminal, is_animated, paint, printable

EMBEDDED = "embedded"
_ENGINE = "the embedded engine"
# What takes longer shows how far it is.
_QUIET_S = 2.0
# Off a terminal, a line at most so often.
_LINE_EVERY_S = 20.0
# Where neither the backend nor the user says how many slots there are, and Unisono has not learned it.
_ASSUMED_SLOTS = 4
_LEARN_ITEMS = 24
_USUAL = ("W1", "W2", "W3-4", "W4-24", "W8")
_USUAL_OF_OLLAMA = ("W1", "W2", "W3-4", "W4-24", "W5", "W8")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `unisono bench` was asked for."""

    # "embedded", or the address of an Ollama or a llama.cpp server.
    backend: str = EMBEDDED
    # What the backend is called in table and picture; "": what it is.
    backend_name: str = ""
    # Names of workloads; empty: the usual ones.
    workloads: tuple[str, ...] = ()
    # Without workloads: the models whose gain is measured. With them: those that they use.
    models: tuple[str, ...] = ()
    runs: int = 3
    # Slots of the backend, where it does not tell.
    slots: int | None = None
    # Sizes of batches, for models.
    sizes: tuple[int, ...] = SIZES
    num_predict: int = 48
    # Files; "-" is standard output.
    json: str | None = None
    plot: str | None = None
    # The rpc through which independent callers send their one request: a name of ONE_ITEM_RPCS.
    rpc: str = "Infer"
    # The page with the runner's own counters, where it is elsewhere.
    counters: str = ""
    is_quick: bool = False
    is_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What a bench is made with."""

    options: BenchOptions
    # Those to be measured; empty: models are.
    workloads: tuple[Workload, ...]
    backend: Backend
    service: ServiceProcess
    terminal: Terminal
    ticker: Ticker


async def bench(options: BenchOptions, start_engine: StartEngine, terminal: Terminal) -> int:
    """Measures, and shows what was found; raises StopError where nothing can be measured."""
    if options.plot and options.models and not options.workloads:
        raise StopError("--plot draws workloads; name some with --workload.", code=ExitCode.USAGE)
    try:
        # Before anything is started, so that a slip of the pen costs nothing.
        workloads = find(options.workloads) if options.workloads else ()
    except ValueError as error:
        raise StopError(str(error), code=ExitCode.USAGE) from None
    with Ticker(terminal) as ticker, _ended_by(signal.SIGTERM) as is_ended:
        try:
            async with _backend(options, start_engine, ticker) as backend:
                measures_models = bool(options.models) and not workloads
                wanted = () if measures_models else _applicable(workloads, backend)
                async with service_process(backend) as service:
                    what = _Bench(
                        options=options,
                        workloads=wanted,
                        backend=backend,
                        service=service,
                        terminal=terminal,
                        ticker=ticker,
                    )
                    return await (_bench_models(what) if measures_models else _bench_workloads(what))
        except asyncio.CancelledError:
            if is_ended():
                terminal.say("unisono: terminated")
                return 128 + signal.SIGTERM
            raise
        except BenchError as error:
            raise StopError(*printable(str(error)).split("\n"), code=ExitCode.UNREACHABLE) from error
        except httpx.HTTPError as error:
            text = f"The backend stopped answering: {type(error).__name__} {error}"
            raise StopError(text, code=ExitCode.UNREACHABLE) from error


@contextlib.contextmanager
def _ended_by(number: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Meanwhile, a signal cancels this task, so that what was started is ended too; tells whether it came."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    came: list[signal.Signals] = []

    def stop() -> None:
        came.append(number)
        if task is not None:
            task.cancel()

    loop.add_signal_handler(number, stop)
    try:
        yield lambda: bool(came)
    finally:
        loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def _backend(options: BenchOptions, start_engine: StartEngine, ticker: Ticker) -> AsyncGenerator[Backend, None]:
    """The backend that was asked for, started if it is the embedded one."""
    if options.backend != EMBEDDED:
        token = os.environ.get("UNISONO_BACKEND_TOKEN", "").strip()
        yield await look(options.backend, token=token, slots=options.slots, models=options.models)
        return
    try:
        async with start_engine(slots=options.slots, on_progress=ticker.say) as engine:
            yield await look(engine.url, token=engine.token, models=options.models)
    except UnisonoError as error:
        text = f"The embedded engine could not be started: {printable(error.message)} ({error.reason})"
        raise StopError(text, code=ExitCode.UNREACHABLE) from error


# -- Workloads -------------------------------------------------------------------------------------------------


def _applicable(workloads: tuple[Workload, ...], backend: Backend) -> tuple[Workload, ...]:
    """Those that are wanted, or else the usual ones; raises StopError where none of them applies to the backend."""
    wanted = workloads or find(_USUAL_OF_OLLAMA if backend.kind == OLLAMA else _USUAL)
    reasons = [why_left_out(workload, backend) for workload in wanted]
    if all(reasons):
        raise StopError(*reasons, "Nothing was measured.", code=ExitCode.USAGE)
    return wanted


async def _bench_workloads(what: _Bench) -> int:
    options, backend, ticker = what.options, what.backend, what.ticker
    slots, notes = backend.slots, []
    if slots is None:
        slots = await _learn_slots(what.service, backend, ticker)
        if slots is None:
            slots = _assumed_slots(os.environ.get("OLLAMA_NUM_PARALLEL", ""))
            notes.append(f"how many slots it has is not known, {slots} were assumed: --slots says it")
    # A runner has counters once there is one.
    await warm(backend, backend.models[0])
    counters = await find_counters(backend, options.counters)
    plan = Plan(
        workloads=what.workloads,
        runs=options.runs,
        slots=slots,
        is_quick=options.is_quick,
        is_full=options.is_full,
    )
    rivals, missing = direct_sides(backend, slots=slots, streams=not counters.knows_passes)
    ours = ThroughUnisono(
        what.service.target, backend, memory=what.service.memory, ask_one=ONE_ITEM_RPCS[options.rpc]
    )
    sides: list[Side] = [*rivals, ours]
    measurement = Measurement(plan, backend, sides, counters, on_progress=ticker.say)
    try:
        await measurement.run()
    finally:
        ticker.stop()
        measured = measurement.found()
        measured.notes[:0] = [*_stopped(measurement, what.terminal), *notes, *missing]
        if measurement.finished:
            _show(options, measured, _facts(options, backend, plan, counters), what.terminal)
    has_lost = any(sample.lost for sample in measured.samples if sample.side == ours.name)
    if not (has_lost or measured.rows):
        # Whatever was measured says nothing, as the notes do.
        return ExitCode.USAGE
    return ExitCode.ITEMS_FAILED if has_lost else ExitCode.DONE


def _stopped(measurement: Measurement | GainMeasurement, terminal: Terminal) -> list[str]:
    """Says how much was measured, where that is not all."""
    finished, wanted = measurement.finished, measurement.wanted
    if finished == wanted:
        return []
    note = f"stopped after {finished:,} of {wanted:,} measurements" if finished else "stopped before any measurement"
    terminal.say(f"unisono: {note}")
    return [note]


def _assumed_slots(parallel: str) -> int:
    """What the environment sets for an Ollama, if that is a number; 0 leaves it to Ollama."""
    return int(parallel) if parallel.isascii() and parallel.isdigit() and int(parallel) else _ASSUMED_SLOTS


async def _learn_slots(service: ServiceProcess, backend: Backend, ticker: Ticker) -> int | None:
    """The slots that the service learns from a batch whose items have to wait; None where it does not."""
    ticker.say("how many slots are there?")
    async with channel_to(service.target) as channel:
        stub = batch_inference_pb2_grpc.BatchInferenceStub(channel)
        try:
            measurement = GainMeasurement(
                stub, backend.models[:1], runs=1, sizes=(_LEARN_ITEMS,), num_predict=16, on_progress=ticker.say
            )
            await measurement.run()
        except grpc.aio.AioRpcError as error:
            raise stop_for_call(error, service.target) from error
    (figures,) = measurement.found()
    if figures.error:
        raise BenchError(f"{figures.model} does not answer: {figures.error}")
    return figures.slots


def _named(backend: Backend) -> str:
    return f"{backend.kind} {backend.version}".strip()


def _facts(options: BenchOptions, backend: Backend, plan: Plan, counters: Counters) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "httpx": httpx.__version__,
        "backend": options.backend_name or (_ENGINE if options.backend == EMBEDDED else _named(backend)),
        "model": backend.models[0],
        "slots": plan.slots,
        "runs": plan.runs,
        "passes:": counters.source,
        "size": "quick" if plan.is_quick else "full" if plan.is_full else "",
    }


def _show(options: BenchOptions, measured: Measured, facts: dict[str, object], terminal: Terminal) -> None:
    if options.plot:
        subtitle = ", ".join(f"{facts[name]} {name}" for name in ("cores", "slots", "runs"))
        title = "Unisono beside a client by itself"
        _write(options.plot, draw_plot(measured.rows, title, f"{facts['backend']}, {facts['model']}; {subtitle}"))
    if options.json:
        _write(options.json, json.dumps({"facts": facts} | as_json(measured), indent=1) + "\n")
    if "-" not in (options.json, options.plot):
        paint(terminal.out, draw_table(measured, facts))


def _write(path: str, text: str) -> None:
    try:
        if path == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StopError(f"{path} cannot be written: {error.strerror}", code=ExitCode.USAGE) from error


# -- Models ----------------------------------------------------------------------------------------------------


async def _bench_models(what: _Bench) -> int:
    options, ticker = what.options, what.ticker
    async with channel_to(what.service.target) as channel:
        measurement = GainMeasurement(
            batch_inference_pb2_grpc.BatchInferenceStub(channel),
            options.models,
            runs=options.runs,
            sizes=options.sizes,
            num_predict=options.num_predict,
            on_progress=ticker.say,
        )
        try:
            await measurement.run()
        except grpc.aio.AioRpcError as error:
            raise stop_for_call(error, what.service.target) from error
        finally:
            ticker.stop()
            notes = _stopped(measurement, what.terminal)
            found = measurement.found()
            if found:
                _show_models(options, found, notes, what.terminal)
    return ExitCode.ITEMS_FAILED if any(each.error for each in found) else ExitCode.DONE


def _show_models(options: BenchOptions, found: list[ModelFigures], notes: list[str], terminal: Terminal) -> None:
    if options.json:
        machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "runs": options.runs}
        figures = {"facts": machine} | models_as_json(found) | ({"notes": notes} if notes else {})
        _write(options.json, json.dumps(figures, indent=1) + "\n")
    if options.json != "-":
        lines = draw_models(found, is_ollama=options.backend != EMBEDDED)
        paint(terminal.out, [*lines, *(f"  note: {note}" for note in notes)])


# -- Progress --------------------------------------------------------------------------------------------------


class Ticker:
    """Says what is being done, on standard error: a moving line on a terminal, elsewhere a line now and then."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._began = self._told_at = time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """This is being done now."""
        now = time.monotonic()
        line = printable(text, one_line=True)
        if is_animated(self._terminal.err):
            if self._status is not None:
                self._status.update(line)
            elif now - self._began >= _QUIET_S:
                self._status = self._terminal.err.status(line)
                self._status.start()
        elif now - self._told_at >= _LINE_EVERY_S:
            self._told_at = now
            self._terminal.say(f"unisono: {line}")

    def stop(self) -> None:
        """Takes the line away."""
        status, self._status = self._status, None
        if status is not None:
            status.stop()
