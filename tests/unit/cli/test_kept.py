"""The commands for kept batches, against a stand-in that speaks the contract."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from typer.testing import CliRunner, Result

from tests.unit.cli import harness
from tests.unit.cli.fake_server import FakeServer, Script, status
from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli import submit
from unisono.edge.cli.upload import Upload
from unisono.edge.grpc.server import MAX_RECEIVE_BYTES


def write(path: Path, *lines: object) -> str:
    """A batch file; lines that are no text are written as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def openai(custom_id: str, prompt: str) -> dict[str, Any]:
    """A line of OpenAI's."""
    return {"custom_id": custom_id, "url": "/v1/completions", "body": {"prompt": prompt}}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A service that runs."""
    with harness.beside() as running:
        yield running


def unisono(runner: CliRunner, server: FakeServer, *arguments: str) -> Result:
    """Runs a command against the service; none is started."""
    result, started = harness.invoke(runner, [*arguments, "--server", server.target])
    assert not started
    return result


def test_what_is_submitted(runner: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    """The items with what was said of the batch; its id on standard output, and nothing else."""
    file = write(tmp_path / "b.jsonl", {"id": "a", "prompt": "x"}, {"messages": [{"role": "user", "content": "y"}]})
    words = ["--model", "m", "--num-predict", "7", "--priority", "low", "--timeout", "1h", "--max-concurrency", "2"]
    result = unisono(runner, server, "submit", file, *words, "--metadata", "job=a=b", "--request-id", "r")
    assert (result.exit_code, result.stdout) == (0, "k-1\n"), result.stderr
    assert result.stderr == f"unisono: 2 items kept by the service at {server.target}\n"
    (request,) = server.submitted
    assert [item.item_id for item in request.items] == ["a", "line-2"]
    assert dict(request.metadata) == {"job": "a=b"}
    config = request.config
    assert (config.model, config.options.num_predict, config.request_id) == ("m", 7, "r")
    assert (config.priority, config.max_concurrency) == (rpc.PRIORITY_LOW, 2)
    assert config.batch_deadline.seconds == 3600
    assert config.validation == rpc.VALIDATION_MODE_PER_ITEM


def test_a_bad_line_is_told_and_left_out(runner: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    """The others are kept; the exit code says that some are not."""
    file = write(tmp_path / "b.jsonl", {"id": "a", "prompt": "x"}, *["{"] * 25)
    result = unisono(runner, server, "submit", file)
    assert (result.exit_code, result.stdout) == (1, "k-1\n")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("line 2: not JSON")
    assert lines[20:22] == [
        "… and 5 more bad lines",
        "unisono: 25 lines are not among the items of the batch, as told above",
    ]
    assert [item.item_id for item in server.items] == ["a"]


@pytest.mark.parametrize(
    ("file", "code", "says"),
    [
        (["{"], 1, "nothing was submitted"),
        ([{"prompt": "x"}, "{"], 2, "nothing was run, because of --strict"),
        ([], 2, "holds no items."),
    ],
)
def test_nothing_is_submitted(runner: CliRunner, tmp_path: Path, file: list[object], code: int, says: str) -> None:
    """Where no line is good, or with --strict one is bad; no service is asked."""
    more = ["--strict"] if code == 2 else []
    result, started = harness.invoke(runner, ["submit", write(tmp_path / "b.jsonl", *file), *more])
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert not started


@pytest.mark.parametrize("more", [0, 1])
def test_what_fits_in_a_message_goes_in_one(
    more: int, runner: CliRunner, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is never larger than the service receives, whatever stands beside the items; else a stream is opened."""
    assert submit.MAX_MESSAGE_BYTES == MAX_RECEIVE_BYTES
    file = write(tmp_path / "b.jsonl", *({"id": f"{n}", "prompt": "x" * 200} for n in range(300)))
    assert unisono(runner, server, "submit", file, "--request-id", "r").exit_code == 0
    (request,) = server.submitted
    items = sum(item.ByteSize() + 6 for item in request.items)
    plain = rpc.SubmitBatchRequest(config=request.config)
    limit = items + plain.ByteSize() + 1024
    assert request.ByteSize() <= limit
    opened: list[rpc.StreamBatchOpen] = []

    async def run(upload: Upload) -> str:
        opened.append(upload._open)
        return "k-1"

    monkeypatch.setattr(Upload, "run", run)
    monkeypatch.setattr(submit, "MAX_MESSAGE_BYTES", limit - more)
    assert unisono(runner, server, "submit", file, "--request-id", "r").exit_code == 0
    assert len(server.submitted) == 2 - more
    assert [(one.durable, one.config.request_id) for one in opened] == [(True, "r")] * more


