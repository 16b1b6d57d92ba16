"""`unisono run`, against a stand-in that speaks the contract."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from typer.testing import CliRunner

from tests.unit.cli.fake_server import Script, status
from tests.unit.cli.harness import invoke
from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc


def write(path: Path, *lines: object) -> str:
    """A batch file; lines that are no text are written as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def results(text: str) -> list[dict[str, Any]]:
    """The lines of the output."""
    return [json.loads(line) for line in text.splitlines()]


def test_answers_come_in_the_form_of_their_lines(runner: CliRunner, tmp_path: Path) -> None:
    """Plain lines and OpenAI's, parts put together, one result a line on standard output and nothing else."""
    file = write(
        tmp_path / "batch.jsonl",
        {"prompt": "hello you"},
        "",
        {"custom_id": "oa", "url": "/v1/completions", "body": {"prompt": "think of it"}},
        {"id": "big", "prompt": "big one"},
        {"id": "vectors", "input": ["a", "b"]},
    )
    result, (server,) = invoke(runner, ["run", file])
    assert result.exit_code == 0, result.stderr
    found = {each.get("id"): each for each in results(result.stdout)}
    assert found["line-1"]["content"] == "echo: hello you"
    assert found["big"]["content"] == "first second last"
    assert found["big"]["index"] == 2
    assert len(found["vectors"]["embeddings"]) == 2
    assert found["batch_req_b-1-1"]["response"]["body"]["choices"][0]["text"] == "echo: think of it"
    assert server.config.validation == rpc.VALIDATION_MODE_PER_ITEM
    kinds = [request.WhichOneof("message") for request in server.requests]
    assert kinds == ["open", "add_items", "release"]


def test_standard_error_tells_progress_map_and_report(runner: CliRunner, tmp_path: Path) -> None:
    """Where the service comes from, how far it is, who shared passes with whom, and the figures."""
    file = write(tmp_path / "batch.jsonl", {"id": "a", "prompt": "one two"}, {"id": "b", "prompt": "one"})
    result, _ = invoke(runner, ["run", file])
    lines = result.stderr.splitlines()
    assert lines[:3] == [
        "unisono: no service at 127.0.0.1:1 (nothing listens there), so one is started for this command",
        "unisono: starting a stand-in",
        "unisono: started a service for this command, using a stand-in",
    ]
    assert any(line.startswith("unisono: 2 of 2 done") for line in lines)
    start = lines.index("Forward passes")
    assert lines[start : start + 8] == [
        "Forward passes",
        "tiny on stand-in: 4 passes, a column each",
        "  b     │███",
        "  a     │████",
        "        └────",
        "  items  2221",
        "",
        "  █ the item took part in the pass; items: how many did (read downwards).",
    ]
    assert "  items            2 completed" in lines
    assert "  items per pass   1.8" in lines


def test_a_bad_line_costs_only_itself(runner: CliRunner, tmp_path: Path) -> None:
    """It becomes a result that failed and names its line; the others are answered."""
    file = write(
        tmp_path / "batch.jsonl",
        {"id": "good", "prompt": "x"},
        "{",
        {"id": "role", "messages": [{"role": "boss", "content": "x"}]},
        {"id": "good", "prompt": "again"},
        {"id": "option", "prompt": "x", "options": {"temprature": 1}},
    )
    result, (server,) = invoke(runner, ["run", file])
    assert result.exit_code == 1
    found = {each["id"]: each for each in results(result.stdout)}
    assert found["good"]["content"] == "echo: x"
    assert found["line-2"]["error"]["message"].startswith("line 2: not JSON: ")
    assert found["role"]["error"]["message"].startswith("line 3: messages[0].role: must be one of ")
    assert found["line-4"]["error"]["message"] == 'line 4: id: "good" is the id of line 1 already'
    assert found["option"]["error"] == {
        "reason": "INVALID_REQUEST",
        "message": "line 5: options.temprature: not known here; did you mean temperature?",
    }
    assert [item.item_id for item in server.items] == ["good"]
    assert "  items            1 completed, 4 failed" in result.stderr


def test_what_the_service_refuses_names_the_line_too(runner: CliRunner, tmp_path: Path) -> None:
    """Whether it refuses the item or fails it, and without the place in a request that the reader never saw."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"}, "", {"prompt": "refuse it"}, {"prompt": "malformed"})
    result, _ = invoke(runner, ["run", file])
    assert result.exit_code == 1
    found = {each["id"]: each for each in results(result.stdout)}
    assert found["line-3"]["error"]["message"] == ("line 3: one field is wrong; options.top_p: must be from 0 to 1")
    assert found["line-4"]["error"]["message"] == "line 4: the item is malformed; generate.prompt: is bad"


def test_strict_runs_nothing_if_a_line_is_bad(runner: CliRunner, tmp_path: Path) -> None:
    """Every bad line is told, and no service is even started."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"}, *["{"] * 25)
    result, started = invoke(runner, ["run", file, "--strict"])
    assert result.exit_code == 2
    assert not started
    assert not result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("line 2: not JSON")
    assert lines[20:] == ["… and 5 more bad lines", f"{file}: nothing was run, because of --strict"]


