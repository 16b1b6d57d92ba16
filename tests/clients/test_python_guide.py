"""What the guide for backend services says is so: its snippets run, its figures and names are the code's."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path

from tests.bench import soak
from tests.clients.served import served
from unisono.app.batches import BatchesSettings
from unisono.app.follow import HEARTBEAT_S
from unisono.config import Settings
from unisono.core import errors
from unisono_client import patience, rolling, transport
from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client._generated.unisono.v1 import server_pb2

ROOT = Path(__file__).resolve().parents[2]
WHOLE = (ROOT / "clients" / "README.md").read_text()
GUIDE = (
    "## A service that holds a stream open"
    + WHOLE.partition("\n## A service that holds a stream open")[2].partition("\n## ")[0]
)


def blocks(language: str) -> list[str]:
    """The guide's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


async def test_the_snippet() -> None:
    """As it stands, it answers what is in the queue, and ends when it is told that there is no more."""
    (snippet,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)  # that it runs is the point
    answer = names["answer"]
    assert callable(answer)
    jobs: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue(4)
    done: dict[str, str] = {}
    with served() as target:
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            _ = tasks.create_task(answer(jobs, done.__setitem__, target))
            for n in range(20):
                await jobs.put((f"job-{n}", f"[[say=answer {n}]]"))
            await jobs.put(None)
    assert done == {f"job-{n}": f"answer {n}" for n in range(20)}


async def test_the_command() -> None:
    """As it stands, but for the ports, it starts the example, which answers."""
    (command,) = blocks("sh")
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    assert (ROOT / script) == soak.EXAMPLE
    assert arguments[::2] == ["--listen", "--target"]
    assert arguments[3] == Settings.model_fields["listen"].default
    with served() as target:
        async with soak.example_at(target) as here, asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(here.host, here.port)
            writer.write(b'{"id": 1, "prompt": "[[say=yes]]"}\n')
            assert await reader.readline() == b'{"id": 1, "answer": "yes"}\n'
            writer.close()
            await writer.wait_closed()
            here.process.terminate()
            assert await here.process.wait() == 0


def test_its_figures() -> None:
    """Times and limits are those of the code."""
    fields = Settings.model_fields
    assert f"says so every {HEARTBEAT_S:g} s. After {patience.SILENT_S:g} s without a word" in GUIDE
    assert f"(every {dict(transport._OPTIONS)['grpc.keepalive_time_ms'] / 1000:g} s)" in GUIDE
    assert f"from {patience._FIRST_S * 1000:g} ms up to {patience._LONGEST_S:g} s" in GUIDE
    most = fields["max_items"].default
    assert f"A batch takes {most:,} items" in GUIDE
    assert f"at 50 a second it is full after {most / 50 / 60:.0f} minutes" in GUIDE
    assert rolling.BATCH_AGE_S == 3600
    assert f"after {rolling.ITEMS_PER_BATCH:,} items, or an hour" in GUIDE
    assert f"(`UNISONO_MAX_JOURNAL_BYTES`, {fields['max_journal_bytes'].default // 2**20} MiB)" in GUIDE
    assert f"for {fields['keep_ended'].default / 60:g} minutes (`UNISONO_KEEP_ENDED`)" in GUIDE
    assert f"at most {BatchesSettings().max_ended_bytes // 2**20} MiB together" in GUIDE
    run = soak.Run()
    assert (run.seconds, run.rate, run.cut_every) == (600, 50, 60)
    assert "ten minutes at 50 questions a second, the connection cut every minute" in GUIDE
    assert f"less than {soak.MAX_SLOPE / soak.MIB:g} MiB a minute" in GUIDE
    assert "tests.bench.soak" in (ROOT / "Makefile").read_text()


def test_its_names() -> None:
    """Settings, reasons, fields and files that it names are there."""
    known = {f"UNISONO_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"UNISONO_[A-Z_]+", GUIDE)) <= known
    reasons = {getattr(each, "reason", "") for each in vars(errors).values()}
    for reason in ("BATCH_NOT_FOUND", "SEQUENCE_OUT_OF_RANGE", "SHUTTING_DOWN", "BATCH_FULL", "INPUT_CLOSED"):
        assert f"`{reason}`" in GUIDE
        assert reason in reasons
    assert reasons >= rolling._NOT_ITS_OWN
    for name in ("on_disconnect", "detach_grace", "request_id"):
        assert f"`{name}" in GUIDE
        assert name in pb.BatchConfig.DESCRIPTOR.fields_by_name
    assert "total_items" in pb.Credit.DESCRIPTOR.fields_by_name
    assert "max_items" in server_pb2.ServerLimits.DESCRIPTOR.fields_by_name
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", WHOLE):
        assert (ROOT / "clients" / link).exists(), link
