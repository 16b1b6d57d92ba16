"""`unisono run --resume`: what the output holds is not asked again, and what is no output of ours is left alone."""

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.cli.harness import invoke
from tests.unit.cli.test_outlets import ended
from tests.unit.cli.test_run import results, write
from unisono.edge.cli.errors import StopError
from unisono.edge.cli.outlets import InOrder, JsonLines
from unisono.edge.cli.resume import take_up

PLAIN = '{"id":"a","index":0,"state":"completed","content":"x"}\n'
OPENAI = '{"id":"batch_req_1","custom_id":"b","response":{"status_code":200,"body":{}},"error":null}\n'
FAILED = '{"id":"c","index":2,"state":"failed","error":{"reason":"INTERNAL","message":"x"}}\n'
OPENAI_FAILED = '{"id":"batch_req_2","custom_id":"d","response":null,"error":{"code":"INTERNAL","message":"x"}}\n'
OPENAI_HTTP = '{"id":"batch_req_3","custom_id":"e","response":{"status_code":500},"error":null}\n'
ALL = PLAIN + OPENAI + FAILED + OPENAI_FAILED + OPENAI_HTTP


@pytest.mark.parametrize(
    "torn",
    ["", "{", '{"id":"z', '{"id":"z\\', '{"id":"z","in', '{"id":"z","index":3,"content":"é', '{"id":"b","custom'],
)
def test_what_was_answered(tmp_path: Path, torn: str) -> None:
    """In either form; a last line that was broken off is cut from the file."""
    path = tmp_path / "answers.jsonl"
    path.write_text(ALL + torn)
    found = take_up(str(path))
    assert found.answered == {"a", "b"}
    assert found.was_torn == bool(torn)
    assert path.read_text() == ALL


def test_each_place_of_a_break(tmp_path: Path) -> None:
    """Wherever the file was broken off, whole lines are kept, and nothing else."""
    path = tmp_path / "answers.jsonl"
    whole = (PLAIN + OPENAI).encode()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        found = take_up(str(path))
        # A line that lacks its break alone is whole.
        lines = (whole[:end] + b"\n").count(b"}\n") if whole[:end].endswith(b"}") else whole[:end].count(b"\n")
        complete = [line for line in whole[:end].splitlines() if _is_json(line)]
        assert len(found.answered) == len(complete) <= lines + 1
        assert path.read_bytes() == b"".join(line + b"\n" for line in complete)


def _is_json(line: bytes) -> bool:
    try:
        _ = json.loads(line)
    except ValueError:
        return False
    return True


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Nothing was answered: so the first run and each that goes on are the same command."""
    assert take_up(str(tmp_path / "none")).answered == frozenset()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("notes\n", 1),
        ("notes", 1),
        (PLAIN + "notes", 2),
        (PLAIN + "{}\n", 2),
        ('{"prompt": "x"}\n', 1),
        ('{"id": "x"', 1),
        (PLAIN + '{"id":"z"\n' + PLAIN, 2),
        ("[1]\n", 1),
        # Files of items, of which a batch is made.
        ('{"custom_id":"a","url":"/v1/embeddings","body":{}}', 1),
        ('{"id":"x","prompt":"Why', 1),
        (PLAIN + '{"id":"x","messages":[', 2),
    ],
)
def test_what_is_no_output_of_ours_is_left_alone(tmp_path: Path, text: str, line: int) -> None:
    """The line is named, and no byte of the file changes."""
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(StopError, match=f"line {line}: no result of `unisono run`") as stopped:
        _ = take_up(str(path))
    assert stopped.value.code == 2
    assert path.read_text() == text


@pytest.mark.parametrize("order", ["finished", "input"])
def test_the_rest_is_asked_and_appended(runner: CliRunner, tmp_path: Path, order: str) -> None:
    """What failed too; progress and report are of what was asked."""
    file = write(tmp_path / "b.jsonl", *({"id": name, "prompt": "x"} for name in "abcdef"), "{")
    output = tmp_path / "answers.jsonl"
    output.write_text(ALL)
    result, (server,) = invoke(runner, ["run", file, "--output", str(output), "--resume", "--order", order])
    assert result.exit_code == 1
    assert [item.item_id for item in server.items] == ["c", "d", "e", "f"]
    assert output.read_text().startswith(ALL)
    added = results(output.read_text()[len(ALL) :])
    assert sorted(each["id"] for each in added) == ["c", "d", "e", "f", "line-7"]
    if order == "input":
        assert [each["index"] for each in added] == [2, 3, 4, 5, 6]
    assert f"unisono: 2 items are answered in {output}" in result.stderr
    assert "unisono: 5 of 5 done, 1 failed" in result.stderr
    assert "  items            4 completed, 1 failed" in result.stderr


def test_nothing_is_left_to_do(runner: CliRunner, tmp_path: Path) -> None:
    """No service is started, and nothing is written."""
    file = write(tmp_path / "b.jsonl", {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"})
    output = tmp_path / "answers.jsonl"
    output.write_text(ALL)
    result, started = invoke(runner, ["run", file, "-o", str(output), "--resume"])
    assert (result.exit_code, started) == (0, [])
    assert "nothing is left to do: 2 of 2 items are answered" in result.stderr
    assert output.read_text() == ALL


@pytest.mark.parametrize("output", [[], ["--output", "-"]])
def test_the_output_must_be_a_file(runner: CliRunner, tmp_path: Path, output: list[str]) -> None:
    """What went down a pipe cannot be gone on with."""
    result, _ = invoke(runner, ["run", write(tmp_path / "b.jsonl", {"prompt": "x"}), "--resume", *output])
    assert result.exit_code == 2
    assert "name that file with --output" in result.stderr


def test_the_file_that_is_read_is_not_taken_up(runner: CliRunner, tmp_path: Path) -> None:
    """Though its last line was broken off: nothing of it is cut."""
    file = tmp_path / "b.jsonl"
    file.write_text(PLAIN + '{"id":"z","index":1,"state')
    result, started = invoke(runner, ["run", str(file), "-o", str(file), "--resume"])
    assert (result.exit_code, started) == (2, [])
    assert "is the file that is read" in result.stderr
    assert file.read_text() == PLAIN + '{"id":"z","index":1,"state'


def test_the_order_of_the_file_without_some_of_it() -> None:
    """Places of which no result will come hold nothing up, whenever that is known."""
    stream = io.BytesIO()
    outlet = InOrder(JsonLines(stream))
    outlet.pass_over(0)
    outlet.put(ended(3))
    outlet.put(ended(1))
    outlet.pass_over(4)
    assert [each["index"] for each in results(stream.getvalue().decode())] == [1]
    outlet.pass_over(2)
    outlet.put(ended(5))
    assert [each["index"] for each in results(stream.getvalue().decode())] == [1, 3, 5]
    outlet.close()
