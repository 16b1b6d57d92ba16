"""What was added to a batch, sent, acknowledged and answered: the client's half of StreamBatch. No clock, no I/O.

Theory of operation. What the caller adds goes through three places:

1. `_unsent`   items, releases and cancels, in the caller's order, as far as the credit goes no further than this;
2. `_unacked`  what was sent, until the service says that it has it. After a lost connection all of it goes back to
               `_unsent`, in its order: the service acknowledges again what it has, and takes what it has not;
3. `_open`     items that the service has, until their results come.

Events carry numbers without gaps. One that came before is passed over, so nothing is told twice; the stream is
reopened after the last that came, so nothing is missed.

A release or a cancel has no acknowledgement: it has arrived when an item behind it was acknowledged, and is sent
again until then, which does no harm: it follows the same items again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client._generated.unisono.v1 import event_pb2, item_pb2
from unisono_client.errors import DOMAIN, item_error
from unisono_client.results import Report, Result, joined

# Items, and bytes of them, in one message: the service acknowledges up to 500 at once, and messages of some 100 KiB
# let others' pass between them.
_ITEMS_A_MESSAGE: Final = 250
_BYTES_A_MESSAGE: Final = 256 * 1024
# The service receives messages of up to 32 MiB; an item goes into one, with some room around it.
_MAX_ITEM_BYTES: Final = 32 * 1024 * 1024 - 64 * 1024
# More answers than this are not given; such an item fails as one.
_MAX_VARIANTS: Final = 64
# Once one item is refused for this, all that follow would be.
_FINAL: Final = frozenset({"BATCH_FULL", "INPUT_CLOSED"})


@dataclass(slots=True, eq=False)
class _Entry:
    """What a caller added: an item, or a word about those before it."""

    # One of the two; neither, once an item is acknowledged.
    item: item_pb2.Item | None = None
    word: pb.StreamBatchRequest | None = None
    # The item's place among those added, and its bytes.
    place: int = 0
    size: int = 0
    # How many answers it will have, each of which takes credit, and how many of them are acknowledged.
    weight: int = 0
    acknowledged: int = 0


@dataclass(slots=True)
class Heard:
    """What a message of the service's came to."""

    results: list[Result] = field(default_factory=list)
    # Bytes that came, about as many as the results take.
    size_bytes: int = 0


class ProtocolError(Exception):
    """The service sent what it may not; the stream is not to be trusted, and is opened anew."""


