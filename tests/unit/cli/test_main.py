"""The commands and their options."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.cli.harness import invoke
from unisono import examples
from unisono.edge.cli.lines_in import GoodLine, LineReader
from unisono.edge.cli.source import Line


def test_version(runner: CliRunner) -> None:
    """One line."""
    result, _ = invoke(runner, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "unisono 1.2.3\n")


KEPT = ["submit", "watch", "results", "status", "list", "cancel", "retry", "delete"]


@pytest.mark.parametrize("command", ["run", "serve", "doctor", "eval", "trace-check", *KEPT])
def test_help_has_examples(runner: CliRunner, command: str) -> None:
    """Each command's help shows how it is used."""
    result, _ = invoke(runner, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"unisono {command}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "Missing argument"),
        (["run", "x", "--timeout", "soon"], "not a duration"),
        (["run", "x", "--passes", "0"], "neither a number of rows"),
        (["run", "x", "--passes", "²"], "neither a number of rows"),
        (["run", "x", "--order", "random"], "Invalid value"),
        (["run", "x", "--num-predict", "9999999999"], "too large"),
        (["run", "x", "--co-scheduling", "required"], "Invalid value"),
        (["run", "x", "--max-concurrency", "0"], "greater than or equal to 1"),
        (["run", "x", "--items-per-second", "0"], "no number above 0"),
        (["run", "x", "--items-per-second", "many"], "no number above 0"),
        (["run", "x", "--weight", "101"], "less than or equal to 100"),
        (["run", "x", "--priority", "highest"], "Invalid value"),
        (["run", "x", "--unknown"], "No such option"),
        (["serve", "--embedded", "--ollama", "http://x"], "exclude each other"),
        (["serve", "--log-level", "loud"], "Invalid value"),
        (["trace-check"], "Missing argument"),
        (["trace-check", "batch_x"], "neither a trace's id (32 hexadecimal digits) nor a batch's"),
        (["trace-check", "0" * 32, "--jaeger", "localhost:16686"], "must begin with http:// or https://"),
        (["trace-check", "0" * 32, "--jaeger", "http://x:y"], "is no URL"),
        (["trace-check", "0" * 32, "--wait", "soon"], "not a duration"),
        (["trace-check", "0" * 32, "--items", "0"], "greater than or equal to 1"),
        (["submit", "x", "--embedded"], "No such option"),
        (["submit", "x", "--metadata", "night"], "is not KEY=VALUE"),
        (["submit", "x", "--metadata", "a=1", "--metadata", "a=2"], "a is given twice"),
        (["submit", "x", "--metadata", "unisono.forms=p1"], "unisono.forms is the command line's own"),
        (["list", "--state", "waiting"], "Invalid value"),
        (["list", "--limit", "0"], "greater than or equal to 1"),
        (["delete"], "Missing argument"),
        (["run", "x", "--resume"], "No such file"),
        (["dance"], "No such command"),
    ],
)
def test_wrong_usage(runner: CliRunner, arguments: list[str], says: str) -> None:
    """Exit code 2, and what is wrong."""
    result, _ = invoke(runner, arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--listen", "taken"], 3, "The service cannot be started: address already in use"),
        (["--ollama", "away"], 3, "nothing answers there (BACKEND_UNAVAILABLE)"),
        ([], 130, ""),
    ],
)
def test_serve_says_why_it_ends(runner: CliRunner, arguments: list[str], code: int, says: str) -> None:
    """Without a traceback."""
    result, _ = invoke(runner, ["serve", *arguments])
    assert result.exit_code == code
    assert says in result.stderr


def test_the_example_batch() -> None:
    """Twenty-four good lines of every form; eight share a system prompt; no model is named."""
    path = Path(examples.__path__[0]) / "batch.jsonl"
    lines = [Line(number=number, text=text) for number, text in enumerate(path.read_bytes().splitlines(), 1)]
    found = list(LineReader().read(lines))
    items = [line.item for line in found if isinstance(line, GoodLine)]
    assert len(items) == len(found) == 24
    assert not any(item.model for item in items)
    assert all(1 <= item.options.num_predict <= 120 for item in items)
    systems = [item.chat.messages[0].content for item in items if len(item.chat.messages) > 1]
    assert max(systems.count(system) for system in systems) == 8
