"""Results are written as they finish or in the file's order, for programs or for a reader."""

import io
import json
import random
from pathlib import Path

import pytest
from google.protobuf import text_format
from rich.console import Console

from tests.unit.cli.fake_server import status
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.batchfile.line import Form
from unisono.edge.cli import outlets
from unisono.edge.cli.lines_in import Origin
from unisono.edge.cli.lines_out import Ended
from unisono.edge.cli.outlets import Answers, InOrder, JsonLines


def ended(position: int, text: str = 'completion { content: "x" }', item_id: str = "") -> Ended:
    """A result in text format."""
    result = text_format.Parse(f"state: ITEM_STATE_COMPLETED {text}", event_pb2.Result())
    origin = Origin(item_id=item_id or f"i{position}", position=position, line=position + 1, form=Form.PLAIN)
    return Ended(origin=origin, result=result, batch_id="b", time_s=7)


def test_order_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which results come, they go out in the file's, from memory or from a file."""
    monkeypatch.setattr(outlets, "_HELD_IN_MEMORY_BYTES", 2000)
    stream = io.BytesIO()
    outlet = InOrder(JsonLines(stream))
    positions = list(range(300))
    random.Random(5).shuffle(positions)
    for position in positions:
        outlet.put(ended(position, f'completion {{ content: "{"y" * position}" }}'))
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [each["index"] for each in written] == list(range(300))
    assert [len(each["content"]) for each in written] == list(range(300))
    outlet.close()


def test_results_go_out_as_soon_as_their_turn_comes() -> None:
    """And at the end those that waited for one that never came."""
    stream = io.BytesIO()
    outlet = InOrder(JsonLines(stream))
    outlet.put(ended(1))
    assert not stream.getvalue()
    outlet.put(ended(0))
    assert stream.getvalue().count(b"\n") == 2
    outlet.put(ended(5))
    outlet.put(ended(4))
    outlet.close()
    assert [json.loads(line)["index"] for line in stream.getvalue().splitlines()] == [0, 1, 4, 5]


def test_answers_for_a_reader() -> None:
    """Ids, wrapped text, figures, errors; nothing that a terminal would obey."""
    stream = io.StringIO()
    answers = Answers(Console(file=stream, width=40, highlight=False))
    answers.put(
        ended(
            0,
            """completion { content: "one two three four five six seven eight nine ten [bold]\\033[2J" thinking: "hm"
            tool_calls { name: "f" arguments_json: "{}" } finish_reason: FINISH_REASON_LENGTH }
            usage { completion_tokens: 9 } shared_with: 3""",
            "a\tb",
        )
    )
    answers.put(ended(1, "completion { embeddings { values: 1 values: 2 } } usage { prompt_tokens: 4 }"))
    failed = ended(2, "")
    failed.result.state = event_pb2.ITEM_STATE_EXPIRED
    failed.result.error.CopyFrom(status("QUEUE_TIMEOUT", "it waited too long"))
    answers.put(failed)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "● a b  9 tokens, passes shared with 3",
        "  hm",
        "  one two three four five six seven",
        "  eight nine ten [bold][2J",
        "  f({}) … (cut off: it reached its limit",
        "  of tokens)",
        "",
        "● i1  4 tokens read",
        "  1 vector of 2 numbers",
        "",
        "● i2  expired: QUEUE_TIMEOUT",
        "  it waited too long",
        "",
    ]


def test_a_file_keeps_what_it_held_until_there_is_a_result(tmp_path: Path) -> None:
    """A run that never gets an answer does not cost the answers of the one before."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"yesterday\n")
    with path.open("ab") as stream:
        outlet = JsonLines(stream, replaces=True)
        assert path.read_bytes() == b"yesterday\n"
        outlet.put(ended(0))
        outlet.put(ended(1))
        outlet.close()
    assert [json.loads(line)["index"] for line in path.read_bytes().splitlines()] == [0, 1]