def test_a_submit_whose_answer_was_lost_is_sent_again(runner: CliRunner, tmp_path: Path) -> None:
    """Under the same name: the batch is kept once."""
    file = write(tmp_path / "b.jsonl", {"prompt": "x"})
    with harness.beside(Script(lost_submits=2)) as server:
        result = unisono(runner, server, "submit", file)
        assert (result.exit_code, result.stdout) == (0, "k-1\n")
        assert len(server.submitted) == 3
        assert len({request.config.request_id for request in server.submitted}) == 1
        assert len(server.kept) == 1


def test_a_submit_that_is_given_up_tells_its_name(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be kept: the same command with the same name finds it."""
    monkeypatch.setattr(submit, "GIVE_UP_AFTER_S", 0.3)
    file = write(tmp_path / "b.jsonl", {"prompt": "x"})
    with harness.beside(Script(lost_submits=100)) as server:
        result = unisono(runner, server, "submit", file)
        assert result.exit_code == 3
        name = server.submitted[0].config.request_id
        assert f"--request-id {name}" in result.stderr
        server.script.lost_submits = 0
        assert unisono(runner, server, "submit", file, "--request-id", name).stdout == "k-1\n"
        assert len(server.kept) == 1


def test_a_service_that_stops_is_waited_for(runner: CliRunner, tmp_path: Path) -> None:
    """It has a successor, which takes the batch."""
    file = write(tmp_path / "b.jsonl", {"prompt": "x"})
    stopping = status("SHUTTING_DOWN", "send this to its successor", code=code_pb2.UNAVAILABLE)
    with harness.beside(Script(refusals=[(grpc.StatusCode.UNAVAILABLE, stopping)] * 2)) as server:
        result = unisono(runner, server, "submit", file)
        assert (result.exit_code, result.stdout) == (0, "k-1\n")
        assert len(server.submitted) == 3


def test_a_service_without_room_is_told_by_its_own_code(runner: CliRunner, tmp_path: Path) -> None:
    """Nothing is wrong with the items, and another try may help."""
    file = write(tmp_path / "b.jsonl", {"prompt": "x"})
    full = status("LIMIT_EXCEEDED", "the journal's file has no room", code=code_pb2.RESOURCE_EXHAUSTED)
    with harness.beside(Script(refusals=[(grpc.StatusCode.RESOURCE_EXHAUSTED, full)])) as server:
        result = unisono(runner, server, "submit", file)
        assert result.exit_code == 3
        assert "has no room" in result.stderr
        assert "--request-id" not in result.stderr
        assert len(server.submitted) == 1


def test_results_are_those_of_run(runner: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    """To the byte, but for the batch's name: every form of line, parts put together, embeddings, failures."""
    lines = [
        {"id": "a", "prompt": "hello you"},
        openai("b", "think of it"),
        openai("c", "big one"),
        {"id": "d", "prompt": "big one"},
        {"custom_id": "e", "url": "/v1/embeddings", "body": {"input": ["x", "y"]}},
        openai("f", "fail it"),
        {
            "custom_id": "g",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "tools"}]},
        },
        {"id": "h", "prompt": "fail it"},
    ]
    file = write(tmp_path / "b.jsonl", *lines)
    of_run = unisono(runner, server, "run", file).stdout
    assert unisono(runner, server, "submit", file).stdout == "k-1\n"
    result = unisono(runner, server, "results", "k-1")
    assert result.exit_code == 1
    assert result.stdout == of_run.replace("b-1-", "k-1-")
    followed = unisono(runner, server, "results", "k-1", "--follow", "--output", "-")
    assert followed.stdout == result.stdout
    for more in ((), ("--follow",)):
        output = tmp_path / "failed.jsonl"
        failed = unisono(runner, server, "results", "k-1", "--failed", "--output", str(output), *more)
        assert (failed.exit_code, failed.stdout) == (1, "")
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line.get("custom_id") or line["id"] for line in written] == ["f", "h"]


