"""The workloads, small, over a stand-in: the whole of `unisono bench`, with a service in a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.bench.work import MODELS, no_engine, stand_in
from unisono.bench.sides import GATHER, OLLAMA_PACKAGE, ONE_AT_A_TIME, SEMAPHORE, UNISONO
from unisono.edge.cli.bench import BenchOptions, Ticker, bench
from unisono.edge.cli.terminal import Terminal

LIMIT_S = 100


@pytest.mark.slow
def test_the_workloads_over_a_stand_in(tmp_path: Path) -> None:
    """All sides answer all items; passes, prompt tokens and loads are counted; table, JSON and picture are made."""
    plot, figures = tmp_path / "bench.svg", tmp_path / "bench.json"
    names = ["-w", "W1", "-w", "W4-2", "-w", "W7", "-w", "W9"]
    files = ["--json", str(figures), "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.work", *names, *files, "--runs", "1", "--quick"],
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for text in (ONE_AT_A_TIME, GATHER, SEMAPHORE, OLLAMA_PACKAGE, UNISONO, "÷ best", "W4-2 warm", "items/s"):
        assert text in done.stdout
    found = json.loads(figures.read_text())
    assert found["facts"]["slots"] == 8
    assert not any(sample["lost"] for sample in found["samples"])
    by_name = {(row["workload"], row["figure"]): row for row in found["rows"]}
    passes = by_name["W1", "passes ÷ fewest possible"]["sides"]
    assert passes[ONE_AT_A_TIME]["median"] == 8
    assert 1 <= passes[UNISONO]["median"] < 2
    assert by_name["W4-2 cold", "prompt tokens ÷ least possible"]["sides"][ONE_AT_A_TIME]["median"] < 1.1
    assert by_name["W7", "loads"]["sides"][UNISONO]["median"] <= 3 < by_name["W7", "loads"]["sides"][GATHER]["median"]
    ET.fromstring(plot.read_text())


async def test_a_models_gain_over_a_stand_in(capsys: pytest.CaptureFixture[str]) -> None:
    """`--model` alone: what each gains at 1, 2 and 4 items, and an answer of it."""
    with stand_in(pass_s=0.002) as url:
        options = BenchOptions(backend=url, models=MODELS[:2], runs=1, sizes=(1, 2, 4), num_predict=8, json="-")
        assert await bench(options, no_engine, Terminal.standard()) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [each["model"] for each in models] == list(MODELS[:2])
    for each in models:
        assert [step["items"] for step in each["steps"]] == [1, 2, 4]
        assert each["steps"][-1]["gain"] > 1.5
        assert each["sample"]["answer"]


async def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Is said, and nothing is measured."""
    with stand_in() as url:
        options = BenchOptions(backend=url, workloads=("W1",), models=("none",), is_quick=True)
        with pytest.raises(Exception, match="no model none"):
            await bench(options, no_engine, Terminal.standard())
    assert not capsys.readouterr().out


def stop_at(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Cancels the bench of the task that runs, as a signal does, once it says this."""
    say = Ticker.say

    def listen(ticker: Ticker, text: str) -> None:
        say(ticker, text)
        if words in text:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    monkeypatch.setattr(Ticker, "say", listen)


async def test_a_bench_that_is_stopped_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The runs that are finished stand in table, JSON and picture, and that there were to be more."""
    stop_at(monkeypatch, "run 2 of 9: W4-2 cold")
    plot, figures = tmp_path / "bench.svg", tmp_path / "bench.json"
    with stand_in(pass_s=0.002, load_s=0.03) as url:
        options = BenchOptions(
            backend=url,
            workloads=("W1", "W4-2"),
            models=MODELS[:1],
            slots=4,
            runs=9,
            json=str(figures),
            plot=str(plot),
            is_quick=True,
        )
        with pytest.raises(asyncio.CancelledError):
            await bench(options, no_engine, Terminal.standard())
    found = json.loads(figures.read_text())
    assert {(one["workload"], one["run"]) for one in found["samples"]} == {("W1", 0), ("W4-2", 0), ("W1", 1)}
    assert "stopped after 3 of 18 measurements" in found["notes"]
    shown = capsys.readouterr()
    assert "W1: as many equal items as slots" in shown.out
    assert "note: stopped after 3 of 18 measurements" in shown.out
    assert "unisono: stopped after 3 of 18 measurements" in shown.err
    ET.fromstring(plot.read_text())


async def test_a_bench_that_is_stopped_before_it_has_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Is silent but for that; a file of earlier figures stays."""
    stop_at(monkeypatch, "run 1 of 3: W1, one at a time")
    figures = tmp_path / "bench.json"
    figures.write_text("earlier")
    with stand_in(pass_s=0.002) as url:
        options = BenchOptions(
            backend=url, workloads=("W1",), models=MODELS[:1], slots=4, json=str(figures), is_quick=True
        )
        with pytest.raises(asyncio.CancelledError):
            await bench(options, no_engine, Terminal.standard())
    shown = capsys.readouterr()
    assert (shown.out, figures.read_text()) == ("", "earlier")
    assert "unisono: stopped before any measurement" in shown.err


async def test_a_models_gain_that_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that were measured are told of, with as many runs as there were."""
    stop_at(monkeypatch, f"run 1 of 2: {MODELS[1]}, 1 item")
    with stand_in(pass_s=0.002) as url:
        options = BenchOptions(backend=url, models=MODELS[:2], runs=2, sizes=(1, 2), num_predict=4, json="-")
        with pytest.raises(asyncio.CancelledError):
            await bench(options, no_engine, Terminal.standard())
    found = json.loads(capsys.readouterr().out)
    assert [each["model"] for each in found["models"]] == [MODELS[0]]
    assert [step["items"] for step in found["models"][0]["steps"]] == [1, 2]
    assert found["notes"] == ["stopped after 2 of 8 measurements"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bench_that_is_ended_leaves_nothing_behind(number: signal.Signals) -> None:
    """The service that it had started ends too."""
    with stand_in(pass_s=0.005) as url:
        arguments = ["bench", "--backend", url, "-w", "W2", "--slots", "8"]
        with subprocess.Popen(
            [sys.executable, "-m", "unisono", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            children = wait_for_children(process.pid)
            process.send_signal(number)
            _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 128 + number
        assert b"unisono: terminated" in said or b"unisono: interrupted" in said
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def wait_for_children(parent: int) -> list[int]:
    """The processes that it started, once there is one."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if found:
            return [int(each) for each in found]
    raise AssertionError("it started nothing")
