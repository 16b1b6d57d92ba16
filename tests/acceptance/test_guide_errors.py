"""When things go wrong: the guide has each reason with its code, and names nothing that is not there."""

from __future__ import annotations

import re

import pytest

from tests.fakes.ollama import FakeModel
from tests.guides import ROOT, code_in, section, table
from tests.integration.service import chat, chats, generate, house, reason_of, refused, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.config import Settings
from unisono.core import errors
from unisono.edge.status import TABLE

GUIDE = section("clients/README.md", "## When things go wrong")
ROWS = {code_in(row[0])[0]: row for row in table(GUIDE, "Reason")}
SYMPTOMS = table(GUIDE, "What one sees")


def kinds(kind: type[errors.UnisonoError]) -> set[type[errors.UnisonoError]]:
    """A class of errors and all below it, but for those that only group others."""
    own = set() if kind.__subclasses__() else {kind}
    return own.union(*(kinds(child) for child in kind.__subclasses__()))


def test_each_reason_has_a_row_with_its_code() -> None:
    """Exactly those that an error can carry, each with the code that goes with it."""
    assert {reason: code_in(row[1]) for reason, row in ROWS.items()} == {
        kind.reason: [TABLE[kind].code.name] for kind in kinds(errors.UnisonoError)
    }


@pytest.mark.parametrize("row", [*ROWS.values(), *SYMPTOMS], ids=lambda row: row[0])
def test_a_row_names_what_there_is(row: list[str]) -> None:
    """Each word between backticks is a variable, a field, an rpc, a command, or a key of an error's metadata."""
    assert all(row[1:]), "an empty cell"
    sources = "".join(path.read_text() for path in (ROOT / "service" / "unisono").rglob("[!_]*.py"))
    sources += "".join(path.read_text() for path in (ROOT / "clients" / "python" / "src").rglob("*.py"))
    for code in code_in(" ".join(row)):
        name = code.partition("=")[0]
        known = (
            name.removeprefix("UNISONO_").lower() in Settings.model_fields
            or name.startswith(("OLLAMA_", "OTEL_"))
            or any(code in (kind.reason, TABLE[kind].code.name) for kind in kinds(errors.UnisonoError))
            or name.rpartition(".")[2].partition("[")[0] in FIELDS
            or name in rpc.DESCRIPTOR.services_by_name["BatchInference"].methods_by_name
            or re.match(r"(unisono (doctor|trace-check)|ollama (serve|ps|pull)|grpcurl|-plaintext)\b", code)
            # What the report or the log says, a key of the metadata, a method of the client.
            or re.search(rf'"{re.escape(name.partition(":")[0])}\b', sources)
            or f"def {name}(" in sources
            or code in {"BadRequest", "RetryInfo", "ID#1", "model loaded once, in …"}
        )
        assert known, code


def test_the_words_of_the_contract_are_its_own() -> None:
    """What is written in capitals without backticks is a value of an enum."""
    values = {
        value.name
        for file in (rpc.DESCRIPTOR, event_pb2.DESCRIPTOR, item_pb2.DESCRIPTOR)
        for enum in file.enum_types_by_name.values()
        for value in enum.values
    }
    for row in ROWS.values():
        for word in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|\b[A-Z]{6,}\b", re.sub(r"`[^`]*`", "", " ".join(row))):
            # A link's text is another page's name.
            assert word == "README" or any(value.endswith(f"_{word}") for value in values), word


def fields_of(*files: object) -> set[str]:
    """The names of all fields of all messages."""
    found: set[str] = set()
    waiting = [message for file in files for message in file.message_types_by_name.values()]  # type: ignore[attr-defined]
    while waiting:
        message = waiting.pop()
        found |= {field.name for field in message.fields}
        waiting += message.nested_types
    return found


FIELDS = fields_of(rpc.DESCRIPTOR, event_pb2.DESCRIPTOR, item_pb2.DESCRIPTOR)


async def test_it_looks_as_the_guide_says() -> None:
    """Some of each place: the call, the item, the batch; with the metadata that the rows name."""
    async with house(models=[FakeModel(name="fake"), FakeModel(name="other")]) as h:
        wrong = await refused(h.run_batch([chat("a"), item_pb2.Item(item_id="b")]))
        assert (wrong.reason, wrong.fields) == ("INVALID_REQUEST", ["items[1].request"])
        gone = await refused(h.attach_batch("batch_gone"))
        assert gone.reason == "BATCH_NOT_FOUND"
        first = await h.run([chat("a")], request_id="mine")
        reused = await refused(h.run_batch([chat("b")], request_id="mine"))
        assert (reused.reason, reused.metadata["batch_id"]) == ("REQUEST_ID_REUSED", first.batch_id)
        beyond = await refused(h.attach_batch(first.batch_id, 1000))
        assert beyond.reason == "SEQUENCE_OUT_OF_RANGE"
        assert "last" in beyond.metadata
        together = await refused(h.run_batch(chats(99), co_scheduling=rpc.CO_SCHEDULING_REQUIRED))
        assert together.reason == "NOT_ENOUGH_SLOTS"

        no_model = await refused_item(h, chat("a"), model="")
        assert no_model.startswith("no model was named")
        long = await h.run([generate("a", "word " * 5000)])
        assert reason_of(long.results["a"]) == "PROMPT_TOO_LONG"
        h.fake.hold_passes()
        late = await h.run(chats(2), batch_deadline=span(0.2))
        h.fake.release_passes()
        assert {reason_of(result) for result in late.results.values()} == {"BATCH_DEADLINE"}
        assert late.summary.state == event_pb2.BATCH_STATE_EXPIRED


async def refused_item(h: object, item: item_pb2.Item, **config: str) -> str:
    """What is said of an item that finds no model."""
    seen = await h.run([item], **config)  # type: ignore[attr-defined]
    assert reason_of(seen.results[item.item_id]) == "MODEL_NOT_FOUND"
    return str(seen.results[item.item_id].error.message)