class Ledger:
    """One batch."""

    def __init__(self, config: pb.BatchConfig, wake: Callable[[], None], *, releases_itself: bool) -> None:
        """`wake` is called when there may be something to send.

        `releases_itself`: items are released whenever no more can be sent at the moment.
        """
        self._config = config
        self._wake = wake
        self._releases_itself = releases_itself
        self.batch_id = ""
        self.last_sequence = 0
        # Set when the batch has ended.
        self.report: Report | None = None
        # Whether the caller adds no more.
        self.is_closed = False
        # Results that are still to come, each item counted once for each of its answers.
        self.outstanding = 0
        # Items that were added.
        self.added = 0
        self._unsent: deque[_Entry] = deque()
        self._unacked: deque[_Entry] = deque()
        # The ids that were ever used; of those whose result is still to come, the items.
        self._used: set[str] = set()
        self._open: dict[str, _Entry] = {}
        # What takes credit: an item counts once for each of its answers.
        self._ended = 0
        self._accepted = 0
        self._sent = 0
        self._credit = 0
        # Items in `_unacked`, which has words as well.
        self._unacked_items = 0
        self._is_release_due = False
        # Whether the service was told, on this connection, that no more will come.
        self.is_half_closed = False
        self._last_refusal: status_pb2.Status | None = None
        self._parts: list[event_pb2.ResultPart] = []

    # -- What the caller does ------------------------------------------------------------------------------

    def add(self, item: item_pb2.Item) -> Result | None:
        """Takes an item; its result at once where its id is in use, or no more are taken."""
        place = self.added
        self.added += 1
        ids = result_ids(item)
        if item.item_id in self._used or not self._used.isdisjoint(ids):
            return _refused(item.item_id, place, refusal("DUPLICATE_ITEM", f"{item.item_id!r} was added before"))
        if self._last_refusal is not None or self.report is not None:
            closed = refusal("INPUT_CLOSED", "the batch has ended, and takes no more items")
            return _refused(item.item_id, place, self._last_refusal or closed)
        self._used.update((item.item_id, *ids))
        size = item.ByteSize()
        if size > _MAX_ITEM_BYTES:
            large = f"takes {size:,} bytes, and a message at most {_MAX_ITEM_BYTES:,}"
            return _refused(item.item_id, place, refusal("LIMIT_EXCEEDED", large))
        entry = _Entry(item=item, place=place, size=size, weight=len(ids))
        self._open.update(dict.fromkeys(ids, entry))
        self.outstanding += len(ids)
        self._unsent.append(entry)
        self._wake()
        return None

    def say(self, word: pb.StreamBatchRequest) -> None:
        """Takes a release or a cancel, which stands behind what was added before."""
        self._unsent.append(_Entry(word=word))
        self._wake()

    def close(self) -> None:
        """No more items will be added."""
        self.is_closed = True
        self._wake()

    @property
    def is_answered(self) -> bool:
        """Whether every result has come, and no more items will: nothing is missing but the report."""
        return self.is_closed and self.outstanding == 0 and not self._unsent

    @property
    def unsent(self) -> int:
        """Items, releases and cancels that were added and not yet sent."""
        return len(self._unsent)

    # -- What is sent --------------------------------------------------------------------------------------

    def open(self) -> pb.StreamBatchRequest:
        """The first message of a connection; what the service has not acknowledged will be sent again behind it."""
        for entry in self._unacked:
            entry.acknowledged = 0
        self._unsent.extendleft(reversed(self._unacked))
        self._unacked.clear()
        self._unacked_items = 0
        self._sent = self._accepted
        self._is_release_due = self.outstanding > 0
        self.is_half_closed = False
        if not self.batch_id:
            # The same request_id joins the same batch, if the one before arrived; from its first event on.
            opened = pb.StreamBatchOpen(config=self._config)
        else:
            reopen = pb.ReopenBatch(batch_id=self.batch_id, after_sequence=self.last_sequence)
            opened = pb.StreamBatchOpen(reopen=reopen)
        return pb.StreamBatchRequest(open=opened)

    def next(self) -> pb.StreamBatchRequest | None:
        """What is to be sent now; None: nothing before something happens, or the end, see `is_to_half_close`."""
        if self._unsent and (word := self._unsent[0].word) is not None:
            entry = self._unsent.popleft()
            if not self._unacked or self._unacked[-1].word != word:
                self._unacked.append(entry)
            return word
        request, size = pb.StreamBatchRequest(), 0
        items = request.add_items.items
        while self._unsent and len(items) < _ITEMS_A_MESSAGE:
            entry = self._unsent[0]
            if entry.item is None or not self._is_within_credit(entry):
                break
            if items and size + entry.size > _BYTES_A_MESSAGE:
                break
            items.append(entry.item)
            size += entry.size
            self._sent += entry.weight
            self._unacked_items += 1
            self._unacked.append(self._unsent.popleft())
        if items:
            self._is_release_due = self._releases_itself
            return request
        if self._is_release_due and self._releases_itself:
            self._is_release_due = False
            return pb.StreamBatchRequest(release=pb.Release())
        return None

    def is_to_half_close(self) -> bool:
        """Whether all was sent and no more will come; true once for each connection."""
        if self.is_half_closed or not self.is_closed or self._unsent:
            return False
        self.is_half_closed = True
        return True

    def _is_within_credit(self, entry: _Entry) -> bool:
        if self._sent + entry.weight <= self._credit:
            return True
        # Nothing runs whose end could bring more credit. The service says what is wrong: the batch is full, or the
        # item asks for more answers than it gives credit for.
        return self._credit > 0 and not self._unacked_items and self._ended == self._accepted

    # -- What is heard -------------------------------------------------------------------------------------

    def hear(self, response: pb.StreamBatchResponse) -> Heard:
        """Takes a message of the service's. Raises ProtocolError."""
        heard = Heard()
        match response.WhichOneof("message"):
            case "event":
                self._hear_event(response.event, heard)
            case "items_acknowledged":
                for ack in response.items_acknowledged.items:
                    heard.results.extend(self._hear_ack(ack))
                self._wake()
            case "credit":
                self._credit = max(self._credit, response.credit.total_items)
                self._wake()
            case _:
                pass  # of a later version of the contract
        return heard

    def _hear_event(self, event: event_pb2.BatchEvent, heard: Heard) -> None:
        if event.HasField("sequence"):
            if event.sequence <= self.last_sequence:
                return
            if event.sequence != self.last_sequence + 1:
                raise ProtocolError(f"event {event.sequence} came after {self.last_sequence}")
            self.last_sequence = event.sequence
        match event.WhichOneof("event"):
            case "accepted":
                self.batch_id = event.accepted.batch_id
            case "result_part":
                self._parts.append(event.result_part)
            case "result":
                heard.size_bytes = event.ByteSize() + sum(part.ByteSize() for part in self._parts)
                result = joined(self._parts, event.result)
                self._parts = []
                entry = self._open.pop(result.item_id, None)
                if entry is None:
                    raise ProtocolError(f"a result of {result.item_id!r} came, which has none to come")
                self._ended += 1
                self.outstanding -= 1
                heard.results.append(Result(result, entry.place, entry.weight))
                self._wake()
            case "summary":
                self.report = Report(event.summary)
                heard.results.extend(self._refuse_rest())
            case _:
                pass

    def _hear_ack(self, ack: pb.ItemAcknowledged) -> Iterator[Result]:
        entry = self._head(ack.item_id)
        if entry.item is None:
            raise ProtocolError(f"{ack.item_id!r} was acknowledged, and is not expected to be")
        if not ack.HasField("refusal"):
            entry.acknowledged += 1
            if entry.weight > 1 and ack.item_id == entry.item.item_id:
                self._make_single(entry)
            if entry.acknowledged == entry.weight:
                self._accepted += entry.weight
                self._unacked_items -= 1
                _ = self._unacked.popleft()
                # The service has it now; nothing of it is needed here any more.
                entry.item = None
            return
        _ = self._unacked.popleft()
        self._unacked_items -= 1
        self._sent -= entry.weight
        yield from self._refuse([entry], ack.refusal)
        if item_error(ack.refusal).reason in _FINAL:
            self._last_refusal = ack.refusal
            waiting, self._unsent = self._unsent, deque(each for each in self._unsent if each.item is None)
            yield from self._refuse(waiting, ack.refusal)

    def _make_single(self, entry: _Entry) -> None:
        """An item that asked for several answers, and is one item all the same: its `n` is what is wrong with it."""
        if entry.item is not None and self._open.keys() >= set(result_ids(entry.item)):
            for each in result_ids(entry.item):
                del self._open[each]
            self._open[entry.item.item_id] = entry
            self.outstanding -= entry.weight - 1
        self._sent -= entry.weight - 1
        entry.weight = 1

    def _head(self, item_id: str) -> _Entry:
        """What is acknowledged: the first item that is not yet; words before it have arrived as well."""
        while self._unacked:
            entry = self._unacked[0]
            if entry.item is not None:
                return entry if item_id == entry.item.item_id or item_id in result_ids(entry.item) else _Entry()
            _ = self._unacked.popleft()
        return _Entry()

    def _refuse(self, entries: Iterable[_Entry], why: status_pb2.Status) -> Iterator[Result]:
        """The results of items that are not taken."""
        for entry in entries:
            ids = () if entry.item is None else result_ids(entry.item)
            # Those that have their results were taken; only word of that was lost.
            if entry.item is not None and all(self._open.pop(each, None) is not None for each in ids):
                self.outstanding -= entry.weight
                yield _refused(entry.item.item_id, entry.place, why)

    def _refuse_rest(self) -> list[Result]:
        """The results of what the batch, which has ended, never took."""
        closed = refusal("INPUT_CLOSED", "the batch ended before it took the item")
        rest = [*self._unacked, *self._unsent]
        self._unacked.clear()
        self._unsent.clear()
        return list(self._refuse(rest, self._last_refusal or closed))


def result_ids(item: item_pb2.Item) -> Sequence[str]:
    """The ids under which an item's results come."""
    if not 1 < item.n <= _MAX_VARIANTS:
        return (item.item_id,)
    return [f"{item.item_id}#{number}" for number in range(1, item.n + 1)]


def _refused(item_id: str, place: int, why: status_pb2.Status) -> Result:
    return Result(event_pb2.Result(item_id=item_id, error=why), place)


def refusal(reason: str, message: str) -> status_pb2.Status:
    """A refusal of the client's own, made like one of the service's."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    return status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message, details=[detail])
