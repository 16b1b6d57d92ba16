"""The client's half of a stream, without a service: credit, acknowledgements, what is sent again, what is told."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from unisono_client import State
from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client._generated.unisono.v1 import event_pb2, item_pb2
from unisono_client.ledger import Ledger, ProtocolError


def item(item_id: str, n: int | None = None) -> item_pb2.Item:
    """An item; what it asks is of no account here."""
    return item_pb2.Item(item_id=item_id, n=n)


class Line:
    """A ledger with a service's voice."""

    def __init__(self, *, releases_itself: bool = False) -> None:
        self.ledger = Ledger(pb.BatchConfig(request_id="r"), lambda: None, releases_itself=releases_itself)
        self.sequence = 0

    def accepted(self, credit: int = 100) -> Line:
        """The service's first words."""
        _ = self.ledger.open()
        _ = self.event(accepted=event_pb2.Accepted(batch_id="b"))
        return self.credit(credit)

    def credit(self, total: int) -> Line:
        """So much credit."""
        _ = self.ledger.hear(pb.StreamBatchResponse(credit=pb.Credit(total_items=total)))
        return self

    def event(self, **kind: object) -> list[str]:
        """A lasting event; the ids of the results that it comes to."""
        self.sequence += 1
        event = event_pb2.BatchEvent(sequence=self.sequence, **kind)  # type: ignore[arg-type]
        return [
            f"{each.item_id} {each.state}" for each in self.ledger.hear(pb.StreamBatchResponse(event=event)).results
        ]

    def result(self, *item_ids: str) -> list[str]:
        """Results; what they come to."""
        state = event_pb2.ITEM_STATE_COMPLETED
        return [told for each in item_ids for told in self.event(result=event_pb2.Result(item_id=each, state=state))]

    def ack(self, *item_ids: str, refusal: str = "") -> list[str]:
        """Acknowledgements; the refused items that they come to."""
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=refusal, domain="unisono.dev"))
        why = status_pb2.Status(code=code_pb2.ALREADY_EXISTS, details=[detail]) if refusal else None
        entries = [pb.ItemAcknowledged(item_id=each, index=None if refusal else 0, refusal=why) for each in item_ids]
        said = pb.StreamBatchResponse(items_acknowledged=pb.ItemsAcknowledged(items=entries))
        return [f"{each.item_id} {each.state}" for each in self.ledger.hear(said).results]

    def sent(self) -> list[str]:
        """All that goes out now, in words."""
        words: list[str] = []
        while (message := self.ledger.next()) is not None:
            kind = message.WhichOneof("message") or ""
            words += [each.item_id for each in message.add_items.items] if kind == "add_items" else [kind]
        return [*words, "half-close"] if self.ledger.is_to_half_close() else words


def test_nothing_goes_before_there_is_credit_and_no_more_than_it_allows() -> None:
    """Items wait for credit; words behind them wait with them; each result is told once."""
    line = Line()
    assert line.ledger.open().open.config.request_id == "r"
    for each in ("a", "b", "c"):
        assert line.ledger.add(item(each)) is None
    line.ledger.say(pb.StreamBatchRequest(release=pb.Release()))
    line.ledger.close()
    assert line.sent() == []
    _ = line.event(accepted=event_pb2.Accepted(batch_id="b"))
    assert line.credit(2).sent() == ["a", "b"]
    assert line.ack("a", "b") == []
    assert line.sent() == []
    assert line.result("b") == ["b COMPLETED"]
    assert line.credit(3).sent() == ["c", "release", "half-close"]
    assert line.ledger.outstanding == 2
    assert line.ack("c") == []
    assert line.result("a", "c") == ["a COMPLETED", "c COMPLETED"]
    assert line.ledger.is_answered
    assert line.event(summary=event_pb2.Summary(state=event_pb2.BATCH_STATE_COMPLETED)) == []
    assert line.ledger.report is not None


def test_after_a_lost_connection_what_was_not_acknowledged_goes_again() -> None:
    """In its order, words among it; an item of which some answers were acknowledged goes again whole."""
    line = Line().accepted()
    _ = [line.ledger.add(item(each, n)) for each, n in (("a", None), ("b", 3), ("c", None))]
    line.ledger.say(pb.StreamBatchRequest(release=pb.Release()))
    _ = line.ledger.add(item("d"))
    line.ledger.close()
    assert line.sent() == ["a", "b", "c", "release", "d", "half-close"]
    _ = line.ack("a", "b#1", "b#2")
    reopened = line.ledger.open().open.reopen
    assert (reopened.batch_id, reopened.after_sequence) == ("b", 1)
    assert line.sent() == ["b", "c", "release", "d", "half-close"]
    # Results may come before they are acknowledged again, and the end as well: nothing is refused then.
    assert line.result("c", "a") == ["c COMPLETED", "a COMPLETED"]
    _ = line.ack("b#1", "b#2", "b#3", "c")
    _ = line.ledger.open()
    # A word has arrived when something behind it has; until then it goes again.
    assert line.sent() == ["release", "d", "half-close"]
    assert line.result("b#1", "b#2", "b#3", "d") == [f"{each} COMPLETED" for each in ("b#1", "b#2", "b#3", "d")]
    assert line.event(summary=event_pb2.Summary()) == []


