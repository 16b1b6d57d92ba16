"""The backend service of clients/python/examples for a long time, while its connection is cut again and again.

    python -m tests.bench.soak [--seconds 600] [--rate 50] [--cut-every 60] [--restart-every 0] [--json FILE]

One caller asks so many questions a second, all through the run; the example takes them to Unisono through a proxy
that cuts its connection. Stand-in, Unisono and example are processes of their own. What is held to, or the exit code
is 1:

- each question has its own answer, once, and was computed once (at least once with `--restart-every`, which kills
  Unisono);
- memory is flat, for the example and for Unisono: of what follows the first fifth of the run (at most two minutes),
  the last quarter's mean is less than `MAX_GROWTH` above the first quarter's, and no sample is `MAX_PEAK` above it;
  where that is at least four minutes, it grows by less than `MAX_SLOPE`;
- at the end the example is told to stop (SIGTERM) while questions are open: it answers them, and ends with 0.

For memory to be flat within minutes, batches are small, and Unisono forgets ended ones after ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench.work import stand_in
from tests.clients.proxy import Proxy
from tests.clients.served import service_process
from tests.fakes.scraped import Scraped

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "clients" / "python" / "examples" / "backend_service.py"
MIB = 1024 * 1024
# What resident memory may grow by over the run, and how much higher than in the beginning it may ever be; bytes.
MAX_GROWTH = 4 * MIB
MAX_PEAK = 8 * MIB
# Bytes a minute, by least squares; and the minutes in which that can be told from chance.
MAX_SLOPE = MIB // 4
LEAST_MINUTES = 4.0
# Of the run, what is left out in the beginning: caches, arenas and tables fill.
WARM_SHARE, MAX_WARM_S = 0.2, 120.0
ITEMS_PER_BATCH = 1_000
SETTINGS = {"keep_ended": "10s", "max_items": str(ITEMS_PER_BATCH)}
# The stand-in: a pass takes so long, so an answer of five tokens some 25 ms.
COSTS = {"pass_s": 0.005}
# After the last question, all must be answered within this time.
LAST_ANSWERS_S = 30.0
SAMPLE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident memory at a moment of the run, in bytes."""

    at_s: float
    example: int
    service: int


@dataclass(slots=True)
class Figures:
    """What was found."""

    seconds: float = 0.0
    asked: int = 0
    answered: int = 0
    # Answers that were wrong or came twice, and questions without one.
    wrong: list[str] = field(default_factory=list)
    missing: int = 0
    # Items that Unisono completed; more than were asked: some were computed twice.
    computed: int = 0
    batches: int = 0
    cuts: int = 0
    restarts: int = 0
    connections: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    # Processor time, in seconds.
    example_cpu_s: float = 0.0
    service_cpu_s: float = 0.0
    drained: int = 0
    exit_code: int | None = None


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """Processor time that a process took so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Example:
    """The backend service, as a process."""

    process: asyncio.subprocess.Process
    host: str
    port: int
    log: list[str]


@contextlib.asynccontextmanager
async def example_at(target: str, *arguments: str) -> AsyncGenerator[Example, None]:
    """The example, which uses the service at `target`."""
    path = os.pathsep.join([str(ROOT / "clients" / "python" / "src"), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLE), "--listen", "127.0.0.1:0", "--target", target),
        *arguments,
        env=os.environ | {"PYTHONPATH": path},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    log: list[str] = []
    assert process.stderr is not None
    try:
        async for line in process.stderr:
            log.append(line.decode(errors="replace").rstrip())
            if found := re.search(r"listening on (\S+):(\d+)$", log[-1]):
                break
        else:
            raise AssertionError("the example did not start:\n" + "\n".join(log))

        reading = asyncio.create_task(_read_on(process.stderr, log))
        yield Example(process, found[1], int(found[2]), log)
        # It was told to end. To be killed just when it ends would take its exit code from asyncio.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_ANSWERS_S):
                await reading
                _ = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            _ = await process.wait()


async def _read_on(stderr: asyncio.StreamReader, log: list[str]) -> None:
    async for line in stderr:
        log.append(line.decode(errors="replace").rstrip())  # noqa: PERF401 - told as it comes


class Unisono:
    """The service, as a process that may be killed and started anew."""

    def __init__(self, url: str, metrics_port: int) -> None:
        self._url = url
        self._metrics_port = metrics_port
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._completed = 0
        self.restarts = 0

    def start(self) -> str:
        """Starts it; where it listens."""
        settings = SETTINGS | {"metrics_listen": f"127.0.0.1:{self._metrics_port}"}
        target, self._process = self._stack.enter_context(service_process(self._url, settings=settings))
        return target

    def stop(self) -> None:
        """Ends it."""
        self._process = None
        self._stack.close()

    async def restart(self) -> str:
        """Kills it, and starts its successor; where that listens."""
        self._completed = self.completed()
        if self._process is not None:
            self._process.kill()
        await asyncio.to_thread(self.stop)
        self.restarts += 1
        return await asyncio.to_thread(self.start)

    @property
    def pid(self) -> int | None:
        """Its process; None while there is none."""
        return None if self._process is None else self._process.pid

    def completed(self) -> int:
        """Items that it completed so far, by its own count; of those before it, as far as they could be asked."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as response:
            scraped = Scraped(response.read().decode())
        return self._completed + round(scraped.value("unisono_items_total", state="completed"))


