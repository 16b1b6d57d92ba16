"""Tuning: the guide's formula, its worked example, its table and its pictures are the product's own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.guides import ROOT, block, code_in, section, table
from tests.integration.service import house
from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono.core.memory import fits_context, kv_bytes_per_token
from unisono.core.model import ModelInfo

GUIDE = "deploy/README.md"
TUNING = section(GUIDE, "## Tuning")
FITS = table(TUNING, "Model")
GIB, STEP, SLOTS = 2**30, 256, 8
# SmolLM2-135M as a real Ollama describes it.
SMOLLM2 = FakeModel(name="smollm2:135m", embedding_length=576)


def facts(**shape: int) -> dict[str, object]:
    """A model's shape as /api/show has it."""
    return {"general.architecture": "x"} | {f"x.{name.replace('__', '.')}": value for name, value in shape.items()}


def test_the_formula_is_the_product_s() -> None:
    """The second line of the block, worked out with numbers, is what the product derives."""
    line = block(GUIDE, "memory        =").splitlines()[1].partition("= ")[2]
    shape = {"block_count": 7, "head_count_kv": 3, "key_length": 64, "value_length": 32}
    numbers: dict[str, Any] = {**shape, "bytes_a_number": 2}
    formula = line.replace("×", "*").replace("bytes a number", "bytes_a_number")
    told = facts(block_count=7, attention__head_count_kv=3, attention__key_length=64, attention__value_length=32)
    assert eval(formula, {}, numbers) == kv_bytes_per_token(told)


async def test_the_worked_example() -> None:
    """The command finds the shape in what an Ollama answers, and the shape gives the guide's figures."""
    command = block(GUIDE, "curl -s 127.0.0.1:11434/api/show")
    async with FakeOllama([SMOLLM2]) as fake:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-e", "-o", "pipefail", "-c", command.replace("127.0.0.1:11434", f"127.0.0.1:{fake.port}")),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    shape: dict[str, int] = json.loads(f"{{{','.join(out.decode().split(chr(10))).strip(',')}}}")
    found = {name.partition(".")[2]: value for name, value in shape.items()}
    assert found.keys() == {"block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"}
    width = found["embedding_length"] // found["attention.head_count"]
    a_token = kv_bytes_per_token({"general.architecture": "llama", **shape})
    assert a_token is not None
    text = (
        f"{found['block_count']} × {found['attention.head_count_kv']} × ({width} + {width}) × 2 = {a_token:,} bytes"
    )
    assert text in TUNING
    assert f"8 slots of 4,096 tokens take {8 * 4096 * a_token / 1e6:.1f} MB" in TUNING.replace("\n", " ")
    assert f"{8 * 2048 * a_token / 1e6:.1f} MB less" in TUNING


@pytest.mark.parametrize("row", FITS, ids=lambda row: row[0])
def test_what_fits_is_derived(row: list[str]) -> None:
    """Every figure of a row follows from its shape, its weights and the length that it was trained for."""
    name = code_in(row[0])[0]
    layers, heads, key, value = map(int, re.findall(r"\d+", row[1]))
    a_token = kv_bytes_per_token(
        facts(
            block_count=layers,
            attention__head_count_kv=heads,
            attention__key_length=key,
            attention__value_length=value,
        )
    )
    assert a_token is not None
    assert row[2] == f"{a_token // 1024} KiB"
    trained = 40_960 if name.startswith("qwen3") else 131_072
    model = ModelInfo(
        backend="gpu",
        name=name,
        digest=name,
        context_length=trained,
        size_bytes=round(float(row[3].removesuffix(" GB")) * 1e9),
        kv_bytes_per_token=a_token,
    )
    head = next(line for line in TUNING.splitlines() if line.startswith("| Model |"))
    for gib, cell in zip(map(int, re.findall(r"(\d+) GiB", head)), row[4:], strict=True):
        most = fits_context(model, SLOTS, gib * GIB * 9 // 10)
        assert most is not None
        assert cell == (f"{most // STEP * STEP:,}" if most >= STEP else "–"), (name, gib)


async def test_a_plan_tells_the_memory() -> None:
    """The call is one of the contract, and what is shown of its answer is in it."""
    words = shlex.split(block(GUIDE, "grpcurl"))
    assert words[-1] == "unisono.v1.BatchInference/PlanBatch"
    request = json_format.Parse(words[words.index("-d") + 1], rpc.PlanBatchRequest())
    async with house(models=[SMOLLM2], settings={"slots": SLOTS}) as h:
        answer = await h.stub.PlanBatch(request)
    told = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    shown = json.loads(block(GUIDE, "kv_cache_bytes"))
    assert shown["memory"] == told["groups"][0]["group"]["memory"]
    assert shown.keys() <= told["groups"][0]["group"].keys()


async def test_the_report_looks_like_this(tmp_path: Path) -> None:
    """What the guide shows has the lines that the program writes today for the same file, with other figures."""
    shown = block(GUIDE, "Report\n").splitlines()
    examples = (ROOT / "service" / "unisono" / "examples" / "batch.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "batch.jsonl").write_text("".join(examples[:14]))
    async with FakeOllama(
        [SMOLLM2], num_parallel=SLOTS, pass_s=0.004, member_s=0.0005, prefill_token_s=0.0002
    ) as fake:
        _ = await run(fake, tmp_path)
        written = await run(fake, tmp_path)
    assert labels(shown) == labels(written)
    assert names(shown) == names(written)
    assert shown[0].startswith(f"{SMOLLM2.name} on ollama: ")
    (legend,) = [line for line in shown if "read downwards" in line]
    assert legend in written


def test_what_is_said_of_the_report_follows_from_it() -> None:
    """Figures of the explanation are those of the picture, or are worked out from them."""
    shown = block(GUIDE, "Report\n")
    said = " ".join(TUNING.partition("moon")[2].partition("```")[2].split())

    def told(pattern: str) -> tuple[float, ...]:
        found = re.search(pattern, shown)
        assert found is not None, pattern
        return tuple(map(float, found.groups()))

    a, c = told(r"costs +a pass ([\d.]+) ms, and ([\d.]+) ms")
    assert f"a is {a:g} ms and c {c:g}, which gives {8 * (a + c) / (a + 8 * c):.2f}" in said
    assert f"here {told(r'items per pass +([0-9.]+)')[0]:g} of 8" in said
    assert f"one answer of {told(r'fewest possible +([0-9]+)')[0]:g} tokens" in said
    items, tokens, times = told(r"begin alike +(\d+) items, in about (\d+) tokens, computed (\d+) times")
    assert (items, tokens, times) == (5, 149, 3)
    assert "five items share a system prompt of about 149 tokens; three slots computed it" in said


async def run(fake: FakeOllama, folder: Path) -> list[str]:
    """What `unisono run` writes of the file in a folder."""
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).parent / "unisono", "run", "--ollama", fake.url, "batch.jsonl", "-o", "answers.jsonl"),
        cwd=folder,
        env={**os.environ, "UNISONO_STATE_DIR": "none", "UNISONO_SLOTS": str(SLOTS), "COLUMNS": "88"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, out.decode()
    return out.decode().splitlines()


def names(lines: list[str]) -> set[str]:
    """The items of a pass map."""
    return {line.partition("│")[0].strip() for line in lines if "│" in line}


def labels(lines: list[str]) -> set[str]:
    """What stands at the left of a report's lines."""
    report = lines[lines.index("Report") :]
    return {line[2:17].strip() for line in report if line.startswith("  ")} - {""}
