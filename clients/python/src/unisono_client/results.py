"""What comes back: one `Result` for each item, and at the end of a batch its `Report`.

A result is a view of the contract's own message, which `proto` has: its properties are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from google.protobuf import duration_pb2

from unisono_client._generated.unisono.v1 import event_pb2, item_pb2
from unisono_client.errors import ItemError, item_error
from unisono_client.items import ToolCall


class State(StrEnum):
    """How an item ended."""

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    # The service did not take it: it is no part of the batch.
    REFUSED = "REFUSED"


_STATES: Final = {
    event_pb2.ITEM_STATE_UNSPECIFIED: State.REFUSED,
    event_pb2.ITEM_STATE_COMPLETED: State.COMPLETED,
    event_pb2.ITEM_STATE_FAILED: State.FAILED,
    event_pb2.ITEM_STATE_CANCELLED: State.CANCELLED,
    event_pb2.ITEM_STATE_EXPIRED: State.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one item."""

    prompt_tokens: int
    # None where the backend does not say.
    cached_prompt_tokens: int | None
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where an item's time went; None where it was not measured. See the contract's `Timings`."""

    queued: timedelta | None
    slot_wait: timedelta | None
    load: timedelta | None
    prompt_eval: timedelta | None
    eval: timedelta | None
    first_token: timedelta | None
    total: timedelta | None


class Result:
    """What became of an item."""

    __slots__ = ("answers", "place", "proto")

    def __init__(self, proto: event_pb2.Result, place: int, answers: int = 1) -> None:
        # The contract's own message, whole: parts are put together.
        self.proto = proto
        # Which of the items that were given this is of, from 0: also for one that was refused.
        self.place = place
        # How many results that item has in all.
        self.answers = answers

    @property
    def item_id(self) -> str:
        """The item; for one of several answers "ID#1", "ID#2" and so on."""
        return self.proto.item_id

    @property
    def variant_of(self) -> str:
        """For one of several answers of an item: the item's own id."""
        return self.proto.variant_of

    @property
    def index(self) -> int:
        """Its place among the items that the service accepted, from 0."""
        return self.proto.index

    @property
    def state(self) -> State:
        """How it ended."""
        return _STATES[self.proto.state]

    @property
    def is_completed(self) -> bool:
        """Whether there is an answer."""
        return self.proto.state == event_pb2.ITEM_STATE_COMPLETED

    @property
    def error(self) -> ItemError | None:
        """Why there is no answer; None where there is one."""
        return item_error(self.proto.error) if self.proto.HasField("error") else None

    def raise_for_error(self) -> Result:
        """This result; raises its ItemError where there is no answer."""
        if (error := self.error) is not None:
            raise error
        return self

    @property
    def content(self) -> str:
        """The text of the answer; "" where there is none."""
        return self.proto.completion.content

    @property
    def thinking(self) -> str:
        """What the model thought first."""
        return self.proto.completion.thinking

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that the model makes; raises ValueError where their arguments are no JSON."""
        calls = self.proto.completion.tool_calls
        return [ToolCall(each.name, json.loads(each.arguments_json or "{}"), each.id) for each in calls]

    @property
    def model(self) -> str:
        """The model that answered, as the backend names it."""
        return self.proto.completion.model

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "STOP", "LENGTH", "TOOL_CALLS" or "EMBEDDED"; the backend's own word else."""
        reason = self.proto.completion.finish_reason
        if reason == item_pb2.FINISH_REASON_UNSPECIFIED:
            return self.proto.completion.finish_reason_raw
        return item_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_")

    @property
    def embeddings(self) -> list[Sequence[float]]:
        """One vector for each text."""
        return [each.values for each in self.proto.completion.embeddings]

    @property
    def usage(self) -> Usage | None:
        """Tokens; None where nothing was computed."""
        if not self.proto.HasField("usage"):
            return None
        usage = self.proto.usage
        cached = usage.cached_prompt_tokens if usage.HasField("cached_prompt_tokens") else None
        return Usage(usage.prompt_tokens, cached, usage.completion_tokens)

    @property
    def timings(self) -> Timings:
        """Where the time went."""
        given = self.proto.timings
        return Timings(**{name: _span(getattr(given, name)) if given.HasField(name) else None for name in _TIMINGS})

    @property
    def attempts(self) -> int:
        """How often it was sent to a backend."""
        return self.proto.attempts

    @property
    def shared_with(self) -> int:
        """How many other items shared at least one of its forward passes."""
        return self.proto.shared_with

    @property
    def passes(self) -> int:
        """In how many forward passes it took part."""
        return self.proto.passes

    def __repr__(self) -> str:
        what = self.content if self.is_completed else self.error
        text = f"{what!r}" if isinstance(what, str) else str(what)
        return f"<Result {self.item_id!r} {self.state}: {text if len(text) <= 60 else text[:59] + '…'}>"


_TIMINGS: Final = ("queued", "slot_wait", "load", "prompt_eval", "eval", "first_token", "total")


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of an item as it is generated: what came since the last one."""

    item_id: str
    # The attempt that speaks, from 1; a new one begins its text anew.
    attempt: int
    content: str
    thinking: str


class Report:
    """The figures of a batch."""

    __slots__ = ("proto",)

    def __init__(self, proto: event_pb2.Summary) -> None:
        # The contract's own message.
        self.proto = proto

    @property
    def batch_id(self) -> str:
        """The batch."""
        return self.proto.report.batch_id

    @property
    def state(self) -> str:
        """How it ended: "COMPLETED", "CANCELLED" or "EXPIRED"."""
        return event_pb2.BatchState.Name(self.proto.state).removeprefix("BATCH_STATE_")

    @property
    def error(self) -> ItemError | None:
        """Why it was cut short; None where it was not."""
        return item_error(self.proto.error) if self.proto.HasField("error") else None

    @property
    def duration(self) -> timedelta:
        """From its acceptance to its end."""
        return _span(self.proto.report.duration)

    @property
    def completed(self) -> int:
        """Items that were answered."""
        return self.proto.report.counts.completed

    @property
    def failed(self) -> int:
        """Items that failed."""
        return self.proto.report.counts.failed

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return self.proto.report.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers."""
        return self.proto.report.completion_tokens

    @property
    def passes(self) -> int:
        """Forward passes of all groups."""
        return sum(group.passes.count for group in self.proto.report.groups)

    @property
    def gain(self) -> float | None:
        """How many times faster than one at a time, where it was measured; of several groups the least."""
        gains = [group.gain for group in self.proto.report.groups if group.HasField("gain")]
        return min(gains, default=None)


def joined(parts: Sequence[event_pb2.ResultPart], result: event_pb2.Result) -> event_pb2.Result:
    """A result with the parts that came before it in front of what it holds."""
    if not parts:
        return result
    whole = event_pb2.Result()
    whole.CopyFrom(result)
    done = whole.completion
    done.content = "".join(part.content for part in parts) + result.completion.content
    done.thinking = "".join(part.thinking for part in parts) + result.completion.thinking
    del done.embeddings[:], done.logprobs[:]
    for part in parts:
        done.embeddings.extend(part.embeddings)
        done.logprobs.extend(part.logprobs)
    done.embeddings.extend(result.completion.embeddings)
    done.logprobs.extend(result.completion.logprobs)
    return whole


def _span(value: duration_pb2.Duration) -> timedelta:
    return timedelta(microseconds=value.ToMicroseconds())