class Caller:
    """Asks at a steady rate, and holds what comes back against what was asked."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._open: dict[int, float] = {}
        self._seen: set[int] = set()
        self._answered = asyncio.Event()

    @property
    def open(self) -> int:
        """Questions without an answer."""
        return len(self._open)

    async def ask(self, writer: asyncio.StreamWriter, *, rate: float, seconds: float) -> None:
        """Asks for so long; a question that is late is asked at once, so that the rate is kept."""
        began = time.monotonic()
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            self.ask_one(writer, number)
            await writer.drain()

    def ask_one(self, writer: asyncio.StreamWriter, number: int) -> None:
        """One question, whose answer is its number."""
        self._open[number] = time.monotonic()
        self._figures.asked += 1
        writer.write(json.dumps({"id": number, "prompt": f"[[say=answer {number}]]"}).encode() + b"\n")

    async def until_open_at_most(self, count: int) -> None:
        """Returns when no more than so many questions are without an answer."""
        while len(self._open) > count:
            self._answered.clear()
            _ = await self._answered.wait()

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Reads answers until the connection ends."""
        async for line in reader:
            told = json.loads(line)
            number = told["id"]
            asked_at = self._open.pop(number, None)
            if number in self._seen:
                self._figures.wrong.append(f"{number} was answered twice")
            elif asked_at is None or told.get("answer") != f"answer {number}":
                self._figures.wrong.append(f"{number}: {line.decode().strip()[:200]}")
            else:
                self._figures.answered += 1
                self._figures.latencies_ms.append(1e3 * (time.monotonic() - asked_at))
            self._seen.add(number)
            self._answered.set()


async def every(seconds: float, what: Callable[[], Awaitable[object]], is_over: asyncio.Event) -> None:
    """Does something so many seconds after it was done before, until all is over; 0: never."""
    while seconds and not is_over.is_set():
        try:
            async with asyncio.timeout(seconds):
                _ = await is_over.wait()
        except TimeoutError:
            _ = await what()


