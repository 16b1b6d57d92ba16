"""What comes back of a batch is shown while it comes."""

import io

import pytest
from google.protobuf import text_format
from rich.console import Console

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.collector import Collector
from unisono.edge.cli.lines_in import LineReader
from unisono.edge.cli.outlets import JsonLines
from unisono.edge.cli.progress import Lines, Meter


@pytest.mark.parametrize(
    ("loading", "phase", "said"),
    [
        ("state: STATE_STARTED", "loading tiny", ""),
        ("state: STATE_LOADED duration { seconds: 2 }", "", "unisono: tiny is loaded (2.0 s)\n"),
        ("state: STATE_FAILED error { message: 'no memory' }", "", "unisono: tiny could not be loaded: no memory\n"),
    ],
)
def test_loading_is_told(loading: str, phase: str, said: str) -> None:
    """A model that is being loaded explains why nothing else happens."""
    meter, stream = Meter(), io.StringIO()
    display = Lines(meter, Console(file=stream))
    collector = Collector(reader=LineReader(), outlet=JsonLines(io.BytesIO()), meter=meter, display=display)
    for text in ('group_planned { group: 3 model: "tiny" }', f"loading {{ group: 3 {loading} }}"):
        collector.on_event(text_format.Parse(text, event_pb2.BatchEvent()))
    assert meter.phase == phase
    assert stream.getvalue() == said


def test_a_result_of_an_unknown_item_is_not_dropped() -> None:
    """What the service sends is written, even if it was never asked for."""
    meter, written = Meter(), io.BytesIO()
    display = Lines(meter, Console(file=io.StringIO()))
    collector = Collector(reader=LineReader(), outlet=JsonLines(written), meter=meter, display=display)
    event = 'result { item_id: "who" index: 4 state: ITEM_STATE_COMPLETED completion { content: "x" } }'
    collector.on_event(text_format.Parse(event, event_pb2.BatchEvent()))
    assert written.getvalue().startswith(b'{"id":"who","index":4,"state":"completed"')