def test_events_are_told_once_and_none_is_missed() -> None:
    """One that came before is passed over; a gap, or a result of nobody, makes the stream start anew."""
    line = Line().accepted()
    _ = line.ledger.add(item("a"))
    _ = line.sent()
    assert line.result("a") == ["a COMPLETED"]
    line.sequence -= 1
    assert line.result("a") == []
    line.sequence += 1
    with pytest.raises(ProtocolError):
        _ = line.result("a")
    line.sequence -= 2
    with pytest.raises(ProtocolError):
        _ = line.result("nobody")
    with pytest.raises(ProtocolError):
        _ = line.ack("nobody")


def test_refusals_give_credit_back_and_final_ones_end_the_rest() -> None:
    """A refused item is told as REFUSED; BATCH_FULL and INPUT_CLOSED are told of all that would follow."""
    line = Line().accepted(credit=2)
    _ = [line.ledger.add(item(each)) for each in "abcde"]
    assert line.sent() == ["a", "b"]
    assert line.ack("a", refusal="INVALID_REQUEST") == ["a REFUSED"]
    assert line.sent() == ["c"]
    assert line.ack("b", refusal="BATCH_FULL") == ["b REFUSED", "d REFUSED", "e REFUSED"]
    _ = line.ack("c")
    later = line.ledger.add(item("f"))
    assert later is not None
    assert later.error is not None
    assert (later.state, later.error.reason) == (State.REFUSED, "BATCH_FULL")
    assert line.ledger.outstanding == 1


def test_an_item_that_no_credit_will_ever_cover_is_sent_once_nothing_runs() -> None:
    """The service says why it does not take it, and nobody waits for ever."""
    line = Line().accepted(credit=4)
    _ = line.ledger.add(item("a"))
    _ = line.ledger.add(item("many", 9))
    assert line.sent() == ["a"]
    _ = line.ack("a")
    assert line.sent() == []
    _ = line.result("a")
    assert line.sent() == ["many"]
    assert line.ack("many", refusal="CREDIT_EXCEEDED") == ["many REFUSED"]


def test_an_item_that_asks_for_several_answers_in_vain_is_one() -> None:
    """What is wrong with `n` makes it one item that fails: one acknowledgement and one result, under its own id."""
    line = Line().accepted()
    _ = line.ledger.add(item("a", 3))
    _ = line.sent()
    _ = line.ack("a")
    assert line.ledger.outstanding == 1
    assert line.result("a") == ["a COMPLETED"]
    assert line.ledger.outstanding == 0


def test_ids_are_used_once() -> None:
    """Also where an answer of an item is called like another item; and after the end nothing is taken."""
    line = Line().accepted()
    assert line.ledger.add(item("a", 2)) is None
    for taken in ("a", "a#1"):
        refused = line.ledger.add(item(taken))
        assert refused is not None
        assert refused.error is not None
        assert refused.error.reason == "DUPLICATE_ITEM"
    assert line.event(summary=event_pb2.Summary()) == ["a REFUSED"]
    late = line.ledger.add(item("b"))
    assert late is not None
    assert late.error is not None
    assert late.error.reason == "INPUT_CLOSED"


def test_items_are_released_when_no_more_can_be_sent() -> None:
    """With `releases_itself`: once for each time that the credit or the items are used up, and on each connection."""
    line = Line(releases_itself=True).accepted(credit=2)
    _ = [line.ledger.add(item(each)) for each in "abc"]
    assert line.sent() == ["a", "b", "release"]
    assert line.sent() == []
    _ = line.ack("a")
    assert line.credit(3).sent() == ["c", "release"]
    _ = line.ledger.open()
    assert line.sent() == ["b", "c", "release"]


def test_messages_are_bounded() -> None:
    """A message has few items, or few bytes, or one item; what no message can hold is refused as a value."""
    line = Line().accepted(credit=10_000)
    for n in range(600):
        _ = line.ledger.add(item(f"i{n}"))
    for n in range(3):
        large = item(f"large{n}")
        large.generate.prompt = "x" * 200_000
        _ = line.ledger.add(large)
    sent: list[int] = []
    while (message := line.ledger.next()) is not None:
        sent.append(len(message.add_items.items))
        assert message.ByteSize() <= 300_000
    assert sent == [250, 250, 101, 1, 1]
    too_large = item("too large")
    too_large.generate.images.extend([bytes(2**24)] * 2)
    refused = line.ledger.add(too_large)
    assert refused is not None
    assert refused.error is not None
    assert refused.error.reason == "LIMIT_EXCEEDED"


def test_an_item_is_kept_until_it_is_acknowledged() -> None:
    """Then nothing of what was asked is in memory here."""
    line = Line().accepted()
    _ = line.ledger.add(item("a"))
    assert line.sent() == ["a"]
    assert line.ledger._open["a"].item is not None
    _ = line.ack("a")
    assert line.ledger._open["a"].item is None