async def scattered(seconds: float, what: Callable[[], object], chance: random.Random) -> None:
    """Does something in the second half of every so many seconds; 0: never."""
    began, turn = time.monotonic(), 0
    while seconds:
        await asyncio.sleep(max(0.0, began + (turn + chance.uniform(0.5, 1.0)) * seconds - time.monotonic()))
        _ = what()
        turn += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How long, how fast, and what goes wrong meanwhile."""

    seconds: float = 600.0
    rate: float = 50.0
    # Seconds; 0: never.
    cut_every: float = 60.0
    restart_every: float = 0.0
    # Questions that are open when the example is told to stop.
    at_the_end: int = 200


async def soak(run: Run, say: Callable[[str], None]) -> Figures:
    """Runs, and finds what there is to find."""
    figures = Figures()
    chance = random.Random(5)
    async with contextlib.AsyncExitStack() as stack:
        url = stack.enter_context(stand_in(**COSTS))
        unisono = Unisono(url, metrics_port=random.randrange(20_000, 30_000))
        _ = stack.callback(unisono.stop)
        proxy = await stack.enter_async_context(Proxy(unisono.start()))
        example = await stack.enter_async_context(example_at(proxy.target, "--items-per-batch", str(ITEMS_PER_BATCH)))
        reader, writer = await asyncio.open_connection(example.host, example.port)
        caller = Caller(figures)
        listening = asyncio.create_task(caller.listen(reader))
        began, is_over = time.monotonic(), asyncio.Event()

        def cut() -> None:
            proxy.is_reset = chance.random() < 0.5
            proxy.cut()

        async def restart() -> None:
            proxy.move_to(await unisono.restart())

        async def sample() -> None:
            if unisono.pid is None:
                return
            now = Sample(time.monotonic() - began, resident(example.process.pid), resident(unisono.pid))
            figures.samples.append(now)
            if len(figures.samples) % 10 == 0:
                so_far = f"{figures.asked:6,} asked  {figures.answered:6,} answered  {proxy.cuts:2} cuts"
                sizes = f"example {now.example / MIB:5.1f} MiB  Unisono {now.service / MIB:5.1f} MiB"
                say(f"{now.at_s:5.0f} s  {so_far}  {sizes}")

        async with asyncio.TaskGroup() as tasks:
            _ = tasks.create_task(every(SAMPLE_EVERY_S, sample, is_over))
            _ = tasks.create_task(every(run.restart_every, restart, is_over))
            cutting = tasks.create_task(scattered(run.cut_every, cut, chance))
            await caller.ask(writer, rate=run.rate, seconds=run.seconds)
            figures.seconds = time.monotonic() - began
            is_over.set()
            _ = cutting.cancel()
        # The end: told to stop while questions are open, it answers what it has taken.
        for number in range(figures.asked, figures.asked + run.at_the_end):
            caller.ask_one(writer, number)
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_ANSWERS_S):
                await caller.until_open_at_most(run.at_the_end // 2)
        figures.drained = caller.open
        figures.example_cpu_s, figures.service_cpu_s = cpu_s(example.process.pid), cpu_s(unisono.pid or 0)
        example.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_ANSWERS_S):
                await listening
                figures.exit_code = await example.process.wait()
        figures.missing = caller.open
        figures.computed = unisono.completed()
        figures.cuts, figures.connections, figures.restarts = proxy.cuts, proxy.connections, unisono.restarts
        figures.batches = sum(" answered, " in line for line in example.log)
        writer.close()
    return figures


# -- What it comes to --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """How a process's memory went after the beginning; bytes, but for the slope."""

    first: float
    last: float
    peak: int
    # Bytes a minute, by least squares; and over how many minutes.
    slope: float
    minutes: float

    @property
    def is_flat(self) -> bool:
        """Whether it is as was promised."""
        is_level = self.minutes < LEAST_MINUTES or self.slope < MAX_SLOPE
        return is_level and self.last - self.first < MAX_GROWTH and self.peak - self.first < MAX_PEAK


