"""`unisono trace-check` asks a Jaeger, waits for what is late, says what it found, and ends accordingly."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from tests.fakes.jaeger import FakeJaeger
from tests.unit.cli.harness import invoke
from tests.unit.cli.traces import as_answer, id_of, whole_trace

TRACE = id_of("t", 16)
BATCH = "batch_" + "5f" * 12
NOT_FOUND = (404, json.dumps({"error": {"httpCode": 404, "message": "trace not found"}}))


@pytest.fixture
def jaeger() -> Iterator[FakeJaeger]:
    """A Jaeger that knows nothing but what it is told to answer."""
    with FakeJaeger(list) as fake:
        yield fake


def ask(runner: CliRunner, jaeger: FakeJaeger, *arguments: str) -> Result:
    """Runs the command; it does not wait unless told to."""
    result, _ = invoke(runner, ["trace-check", TRACE, "--jaeger", jaeger.url, "--wait", "0s", *arguments])
    return result


def stored(*lost: str) -> tuple[int, str]:
    """The answer with a whole trace but for the spans that are lost."""
    return 200, as_answer(span for name, span in whole_trace().items() if name not in lost)


def test_a_whole_trace(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """The heading, the tree, and that nothing is wrong."""
    jaeger.scripted = [stored()]
    result = ask(runner, jaeger)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"Trace {TRACE}: 10 spans of shop, unisono"
    assert lines[1].startswith("ask ")
    assert lines[-3] == f"{jaeger.url}/trace/{TRACE}"
    assert "└─ RunBatch  2 items, completed" in lines[2]
    assert lines[-1] == "Nothing is wrong with it."
    assert "\x1b" not in result.stdout


def test_a_caller_that_sends_its_span_elsewhere(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """It is said, and is no finding: the caller may have no traces of its own."""
    jaeger.scripted = [stored("caller"), stored()]
    result = ask(runner, jaeger)
    assert result.exit_code == 0
    assert "The caller's own span is not here" in result.stdout
    assert "caller's own" not in ask(runner, jaeger).stdout


def test_findings_fail_the_command(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """Each with what to do."""
    jaeger.scripted = [stored("plan", "release")]
    result = ask(runner, jaeger)
    assert result.exit_code == 1
    assert "2 findings\n  The batch has no plan span.\n    The span was lost" in result.stdout
    assert "group smol has no release span for wave 0." in result.stdout


def test_json(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """The same for programs."""
    jaeger.scripted = [stored("plan")]
    result = ask(runner, jaeger, "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["trace_ids"] == [TRACE]
    assert told["batch_ids"] == ["batch_1"]
    assert len(told["spans"]) == 9
    (finding,) = told["findings"]
    assert finding["kind"] == "no_plan"
    assert finding["span_ids"] == [id_of("batch", 8)]
    assert set(finding) == {"kind", "what", "to_do", "span_ids"}


def test_words_that_must_not_be_there(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """Given one by one."""
    jaeger.scripted = [stored()] * 2
    assert ask(runner, jaeger, "--absent", "moonlight").exit_code == 0
    result = ask(runner, jaeger, "--absent", "moonlight", "--absent", "smol", "--absent", "chat")
    assert result.exit_code == 1
    assert "gen_ai.operation.name holds text of a prompt or an answer" in result.stdout


def test_what_is_late_is_waited_for(runner: CliRunner, jaeger: FakeJaeger, monkeypatch: pytest.MonkeyPatch) -> None:
    """First there is no such trace, then a part of it, then all; who waits for long is told so."""
    monkeypatch.setattr("unisono.edge.cli.trace_command._PAUSE_S", 0.01)
    monkeypatch.setattr("unisono.edge.cli.trace_command._QUIET_S", 0.0)
    jaeger.scripted = [NOT_FOUND, NOT_FOUND, stored("batch"), stored()]
    result = ask(runner, jaeger, "--wait", "20s")
    assert result.exit_code == 0
    assert len(jaeger.asked) == 4
    assert "there is no such trace yet; waiting for its spans" in result.stderr
    assert "waiting" not in result.stdout


def test_what_more_spans_would_not_mend_is_not_waited_for(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """It is told at once."""
    spans = [span for name, span in whole_trace().items() if name != "caller"]
    jaeger.scripted = [(200, as_answer(spans).replace("unisono.state", "unisono.other"))]
    assert ask(runner, jaeger, "--wait", "1m").exit_code == 1
    assert len(jaeger.asked) == 1


def test_no_such_trace(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """Not yet, perhaps; and what to look at."""
    result = ask(runner, jaeger)
    assert result.exit_code == 1
    assert (
        f"There is no trace of {TRACE} at {jaeger.url} (yet): spans are exported every few seconds" in result.stderr
    )
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in result.stderr


def test_a_batch_that_is_in_no_trace(runner: CliRunner, jaeger: FakeJaeger) -> None:
    """Whatever else the search gives is not taken for it."""
    jaeger.scripted = [stored()]
    result, _ = invoke(runner, ["trace-check", BATCH, "--jaeger", jaeger.url, "--wait", "0s", "--service", "mine"])
    assert result.exit_code == 1
    assert f"There is no trace of {BATCH}" in result.stderr
    assert "query.service_name=mine" in jaeger.asked[0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((404, "404 page not found"), "is no Jaeger with /api/v3, or is in trouble: 404 404 page not found"),
        ((200, "<html>"), "is no Jaeger with /api/v3: the answer is no trace in OTLP JSON"),
        ((503, "busy\x1b[31m"), "is in trouble: 503 busy[31m"),
    ],
)
def test_what_is_no_jaeger(runner: CliRunner, jaeger: FakeJaeger, answer: tuple[int, str], says: str) -> None:
    """Exit code 3, and what it said."""
    jaeger.scripted = [answer]
    result = ask(runner, jaeger)
    assert result.exit_code == 3
    assert says in result.stderr


def test_nothing_listens(runner: CliRunner) -> None:
    """Exit code 3, and how to name another."""
    result, _ = invoke(runner, ["trace-check", TRACE, "--jaeger", "http://127.0.0.1:1"])
    assert result.exit_code == 3
    assert "No Jaeger answers at http://127.0.0.1:1: " in result.stderr
    assert "--jaeger URL names another" in result.stderr


@pytest.mark.parametrize("said", [b"", bytes.fromhex("000006040000000000000500004000")], ids=["nothing", "http2"])
def test_what_answers_speaks_no_http(runner: CliRunner, said: bytes) -> None:
    """A gRPC server says its settings, or closes the connection: somebody is there, but not at that port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                _ = connection.recv(65536)
                connection.sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        where = f"http://127.0.0.1:{listening.getsockname()[1]}"
        result, _ = invoke(runner, ["trace-check", TRACE, "--jaeger", where])
        answering.join()
    assert result.exit_code == 3
    assert f"Something answers at {where}, but does not speak HTTP/1.1: " in result.stderr
    assert "16686" in result.stderr


def test_a_terminal_without_unicode(jaeger: FakeJaeger) -> None:
    """The tree is drawn with what there is."""
    jaeger.scripted = [stored()]
    result = ask(CliRunner(charset="ascii"), jaeger)
    assert result.exit_code == 0
    assert "`- RunBatch  2 items, completed" in result.stdout
    assert "|#####" in result.stdout