def test_strict_runs_a_good_file(runner: CliRunner, tmp_path: Path) -> None:
    """After it was read once, it is read again."""
    file = write(tmp_path / "batch.jsonl", *({"prompt": f"x {number}"} for number in range(10)))
    result, _ = invoke(runner, ["run", file, "--strict"])
    assert result.exit_code == 0
    assert len(results(result.stdout)) == 10


@pytest.mark.parametrize(("content", "says"), [("", "holds no items."), ("\n \n", "holds no items.")])
def test_an_empty_file_is_a_mistake(runner: CliRunner, tmp_path: Path, content: str, says: str) -> None:
    """Told before anything is started."""
    file = tmp_path / "batch.jsonl"
    file.write_text(content)
    result, started = invoke(runner, ["run", str(file)])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not started


def test_a_file_of_bad_lines_needs_no_service(runner: CliRunner, tmp_path: Path) -> None:
    """Their results are written all the same."""
    result, started = invoke(runner, ["run", write(tmp_path / "batch.jsonl", "{", "[]")])
    assert result.exit_code == 1
    assert [each["id"] for each in results(result.stdout)] == ["line-1", "line-2"]
    assert "  items            2 failed" in result.stderr
    assert not started


def test_a_file_that_is_not_there(runner: CliRunner, tmp_path: Path) -> None:
    """And a folder, and an output that cannot be written, and the input as output."""
    batch = write(tmp_path / "batch.jsonl", {"prompt": "x"})
    for arguments, says in (
        ([str(tmp_path / "none")], "cannot be read: No such file or directory"),
        ([str(tmp_path)], "cannot be read: "),
        ([batch, "--output", str(tmp_path / "none" / "x")], "cannot be written: No such file or directory"),
        ([batch, "--output", batch], "is the file that is read"),
    ):
        result, started = invoke(runner, ["run", *arguments])
        assert result.exit_code == 2, arguments
        assert says in result.stderr
        assert not started
    assert (tmp_path / "batch.jsonl").read_text()


def test_results_can_go_to_a_file_in_order(runner: CliRunner, tmp_path: Path) -> None:
    """Then standard output has nothing, and the order is the input's, bad lines in their places."""
    lines = [{"prompt": " ".join(["word"] * (20 - number))} for number in range(20)]
    file = write(tmp_path / "batch.jsonl", *lines, "{")
    output = tmp_path / "out.jsonl"
    result, _ = invoke(runner, ["run", file, "--output", str(output), "--order", "input"])
    assert result.exit_code == 1
    assert not result.stdout
    assert [each["index"] for each in results(output.read_text())] == list(range(21))