def memory(samples: Sequence[Sample], of: Callable[[Sample], int], seconds: float) -> Memory:
    """The memory of a process, without the beginning of a run of so many seconds."""
    warm_s = min(MAX_WARM_S, WARM_SHARE * seconds)
    kept = [(sample.at_s, of(sample)) for sample in samples if sample.at_s >= warm_s]
    sizes = [size for _, size in kept]
    quarter = max(1, len(sizes) // 4)
    slope = statistics.linear_regression([at_s / 60 for at_s, _ in kept], sizes).slope
    return Memory(
        statistics.fmean(sizes[:quarter]),
        statistics.fmean(sizes[-quarter:]),
        max(sizes),
        slope,
        minutes=(kept[-1][0] - kept[0][0]) / 60,
    )


def broken(figures: Figures, run: Run) -> list[str]:
    """The promises that were not kept, in words."""
    found: list[str] = []
    if figures.wrong:
        found.append(f"{len(figures.wrong)} answers were wrong: {'; '.join(figures.wrong[:3])}")
    if figures.missing or figures.answered != figures.asked:
        found.append(f"of {figures.asked:,} questions, {figures.missing:,} have no answer")
    if not figures.restarts and figures.computed != figures.asked:
        found.append(f"{figures.computed:,} items were computed for {figures.asked:,} questions")
    if figures.exit_code != 0:
        found.append(f"the example ended with {figures.exit_code}, not with 0")
    if run.cut_every and figures.cuts < int(run.seconds / run.cut_every):
        found.append(f"the connection was cut {figures.cuts} times only")
    for name, of in OF.items():
        # A service that was started anew has another memory.
        if not (figures.restarts and name == "Unisono") and not memory(figures.samples, of, run.seconds).is_flat:
            found.append(f"the memory of {name} is not flat")
    return found


OF: dict[str, Callable[[Sample], int]] = {
    "the example": lambda sample: sample.example,
    "Unisono": lambda sample: sample.service,
}


def table(figures: Figures, run: Run) -> list[str]:
    """The figures, a line each."""
    times = sorted(figures.latencies_ms)
    cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [0.0] * 99
    rows = [
        ("time", f"{figures.seconds:.0f} s at {run.rate:g} questions a second"),
        ("asked, answered once", f"{figures.asked:,}, {figures.answered:,}"),
        ("wrong or twice, missing", f"{len(figures.wrong)}, {figures.missing}"),
        ("computed", f"{figures.computed:,}"),
        ("cuts, connections", f"{figures.cuts}, {figures.connections}"),
        ("restarts of Unisono", f"{figures.restarts}"),
        ("batches", f"{figures.batches}"),
        ("answer after, ms", f"median {cuts[49]:.0f}, 99 % {cuts[98]:.0f}, longest {times[-1] if times else 0:.0f}"),
        ("open at SIGTERM, exit", f"{figures.drained}, {figures.exit_code}"),
        ("processor", f"example {figures.example_cpu_s:.0f} s, Unisono {figures.service_cpu_s:.0f} s"),
    ]
    for name, of in OF.items():
        found = memory(figures.samples, of, run.seconds)
        words = f"{found.first / MIB:.1f} → {found.last / MIB:.1f} MiB, highest {found.peak / MIB:.1f}"
        rows.append((f"memory of {name}", f"{words}, {found.slope / MIB:+.2f} MiB a minute"))
    return [f"{name:24}{text}" for name, text in rows]


def main() -> None:
    """Runs, and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long it runs (default 600)")
    parser.add_argument("--rate", type=float, default=50.0, help="questions a second (default 50)")
    parser.add_argument("--cut-every", type=float, default=60.0, help="seconds between cuts; 0: none (default 60)")
    parser.add_argument(
        "--restart-every", type=float, default=0.0, help="kills Unisono that often (default 0: never)"
    )
    parser.add_argument("--json", type=Path, help="a file for all figures")
    given = parser.parse_args()
    run = Run(seconds=given.seconds, rate=given.rate, cut_every=given.cut_every, restart_every=given.restart_every)
    figures = asyncio.run(soak(run, lambda line: print(line, flush=True)))
    print("\n".join(["", *table(figures, run)]))
    if given.json:
        _ = given.json.write_text(json.dumps(asdict(figures)))
    found = broken(figures, run)
    print("\n".join(["", *(f"BROKEN: {each}" for each in found)]) if found else "\nAll promises were kept.")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