def test_a_file_that_is_too_mixed(runner: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    """The forms of its lines could not be told again: it is refused, with what to do. One form alone is no matter."""
    mixed = [openai(str(number), "x") if number % 2 else {"id": str(number), "prompt": "x"} for number in range(300)]
    result = unisono(runner, server, "submit", write(tmp_path / "b.jsonl", *mixed))
    assert result.exit_code == 2
    assert "Sort its lines by form" in result.stderr
    one = [openai(str(number), "x") for number in range(300)]
    assert unisono(runner, server, "submit", write(tmp_path / "b.jsonl", *one)).exit_code == 0
    assert dict(server.submitted[0].metadata) == {"unisono.forms": "t300"}


@pytest.mark.parametrize("cut", [None, 0, 3])
def test_watch_tells_progress_map_and_report(runner: CliRunner, tmp_path: Path, cut: int | None) -> None:
    """On standard error; also over a connection that is cut."""
    file = write(tmp_path / "b.jsonl", *({"id": f"i{n}", "prompt": "one two"} for n in range(5)), {"prompt": "fail"})
    with harness.beside(Script(cut_after=cut)) as server:
        assert unisono(runner, server, "submit", file).exit_code == 0
        result = unisono(runner, server, "watch", "k-1")
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert "unisono: 6 of 6 done, 1 failed" in result.stderr
    assert ("the connection was lost (cut); batch k-1 goes on" in result.stderr) == (cut is not None)
    assert "  i4    │    ████" in lines
    assert "  items            5 completed, 1 failed" in lines
    assert "  batch            k-1" in lines
    assert "  line-6: failed, MODEL_NOT_FOUND" in lines


def test_status_and_list(runner: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    """For people and for programs, on standard output; pages are put together, and the limit is kept."""
    for number in range(5):
        file = write(tmp_path / "b.jsonl", {"prompt": "x"}, *[{"prompt": "fail"}] * (number == 4))
        assert unisono(runner, server, "submit", file, "--metadata", f"n={number}").exit_code == 0
    server.kept["k-2"][0].state = event_pb2.BATCH_STATE_RUNNING
    server.kept["k-2"][0].ClearField("started_at")
    server.kept["k-2"][0].restarts = 2
    result = unisono(runner, server, "status", "k-5")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:3] == [
        "k-5",
        "  state            completed",
        "  items            1 of 2 completed, 1 failed",
    ]
    assert "  metadata         n=4" in result.stdout.splitlines()
    result = unisono(runner, server, "status", "k-2")
    assert result.exit_code == 0
    assert "  state            waiting for its turn; the service was started again 2 times meanwhile" in result.stdout
    found = json.loads(unisono(runner, server, "status", "k-5", "--json").stdout)
    assert (found["id"], found["state"], found["items"], found["failed"]) == ("k-5", "completed", 2, 1)
    assert (found["created_at"], found["expires_at"]) == ("2023-11-14T22:13:20.000+00:00", None)
    assert found["metadata"] == {"n": "4"}
    listed = unisono(runner, server, "list")
    assert [line.split()[:4] for line in listed.stdout.splitlines()] == [
        ["BATCH", "STATE", "DONE", "FAILED"],
        ["k-5", "completed", "2/2", "1"],
        ["k-4", "completed", "1/1", "0"],
        ["k-3", "completed", "1/1", "0"],
        ["k-2", "waiting", "1/1", "0"],
        ["k-1", "completed", "1/1", "0"],
    ]
    assert not listed.stderr
    some = unisono(runner, server, "list", "--limit", "3", "--json")
    assert [json.loads(line)["id"] for line in some.stdout.splitlines()] == ["k-5", "k-4", "k-3"]
    assert "these are the newest 3; --limit shows more" in some.stderr
    assert unisono(runner, server, "list", "--state", "running").stdout.splitlines()[1].startswith("k-2 ")
    none = unisono(runner, server, "list", "--state", "expired")
    assert (none.exit_code, none.stdout, none.stderr) == (0, "", "unisono: no such batch is kept\n")


def test_what_is_deleted_is_gone(runner: CliRunner, server: FakeServer, tmp_path: Path) -> None:
    """Each command says so, and what to do; that is wrong usage. No file is made for results that are not there."""
    assert unisono(runner, server, "submit", write(tmp_path / "b.jsonl", {"prompt": "x"})).exit_code == 0
    assert unisono(runner, server, "delete", "k-1").exit_code == 0
    output = tmp_path / "answers.jsonl"
    for words in (["delete"], ["status"], ["watch"], ["results", "--output", str(output)], ["results", "--follow"]):
        result = unisono(runner, server, words[0], "k-1", *words[1:])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "there is no batch 'k-1' (BATCH_NOT_FOUND)\n`unisono list` names" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    "words", [["submit", "FILE"], ["watch", "k-1"], ["results", "k-1"], ["list"], ["cancel", "k-1"]]
)
def test_no_service_is_started(runner: CliRunner, tmp_path: Path, words: list[str]) -> None:
    """One of our own would end with the command, and the batch with it."""
    file = write(tmp_path / "b.jsonl", {"prompt": "x"})
    result, started = harness.invoke(runner, [file if word == "FILE" else word for word in words])
    assert (result.exit_code, result.stdout) == (3, "")
    assert not started
    assert "Batches are kept by a service that stays: start one with `unisono serve`" in result.stderr