def test_options_apply_to_the_batch(runner: CliRunner, tmp_path: Path) -> None:
    """What the command line says stands on the batch, so that an item can say otherwise."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"})
    result, (server,) = invoke(
        runner,
        ["run", file, "--model", "m", "--num-predict", "5", "--temperature", "0", "--seed", "9",
         "--timeout", "10m", "--item-timeout", "1m30s", "--embedded", "--co-scheduling", "together",
         "--max-concurrency", "3", "--items-per-second", "0.5", "--priority", "low", "--weight", "7"],
    )  # fmt: skip
    assert result.exit_code == 0
    config = server.config
    assert config.model == "m"
    assert (config.options.num_predict, config.options.seed) == (5, 9)
    assert config.options.HasField("temperature")
    assert config.batch_deadline.seconds == 600
    assert config.item_timeout.seconds == 90
    assert (config.co_scheduling, config.priority) == (rpc.CO_SCHEDULING_TOGETHER, rpc.PRIORITY_LOW)
    assert (config.max_concurrency, config.items_per_second, config.weight) == (3, 0.5, 7)
    assert "using the embedded engine" in result.stderr
    assert "no service at" not in result.stderr


def test_the_map_can_be_left_out_or_shown_whole(runner: CliRunner, tmp_path: Path) -> None:
    """Forty rows; more or fewer on request; none."""
    file = write(tmp_path / "batch.jsonl", *({"prompt": "x"} for _ in range(50)))
    for arguments, rows in (([], 40), (["--passes", "all"], 50), (["--passes", "3"], 3), (["--no-map"], 0)):
        result, _ = invoke(runner, ["run", file, *arguments])
        assert sum("│" in line and "█" in line for line in result.stderr.splitlines()) == rows


def test_an_item_that_fails_is_told_at_the_end(runner: CliRunner, tmp_path: Path) -> None:
    """With its reason; the exit code says that some items failed."""
    file = write(tmp_path / "batch.jsonl", {"id": "lost", "prompt": "fail this"}, {"prompt": "x"})
    result, _ = invoke(runner, ["run", file])
    assert result.exit_code == 1
    assert "  lost: failed, MODEL_NOT_FOUND\n    the model 'big' is not there" in result.stderr


def test_credit_is_kept(runner: CliRunner, tmp_path: Path) -> None:
    """Five thousand items through a credit of ten, which grows by one with each that ends: all are answered."""
    file = write(tmp_path / "batch.jsonl", *({"prompt": f"{number}"} for number in range(5000)))
    result, (server,) = invoke(runner, ["run", file, "--no-map"], Script(first_credit=10, slots=8))
    assert result.exit_code == 0
    assert {each["id"] for each in results(result.stdout)} == {f"line-{number}" for number in range(1, 5001)}
    assert server.most_over_credit == 0
    assert all(len(request.add_items.items) <= 10 for request in server.requests)


def test_more_items_than_a_batch_may_have(runner: CliRunner, tmp_path: Path) -> None:
    """Credit that will never come is not waited for: what the batch does not take is told, with the reason."""
    file = write(tmp_path / "batch.jsonl", *({"prompt": f"{number}"} for number in range(5)))
    result, (server,) = invoke(runner, ["run", file, "--no-map"], Script(first_credit=3, most_items=3))
    assert result.exit_code == 1
    assert server.most_over_credit == 0
    reasons = [each["error"]["reason"] for each in results(result.stdout) if "error" in each]
    assert reasons == ["BATCH_FULL", "BATCH_FULL"]
    assert len(results(result.stdout)) == 5


def test_messages_stay_small(runner: CliRunner, tmp_path: Path) -> None:
    """Ten items of 300 kB go in several messages of less than 1 MB; one of 2 MB goes alone."""
    file = write(
        tmp_path / "batch.jsonl", *({"prompt": "x" * 300_000} for _ in range(10)), {"prompt": "y" * 2_000_000}
    )
    result, (server,) = invoke(runner, ["run", file, "--no-map"])
    assert result.exit_code == 0
    added = [request.add_items for request in server.requests if request.HasField("add_items")]
    assert sum(len(each.items) for each in added) == 11
    assert all(each.ByteSize() < 1_000_000 for each in added if len(each.items) > 1)


def test_no_deadlock_with_a_service_that_speaks_before_it_reads(runner: CliRunner, tmp_path: Path) -> None:
    """Ten thousand messages come before the first is read, and each read takes its time, while 8 MB wait to go."""
    file = write(tmp_path / "batch.jsonl", *({"prompt": "x" * 100_000} for _ in range(80)))
    script = Script(chatter=10_000, read_pause_s=0.01)
    result, _ = invoke(runner, ["run", file, "--no-map"], script)
    assert result.exit_code == 0
    assert len(results(result.stdout)) == 80


def test_a_service_that_is_not_there(runner: CliRunner, tmp_path: Path) -> None:
    """Named by --server, it must answer; the message says what to do."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"})
    result, started = invoke(runner, ["run", file, "--server", "127.0.0.1:1"])
    assert result.exit_code == 3
    assert not started
    assert "The service at 127.0.0.1:1: " in result.stderr
    assert "unisono serve" in result.stderr


def test_a_service_that_cannot_be_started(runner: CliRunner, tmp_path: Path) -> None:
    """What it says is told, without a traceback."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"})
    result, _ = invoke(runner, ["run", file, "--ollama", "http://nowhere"])
    assert result.exit_code == 3
    assert result.stderr == "No service could be started: nothing answers at http://nowhere (BACKEND_UNAVAILABLE)\n"


def test_server_and_backend_exclude_each_other(runner: CliRunner, tmp_path: Path) -> None:
    """A running service has its backend already."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"})
    result, _ = invoke(runner, ["run", file, "--server", "127.0.0.1:1", "--embedded"])
    assert result.exit_code == 2
    assert "Leave one of them out" in result.stderr


@pytest.mark.parametrize(
    ("code", "reason", "exit_code", "remedy"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", 2, "  config.options.top_p: must be from 0 to 1"),
        (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", 3, "try again once it is back"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED", 1, "Send less at once"),
    ],
)
def test_a_call_that_fails(  # noqa: PLR0917  # the table's columns
    runner: CliRunner, tmp_path: Path, code: grpc.StatusCode, reason: str, exit_code: int, remedy: str
) -> None:
    """Reason, message, fields and remedy are told; what was answered before stays, and what was not is counted."""
    file = write(tmp_path / "batch.jsonl", *({"prompt": "x"} for _ in range(5)))
    fields = [("config.options.top_p", "must be from 0 to 1")] if exit_code == 2 else []
    details = status(reason, "this is why", *fields, code=code_pb2.Code.Value(code.name))
    result, _ = invoke(runner, ["run", file], Script(abort=(code, details), abort_after=2))
    assert result.exit_code == exit_code
    assert len(results(result.stdout)) == 3
    assert f"this is why ({reason})" in result.stderr
    assert remedy in result.stderr
    assert "  no result        2 that had been sent" in result.stderr


def test_something_else_answers(runner: CliRunner, tmp_path: Path) -> None:
    """A gRPC server without this contract is told as what it is."""
    file = write(tmp_path / "batch.jsonl", {"prompt": "x"})
    details = status("UNIMPLEMENTED", "Method not found!", code=code_pb2.UNIMPLEMENTED)
    script = Script(abort=(grpc.StatusCode.UNIMPLEMENTED, details), abort_after=-1)
    result, _ = invoke(runner, ["run", file], script)
    assert result.exit_code == 3
    assert "is not Unisono, or an older version" in result.stderr
