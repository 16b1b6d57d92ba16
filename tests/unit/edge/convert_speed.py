"""How fast messages are converted, on one core: `python -m tests.unit.edge.convert_speed` prints a table.

Not a test: a machine that is busy with other things would fail it.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace

from tests.unit.edge.samples import COMPLETION, NOW_NS, RESULT
from unisono._generated.unisono.v1 import item_pb2 as it
from unisono.core import events, model
from unisono.core.errors import BackendBusyError, InvalidRequestError, Violation
from unisono.edge.contract import convert_in, convert_out
from unisono.edge.status import to_status

# Each is measured at least so long, three times; the fastest counts.
_SPAN_S = 0.2


def rate(action: Callable[[], object]) -> float:
    """Calls a second."""
    best = 0.0
    for _ in range(3):
        calls, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < _SPAN_S:
            for _ in range(10):
                action()
            calls += 10
        best = max(best, calls / spent)
    return best


def main() -> None:
    """Prints the table."""
    small = it.Item(
        item_id="item-1", chat=it.ChatRequest(messages=[it.Message(role=it.ROLE_USER, content="What is 2 + 2?")])
    )
    large = it.Item(
        item_id="item-1",
        model="m",
        options=it.Options(temperature=0.7, num_predict=80, stop=["\n"], runner=it.RunnerOptions(num_ctx=4096)),
        chat=it.ChatRequest(messages=[it.Message(role=it.ROLE_USER, content="x" * 500)] * 20),
    )
    answer = model.Completion(model="m", content="It is 4. " * 20, finish_reason=model.FinishReason.STOP)
    result = events.Journalled(sequence=1, at_ns=NOW_NS, event=replace(RESULT, completion=answer))
    vector = replace(COMPLETION, embeddings=(array("f", [0.1] * 1024),))
    embedded = events.Journalled(sequence=1, at_ns=NOW_NS, event=replace(RESULT, completion=vector))
    delta = events.Delta(
        item_id="item-1", index=1, attempt=1, content_offset=9, content=" four", thinking_offset=0, thinking=""
    )
    deltas = events.Deltas(items=(delta,) * 100)
    wrong = InvalidRequestError(
        "bad", violations=[Violation(field=f"f{i}", description="x" * 60) for i in range(100)]
    )
    rows: list[tuple[str, Callable[[], object]]] = [
        ("items in: one message", lambda: convert_in.item(small)),
        ("items in: twenty messages, options", lambda: convert_in.item(large)),
        ("results out: a short answer", lambda: convert_out.batch_event(result, 0)),
        ("results out: a vector of 1,024", lambda: convert_out.batch_event(embedded, 0)),
        ("deltas out: a hundred items an event", lambda: convert_out.batch_event(deltas, 0)),
        ("errors: a reason", lambda: to_status(BackendBusyError("full"))),
        ("errors: a hundred violations", lambda: to_status(wrong)),
    ]
    for name, action in rows:
        sys.stdout.write(f"{name:38} {rate(action):>10,.0f} a second\n")


if __name__ == "__main__":
    main()
