"""How fast results go into the journal's file, and how soon they come out: `make bench-journal`.

    python -m tests.bench.journal [--items N] [--ahead N] [--folder DIR] [--json]

Items and results go through the port as the service sends them: a batch of 50,000 items is submitted, and each item's
result is appended, with never more than --ahead of them waiting for the disk. Beside that: the first page of results
while they are written and afterwards, the same from their middle, the restart, and what the process grew by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.core.batch import BadItem, BatchConfig
from unisono.core.durable import NewBatch
from unisono.core.events import BatchState, Result, Summary
from unisono.core.model import ChatRequest, Completion, Item, ItemState, Message, Options, Role, Timings, Usage
from unisono.core.report import Report

# What a page holds by default, and how often it is asked for.
PAGE = 100
LOOKS = 20
# Bytes of a question and of an answer.
QUESTION, ANSWER = 400, 800


@dataclass(frozen=True)
class Found:
    """What was measured. Times in milliseconds, sizes in MiB."""

    items: int
    submit_s: float
    results_a_second: float
    # The longest that the event loop was held while results were appended.
    longest_hold_ms: float
    page_while_writing_ms: float
    first_page_ms: float
    middle_page_ms: float
    page_of_failed_ms: float
    list_batches_ms: float
    # Who has ended, and the items that have not: what a restart reads.
    restart_ms: float
    delete_ms: float
    grown_by_submit_mib: float
    grown_by_results_mib: float
    file_mib: float


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def size_of(folder: Path) -> float:
    """MiB of all its files."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


def item(index: int) -> Item:
    """A question of a usual length."""
    request = ChatRequest(messages=(Message(role=Role.USER, content=f"{index} " + "q" * QUESTION),))
    return Item(item_id=f"item-{index}", index=index, request=request, model="m", options=Options(num_predict=64))


def result(index: int) -> Result:
    """An answer of a usual length; one in a thousand has none."""
    is_well = index % 1000 != 17
    return Result(
        item_id=f"item-{index}",
        index=index,
        state=ItemState.COMPLETED if is_well else ItemState.FAILED,
        completion=Completion(model="m", content=f"{index} " + "a" * ANSWER) if is_well else None,
        usage=Usage(prompt_tokens=100, completion_tokens=200),
        timings=Timings(queued_s=1.0, prompt_eval_s=0.1, eval_s=2.0, total_s=2.1),
        attempts=1,
        passes=200,
        group=0,
    )


async def _median_ms(look: Callable[[], Awaitable[object]], times: int = LOOKS) -> float:
    taken: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        _ = await look()
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


async def measure(folder: Path, *, items: int, ahead: int) -> Found:
    """Runs all of it in a folder that is empty."""
    journal = SqliteJournal(folder, keep_s=3600.0)
    await journal.start(time.time_ns())
    now_ns = time.time_ns()
    given: list[Item | BadItem] = [item(index) for index in range(items)]
    before = resident_mib()
    began = time.perf_counter()
    new = NewBatch(batch_id="b", config=BatchConfig(model="m"), created_ns=now_ns)
    _ = await journal.submit(new, given, is_whole=True)
    submit_s = time.perf_counter() - began
    after_submit = resident_mib()
    del given
    journal.create("b", lambda: None)

    waiting_bytes = ahead * 3_000
    pages_ms: list[float] = []
    is_written = asyncio.Event()

    async def read_meanwhile() -> None:
        while not is_written.is_set():
            began = time.perf_counter()
            _ = await journal.results("b", after=0, limit=PAGE)
            pages_ms.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.1)

    reading = asyncio.ensure_future(read_meanwhile())
    longest_s, halfway = 0.0, 0.0
    began = time.perf_counter()
    for index in range(items):
        at = time.perf_counter()
        journal.append("b", result(index), now_ns + index)
        longest_s = max(longest_s, time.perf_counter() - at)
        if index == items // 10:
            halfway = resident_mib()
        if index % 16 == 0:
            await asyncio.sleep(0)
        while journal.size_bytes("b") > waiting_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await journal.settle("b")
    took_s = time.perf_counter() - began
    after_results = resident_mib()
    is_written.set()
    await reading
    journal.append("b", Summary(state=BatchState.COMPLETED, report=Report(batch_id="b", duration_s=1.0)), now_ns)
    await journal.settle("b")
    journal.forget("b")

    first_ms = await _median_ms(lambda: journal.results("b", after=0, limit=PAGE))
    middle_ms = await _median_ms(lambda: journal.results("b", after=items // 2, limit=PAGE))
    failed_ms = await _median_ms(lambda: journal.results("b", after=0, limit=PAGE, states=[ItemState.FAILED]), 5)
    list_ms = await _median_ms(lambda: journal.page(limit=PAGE))

    async def restart() -> None:
        _ = await journal.names("b")
        _ = await journal.items("b", after=-1, limit=500)

    restart_ms = await _median_ms(restart, 3)
    size_mib = size_of(folder)
    began = time.perf_counter()
    await journal.delete("b")
    delete_ms = (time.perf_counter() - began) * 1e3
    await journal.close()
    return Found(
        items=items,
        submit_s=submit_s,
        results_a_second=items / took_s,
        longest_hold_ms=longest_s * 1e3,
        page_while_writing_ms=statistics.median(pages_ms),
        first_page_ms=first_ms,
        middle_page_ms=middle_ms,
        page_of_failed_ms=failed_ms,
        list_batches_ms=list_ms,
        restart_ms=restart_ms,
        delete_ms=delete_ms,
        grown_by_submit_mib=after_submit - before,
        grown_by_results_mib=after_results - halfway,
        file_mib=size_mib,
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.journal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--items", type=int, default=50_000, help="items of the batch (default 50,000)")
    parser.add_argument("--ahead", type=int, default=2_000, help="results that may wait for the disk (default 2,000)")
    parser.add_argument("--folder", help="where the file is made (default: the folder for temporary files)")
    parser.add_argument("--json", action="store_true", help="print a document instead of a table")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="unisono-journal-", dir=given.folder))
    try:
        found = asyncio.run(measure(folder, items=given.items, ahead=given.ahead))
    finally:
        shutil.rmtree(folder)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "folder": str(folder.parent)}
    if given.json:
        print(json.dumps({"machine": machine, **asdict(found)}, indent=2))
        return
    print(f"{machine['cores']} cores, Python {machine['python']}, file in {machine['folder']}")
    for name, value in asdict(found).items():
        print(f"{name.replace('_', ' '):>24}  {value:,.1f}")


if __name__ == "__main__":
    main()
