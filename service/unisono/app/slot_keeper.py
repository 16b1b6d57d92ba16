"""What a driver knows of its runners' slots beside their arbiter: what is configured, what earlier runs learned."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from unisono.core.advice import forced_one_slot, why_one_slot
from unisono.core.capacity import Capacity, Held
from unisono.core.model import Slots, SlotSource, SlotState

if TYPE_CHECKING:
    from unisono.app.ports import Backend, SlotMemory
    from unisono.core.model import Finished, ModelInfo, RunnerSpec


class SlotKeeper:
    """Makes the capacities of one backend's runners, and remembers them."""

    def __init__(self, backend: Backend, *, configured: int | None, ceiling: int, memory: SlotMemory | None) -> None:
        self._backend = backend
        self._configured = configured
        self._ceiling = ceiling
        self._memory = memory

    def new(self, runner: RunnerSpec) -> Capacity:
        """What is known of a runner that had no work lately."""
        capacity = Capacity(configured=self._configured, ceiling=self._ceiling)
        memo = None
        if self._memory is not None:
            memo = self._memory.get(self._key(runner)) or self._memory.get(self._key_of_any(runner))
        if memo is not None:
            capacity.seed(memo.count, memo.at_least)
        return capacity

    def remember(self, runner: RunnerSpec, capacity: Capacity) -> None:
        """Keeps what there is to keep; called after every item, so it does nothing where nothing has changed."""
        memo = capacity.memory
        if self._memory is not None and memo is not None and memo != self._memory.get(key := self._key(runner)):
            self._memory.put(key, memo)
            self._memory.put(self._key_of_any(runner), memo)

    def state(self, runner: RunnerSpec, capacity: Capacity, model: ModelInfo | None) -> SlotState:
        """All that can be told; why there is, or will be, only one slot, where the model is said."""
        slots, limit = capacity.slots, capacity.limit
        one = None
        if model is not None and slots.count == 0:
            is_embedding = runner.is_embedding or model.is_embedding
            one = forced_one_slot(self._backend.kind, model.family, is_embedding=is_embedding)
            if one is not None and is_embedding:
                # Of these it is taken for certain; see `dispatch.py`.
                slots, limit = Slots(count=1, source=SlotSource.TOLD), 1
        elif model is not None:
            one = why_one_slot(runner, model, slots, kind=self._backend.kind)
        return SlotState(
            slots=slots,
            at_least=capacity.at_least,
            limit=limit,
            reason=one.reason if one is not None else "",
            remedy=one.remedy if one is not None else "",
        )

    def _key(self, runner: RunnerSpec) -> str:
        """What names a runner from one run of the service to the next; see SlotMemory."""
        options = {**asdict(runner.options), "shift": runner.shift, "embedding": runner.is_embedding or None}
        written = ",".join(f"{name}={value}" for name, value in options.items() if value is not None)
        return f"{self._backend.url} {runner.digest} {written}"

    def _key_of_any(self, runner: RunnerSpec) -> str:
        """Whatever its options: the number belongs to the server's settings and the model more than to these, and the
        context is often not the caller's choice but what the model happens to be loaded with.
        """
        return f"{self._backend.url} {runner.digest} any{' embedding' if runner.is_embedding else ''}"


def held_of(answer: Finished, oldest_s: float) -> Held | None:
    """When an item held its slot, by the backend's clock; None where the backend does not say.

    `oldest_s`: how long ago the oldest request was sent that is not answered yet (minus infinity: there is none). By
    the backend's clock the answer is a little older than its arrival here, so what is called settled is.
    """
    durations = answer.durations
    waited_s, eval_s, prompt_eval_s = durations.slot_wait_s, durations.eval_s, durations.prompt_eval_s
    if waited_s is None or eval_s is None or prompt_eval_s is None:
        return None
    end_s = answer.at_ns / 1e9
    return Held(
        start_s=end_s - eval_s - prompt_eval_s,
        end_s=end_s,
        waited_s=waited_s,
        spoke_s=end_s - eval_s,
        pass_s=eval_s / max(1, answer.usage.completion_tokens),
        settled_s=end_s - oldest_s,
    )
