"""One item on its way: what it has said so far, when what happened to it, and in the end its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.events import Result
from unisono.core.model import Completion, FinishReason, ItemState, Timings

if TYPE_CHECKING:
    from unisono.core.commands import ReleaseReason
    from unisono.core.errors import UnisonoError
    from unisono.core.model import Finished, Item, Spoke, TokenLogprob, ToolCall
    from unisono.core.passes import Part
    from unisono.core.prefixes import Prefix


@dataclass(slots=True)
class ItemRun:
    """An item that was accepted and has not ended."""

    item: Item
    # Its name at its backend's driver; None until it was planned.
    ticket: int | None = None
    # The group that it runs in; None until it was planned.
    group: int | None = None
    # When it was accepted, and when it was last released and first spoke; nanoseconds since 1970.
    accepted_ns: int = 0
    released_ns: int | None = None
    first_token_ns: int | None = None
    # When it last spoke in this attempt, by the backend's clock; None once that has broken off.
    heard_ns: int | None = None
    # The attempt that speaks, from 1.
    attempt: int = 0
    # What was said in this attempt, piece by piece; all in one piece once the item has ended.
    content: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    is_over: bool = False
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    answer: Finished | None = None
    # Characters of the last piece, for those who gather text.
    last_piece_bytes: int = 0
    # What it took part in, in its last attempt that spoke; None before.
    part: Part | None = None
    # What its prompt has in common with others', and why it was last released.
    prefix: Prefix | None = None
    release_reason: ReleaseReason | None = None
    # Items in its request, itself included.
    bundle_size: int = 1
    # Times that it was released in groups that it has left, and of these, broken off for another item's sake.
    earlier_attempts: int = 0
    earlier_disturbed: int = 0

    def start(self, attempt: int) -> None:
        """A new attempt begins, with nothing said."""
        self.attempt = attempt
        self.released_ns = self.first_token_ns = self.heard_ns = None
        for said in (self.content, self.thinking, self.tool_calls, self.logprobs):
            said.clear()
        self.answer = None

    def leave(self, *, attempts: int, disturbed: int) -> None:
        """It leaves its group, where it was released so often, and is to be planned anew."""
        self.ticket = self.group = self.prefix = self.part = None
        self.released_ns = None
        self.bundle_size = 1
        self.earlier_attempts += attempts
        self.earlier_disturbed += disturbed

    @property
    def earlier(self) -> int:
        """Attempts before those of its present group."""
        return self.earlier_attempts + self.earlier_disturbed

    @property
    def has_spoken(self) -> bool:
        """Whether there is text of this attempt."""
        return bool(self.content or self.thinking)

    def hear(self, piece: Spoke) -> None:
        """A piece of the answer."""
        self.last_piece_bytes = len(piece.content) + len(piece.thinking)
        if piece.content:
            self.content.append(piece.content)
        if piece.thinking:
            self.thinking.append(piece.thinking)
        self.tool_calls += piece.tool_calls
        self.logprobs += piece.logprobs

    def result(
        self, state: ItemState, *, error: UnisonoError | None, attempts: int, at_ns: int, disturbed: int = 0
    ) -> Result:
        """How it ended."""
        answer = self.answer if state is ItemState.COMPLETED else None
        attempts += self.earlier_attempts
        # Joined, so that a reader who has not been sent it all yet holds no more than the result does.
        self.content, self.thinking = ["".join(self.content)], ["".join(self.thinking)]
        self.is_over = True
        return Result(
            item_id=self.item.item_id,
            index=self.item.index,
            state=state,
            completion=self._completion(answer) if answer else None,
            error=error,
            usage=answer.usage if answer else None,
            timings=self._timings(at_ns) if attempts else None,
            attempts=attempts,
            shared_with=self.part.shared_with if self.part else 0,
            passes=(self.part.passes or 0) if self.part else 0,
            group=self.group,
            variant_of=self.item.variant_of,
            release_reason=self.release_reason,
            disturbed=disturbed + self.earlier_disturbed,
            bundle_size=self.bundle_size,
            waited_s=_between(self.accepted_ns, at_ns if self.released_ns is None else self.released_ns),
        )

    def _completion(self, answer: Finished) -> Completion:
        reason = FinishReason.TOOL_CALLS if self.tool_calls else answer.finish_reason
        return Completion(
            model=answer.model,
            content=self.content[0],
            thinking=self.thinking[0],
            tool_calls=tuple(self.tool_calls),
            finish_reason=reason,
            finish_reason_raw=answer.finish_reason_raw,
            logprobs=tuple(self.logprobs),
            embeddings=answer.embeddings,
        )

    def _timings(self, at_ns: int) -> Timings:
        said = self.answer.durations if self.answer else None
        released, first = self.released_ns, self.first_token_ns
        return Timings(
            queued_s=_between(self.accepted_ns, released),
            slot_wait_s=said.slot_wait_s if said else None,
            load_s=said.load_s if said else None,
            prompt_eval_s=said.prompt_eval_s if said else None,
            eval_s=said.eval_s if said else None,
            first_token_s=_between(released, first),
            total_s=_between(released, at_ns),
        )


def _between(start_ns: int | None, end_ns: int | None) -> float | None:
    return None if start_ns is None or end_ns is None else max(0, end_ns - start_ns) / 1e9
