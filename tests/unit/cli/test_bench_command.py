"""`unisono bench`: what is refused before anything is started, and how a model's gain is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

import pytest
from typer.testing import CliRunner, Result

from tests.fakes.ollama import FakeOllama, Fault, FaultKind
from unisono._generated.unisono.v1 import event_pb2
from unisono.bench.models import ModelFigures, items_of
from unisono.core.benchmark import BatchRun, advise, steps_of
from unisono.core.errors import LoadFailedError
from unisono.edge.cli.bench import BenchOptions, bench
from unisono.edge.cli.errors import StopError
from unisono.edge.cli.gain import draw_models, models_as_json
from unisono.edge.cli.main import build_cli
from unisono.edge.cli.ports import StartedEngine
from unisono.edge.cli.terminal import Terminal


def start_nothing(
    *, slots: int | None, on_progress: Callable[[str], None]
) -> AbstractAsyncContextManager[StartedEngine]:
    """No engine can be had."""
    raise LoadFailedError("there is no engine here")


def invoke(runner: CliRunner, *arguments: str) -> Result:
    """Runs the command where no engine can be had."""

    def unused(**_: object) -> None:
        raise NotImplementedError

    cli = build_cli(unused, unused, version="1.2.3", start_engine=start_nothing)  # type: ignore[arg-type]
    return runner.invoke(cli, ["bench", *arguments])


def test_help_has_examples(runner: CliRunner) -> None:
    """And names the workloads and the exit codes."""
    result = invoke(runner, "--help")
    assert result.exit_code == 0
    for text in ("Examples:", "unisono bench --workload W1", "W9  20,000 items", "Exit codes: 0 measured"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--workload", "W10"], 2, "there is no workload W10; there are W1"),
        (["--model", "a", "--plot", "x.svg"], 2, "--plot draws workloads"),
        (["--items", "0,2"], 2, "is not a list of numbers"),
        (["--runs", "0"], 2, "--runs"),
        (["--rpc", "Other"], 2, "--rpc"),
        (["--backend", "127.0.0.1:1"], 3, "nothing answers at http://127.0.0.1:1"),
        ([], 3, "The embedded engine could not be started: there is no engine here (LOAD_FAILED)"),
    ],
)
def test_what_cannot_be_measured_is_said(runner: CliRunner, arguments: list[str], code: int, says: str) -> None:
    """Without a traceback."""
    result = invoke(runner, *arguments)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("names", "left_out"),
    [(("W5",), ["W5 (two values of num_ctx, 16 items)"]), (("W6", "W7"), ["W6 (a burst", "W7 (three models"])],
)
async def test_workloads_that_do_not_apply_are_named(names: tuple[str, ...], left_out: list[str]) -> None:
    """A llama.cpp server loads no models: where nothing else was asked for, that is an error, and nothing is run."""
    async with FakeOllama() as fake:
        fake.faults.add(Fault(FaultKind.ANSWER, path="/api/version", status=404, times=None))
        fake.faults.add(Fault(FaultKind.ANSWER, path="/props", status=200, body={"total_slots": 4}, times=None))
        with pytest.raises(StopError) as caught:
            await bench(BenchOptions(backend=fake.url, workloads=names), start_nothing, Terminal.standard())
        assert not fake.requests_to("/v1/chat/completions")
    assert caught.value.code == 2
    assert len(caught.value.lines) == len(left_out) + 1
    assert all(line.startswith(name) for name, line in zip(left_out, caught.value.lines, strict=False))
    assert "is about loading models" in caught.value.lines[0]
    assert caught.value.lines[-1] == "Nothing was measured."


@pytest.mark.parametrize("models", [(), ("fake", "fake-think")])
async def test_models_that_take_each_other_s_place_must_be_named(models: tuple[str, ...]) -> None:
    """Which of those that there are do so, nobody knows; and nothing is run."""
    async with FakeOllama() as fake:
        options = BenchOptions(backend=fake.url, workloads=("W7",), models=models)
        with pytest.raises(StopError) as caught:
            await bench(options, start_nothing, Terminal.standard())
        assert not fake.loads
    assert caught.value.code == 2
    assert caught.value.lines[0].startswith("W7 (three models, mixed) was left out: it needs 3 models that take")
    assert f"{len(models) or 'none'} are named" in caught.value.lines[0]
    assert caught.value.lines[-1] == "Nothing was measured."


def figures(gains: Iterable[float], *, slots: int | None = 4, error: str = "") -> ModelFigures:
    """A model with these gains at 1, 2, 4 … items."""
    runs = [
        BatchRun(
            items=2**place,
            duration_s=1.0 + run,
            latencies_s=(0.5,),
            completion_tokens=round(100 * gain),
            passes=50,
        )
        for place, gain in enumerate(gains)
        for run in range(2)
    ]
    steps = steps_of(runs)
    return ModelFigures(
        model="m",
        steps=steps,
        slots=slots,
        slot_source=event_pb2.SLOT_SOURCE_LEARNED,
        advice=advise(steps, slots),
        question="Why?",
        sample="Because\nit is so. " * 20,
        error=error,
    )


def test_a_models_gain_is_told() -> None:
    """Latency, tokens a second with their spread, gain and sharing for each size; an answer; what to set."""
    lines = draw_models([figures([1, 1.9, 2.0, 2.0]), figures([], error="no such model")], is_ollama=True)
    assert lines[0] == "m"
    assert lines[2].split() == ["1", "500", "ms", "1.5", "s", "75.0", "(50.0–100)", "1.0×", "2.0"]
    assert lines[3].split()[-2:] == ["1.9×", "3.8"]
    text = "\n".join(lines)
    assert "asked: Why?" in text
    assert "said:  Because it is so." in text
    assert "slots: 4 (learned); gain: flat from 2 items on" in text
    assert "advice: Fewer slots do as well and need less memory: start Ollama with OLLAMA_NUM_PARALLEL=2." in text
    assert lines[-1] == "  could not be measured: no such model"
    assert max(map(len, lines)) < 180


def test_what_is_not_known_is_said() -> None:
    """Slots that nobody has learned, and a gain that is not flat yet."""
    text = "\n".join(draw_models([figures([1, 1.9], slots=None)], is_ollama=False))
    assert "slots: not known yet; gain: no flat part up to 2 items" in text


def test_the_same_for_programs() -> None:
    """All figures, as JSON."""
    (found,) = json.loads(json.dumps(models_as_json([figures([1, 1.9, 2.0])])))["models"]
    assert (found["flat_from_items"], found["advice"]) == (2, {"kind": "fewer_do", "slots": 2})
    assert found["steps"][1]["gain"] == 1.9


def test_no_two_batches_ask_the_same() -> None:
    """So that no batch finds its prompts in a cache."""
    texts = [
        item.chat.messages[0].content
        for run in range(3)
        for size in (1, 2, 4)
        for item in items_of("m", size, run=run, num_predict=1)
    ]
    assert len(set(texts)) == len(texts)
