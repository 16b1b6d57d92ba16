"""`unisono eval`: which answers are right, and what is told of the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.cli.harness import invoke
from unisono.edge.cli.eval import ANSWER, last_match, normal


def data_set(path: Path, *lines: object) -> str:
    """A file of questions; texts are written as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (ANSWER, "She has 16 eggs, sells 9 and earns $18.", "18"),
        (ANSWER, "It costs 70,000.", "70,000"),
        (ANSWER, "About -2.5 degrees", "-2.5"),
        (ANSWER, "no number, none", None),
        (r"(-?[\d,]+)", "18, of course", "18,"),
        (r"answer is (\w+)|so (\w+)", "the answer is yes", "yes"),
        (r"[A-Z]\w+", "the capital is Paris", "Paris"),
    ],
)
def test_the_last_match_counts(pattern: str, text: str, found: str | None) -> None:
    """The first group of it, where there is one; a match of nothing but commas is none."""
    assert last_match(re.compile(pattern), text) == found


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("1,000", "1000", True),
        ("18.", "18", True),
        ("18.00", "18", True),
        (" 18 ", "18", True),
        ("18", "81", False),
        ("Paris", "Paris.", True),
        ("Paris", "paris", False),
        ("nan", "nan", True),
    ],
)
def test_values_are_compared_as_what_they_are(one: str, other: str, *, is_same: bool) -> None:
    """Numbers as numbers, all else as text."""
    assert (normal(one) == normal(other)) is is_same


def test_a_data_set_is_scored(runner: CliRunner, tmp_path: Path) -> None:
    """Right, wrong, silent, failed and bad lines are counted apart; every line has a verdict."""
    file = data_set(
        tmp_path / "set.jsonl",
        {"question": "say 18", "answer": "9 + 9 = 18\n#### 18"},
        {"question": "say 70,000.", "answer": "#### 70000"},
        {"question": "say 3", "answer": "#### 4"},
        {"question": "nothing to say", "answer": 5},
        {"question": "fail this one", "answer": "1"},
        "",
        {"prompt": "a line without a question", "answer": "1"},
        "no JSON",
    )
    output = tmp_path / "verdicts.jsonl"
    result, (server,) = invoke(runner, ["eval", file, "--system", "Be brief.", "--output", str(output)])
    assert result.exit_code == 1
    assert "accuracy         28.6% (2 of 7 right; 95 times in 100 between 8.2% and 64.1%)" in result.stdout
    assert "wrong            2, 1 of them without anything that the expression finds" in result.stdout
    assert "no answer        2 INVALID_REQUEST" in result.stdout
    assert "no answer        1 MODEL_NOT_FOUND" in result.stdout
    assert "line 7: question: must be text, not null" in result.stderr
    assert "line 8: not JSON" in result.stderr
    assert server.config is not None
    assert server.config.options.temperature == 0
    assert [message.content for message in server.items[0].chat.messages] == ["Be brief.", "say 18"]
    verdicts = {each["line"]: each for each in map(json.loads, output.read_text().splitlines())}
    assert {line: each["is_right"] for line, each in verdicts.items()} == {
        1: True, 2: True, 3: False, 4: False, 5: False, 7: False, 8: False
    }  # fmt: skip
    assert (verdicts[2]["found"], verdicts[2]["expected"], verdicts[2]["content"]) == (
        "70,000",
        "70000",
        "echo: say 70,000.",
    )
    assert verdicts[5]["error"]["reason"] == "MODEL_NOT_FOUND"


def test_fields_expressions_and_a_limit(runner: CliRunner, tmp_path: Path) -> None:
    """As they are named; an answer that is there ends with 0, though it is wrong."""
    file = data_set(
        tmp_path / "set.jsonl",
        {"ask": "is it Paris", "city": "city: Paris"},
        {"ask": "is it Rome", "city": "city: Oslo"},
        {"ask": "fail", "city": "city: none"},
    )
    arguments = ["eval", file, "--field", "ask", "--expect", "city", "--expect-regex", r"city: (\w+)"]
    result, (server,) = invoke(runner, [*arguments, "--answer-regex", r"[A-Z]\w+", "--limit", "2"])
    assert result.exit_code == 0
    assert "accuracy         50.0% (1 of 2 right" in result.stdout
    assert len(server.items) == 2


@pytest.mark.parametrize(
    ("lines", "arguments", "says"),
    [
        ([], [], "holds no question"),
        (["no JSON"], [], "holds no question"),
        ([{"question": "q", "answer": "x"}], ["--expect-regex", "y"], "holds nothing that y finds"),
        ([{"question": "q", "answer": None}], [], "must be text or a number, not null"),
        ([{"question": "q", "answer": "1"}], ["--answer-regex", "("], "is no regular expression"),
        ([{"question": "q", "answer": "1"}] * 3, ["--field", "nope"], "line 3: nope: must be text, not null"),
        ([{"question": "q", "answer": "1"}], ["--output", "SAME"], "is the file that is read"),
        ([{"question": "q", "answer": "1"}], ["--output", "/none/x"], "cannot be written"),
    ],
)
def test_what_cannot_be_scored_is_said(
    runner: CliRunner, tmp_path: Path, lines: list[object], arguments: list[str], says: str
) -> None:
    """With exit code 2, before a service is asked."""
    file = data_set(tmp_path / "set.jsonl", *lines)
    result, started = invoke(runner, ["eval", file, *[file if word == "SAME" else word for word in arguments]])
    assert (result.exit_code, started) == (2, [])
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert not result.stdout


def test_help_tells_what_is_usually_found(runner: CliRunner) -> None:
    """In words."""
    result, _ = invoke(runner, ["eval", "--help"])
    assert "[default: (the last number)]" in " ".join(result.stdout.replace("│", " ").split())


def test_a_file_that_is_not_there(runner: CliRunner) -> None:
    """Is told, without a traceback."""
    result, _ = invoke(runner, ["eval", "/none.jsonl"])
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr
