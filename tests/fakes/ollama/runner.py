"""A loaded model: its slots, the queue before them, and the forward passes.

How it works. A job waits in a FIFO (the weighted semaphore of llm/llama_server.go) for one of the slots. A slot
keeps the tokens of its last job; the part of a new prompt that begins like them is not computed again. One pass
gives one token to every slot that is decoding, and computes up to `n_batch` tokens in all; what the decoding
slots leave of it goes to the prompts that still have to be computed, slot by slot. The pass that computes a
prompt's last token also gives that job's first token. A job that ends by itself takes one more pass for its end
token; one that is cut by its length does not.

A model that drafts (`FakeModel.drafts`), loaded with a `draft_num_predict`, gives a decoding slot its token and those
drafted ones that are right in one pass: one line for each, written one right after the other, as llama.cpp's server
does and Ollama passes it on. All drafted tokens, right or not, take room in the pass.

The slots share one processor: a pass lasts `pass_s`, plus `member_s` for each sequence in it, plus
`prefill_token_s` for each prompt token computed in it, for everybody. Passes are callbacks of the event loop, one at
a time, so that with durations of 0 the loop still reads its sockets between two of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from tests.fakes.ollama.health import Pings
from tests.fakes.ollama.log import LiveRequest, PassRecord
from tests.fakes.ollama.wire import ApiError, WallClock

if TYPE_CHECKING:
    from tests.fakes.ollama.models import FakeModel, RunnerOptions

# llama.cpp, common.h, slot_prompt_similarity: a slot is chosen for its prefix only above this similarity.
SLOT_PROMPT_SIMILARITY = 0.1

# What Ollama answers when its runner died, by what the request was doing. All three were seen on a real server
# (the second and third are not among the recordings): decoding, computing its prompt, waiting for a slot.
DIED_DECODING = "an error was encountered while running the model: unexpected EOF"
DIED_PREFILLING = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    "check ollama server logs for details"
)
DIED_WAITING = "llama-server process no longer running: unknown "


class State(Enum):
    """Where a job stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


class Processor(Protocol):
    """What a runner needs to know from the server that it is part of."""

    pass_s: float
    member_s: float
    prefill_token_s: float
    prefix_cache: bool
    passes: int
    prompt_tokens_computed: int
    pass_log: list[PassRecord]
    clock: WallClock

    def may_pass(self) -> bool:
        """Whether the next pass may begin now; False holds it until Runner.kick()."""

    def changed(self) -> None:
        """Something happened that a test may wait for."""


class Job:
    """One sequence to compute: a prompt, and how many tokens follow it.

    `on_token(n)` is called for token n (0 is the first) in the pass that decodes it, `on_end()` once when the
    last pass is over or the runner has died (`error`). An embedding has no tokens.
    """

    __slots__ = (
        "answer_tokens",
        "cached",
        "computed",
        "crash_after",
        "decode_ns",
        "decoded",
        "done_ns",
        "error",
        "frozen",
        "is_embedding",
        "limit",
        "live",
        "on_end",
        "on_slot",
        "on_token",
        "prefill_ns",
        "prompt",
        "said",
        "slot",
        "state",
        "stops",
    )

    def __init__(
        self,
        live: LiveRequest,
        prompt: Sequence[str],
        answer_tokens: Sequence[str],
        *,
        stops: bool,
        on_token: Callable[[int], None],
        on_end: Callable[[], None],
        crash_after: int | None = None,
        is_embedding: bool = False,
    ) -> None:
        self.live = live
        self.prompt = prompt
        self.answer_tokens = answer_tokens
        self.limit = 0 if is_embedding else len(answer_tokens) + (1 if stops else 0)
        self.stops = stops
        self.on_slot: Callable[[], None] | None = None
        self.on_token = on_token
        self.on_end = on_end
        self.crash_after = crash_after
        self.is_embedding = is_embedding
        self.state = State.WAITING
        self.slot: Slot | None = None
        self.frozen = False
        self.error: ApiError | None = None
        self.cached = 0
        self.computed = 0  # tokens of the prompt that the slot holds
        self.said = 0  # tokens decoded, the end token included
        self.decoded = 0  # passes that it decoded in
        self.prefill_ns = 0
        self.decode_ns = 0
        self.done_ns = 0

    def is_in(self, state: State) -> bool:
        """Whether the job is in a state now; a listener that was just called may have changed it."""
        return self.state is state

    @property
    def prompt_eval_ns(self) -> int:
        """From the begin of the prompt's computation to the first token, in whole microseconds."""
        return max((self.decode_ns - self.prefill_ns) // 1000, 1) * 1000

    @property
    def eval_ns(self) -> int:
        """From the first token to the last, in whole microseconds, at least one."""
        return max((self.done_ns - self.decode_ns) // 1000, 1) * 1000


class Slot:
    """One of a runner's parallel sequences."""

    __slots__ = ("held", "job", "number", "used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.job: Job | None = None
        self.held: list[str] = []  # the tokens of the last sequence
        self.used = -1  # when it was last given up; -1: never


class Runner:
    """A model loaded with certain options."""

    def __init__(
        self,
        processor: Processor,
        number: int,
        model: FakeModel,
        options: RunnerOptions,
        *,
        slots: int,
        num_ctx: int,
        n_batch: int,
    ) -> None:
        self.number = number
        self.model = model
        self.options = options
        self.num_ctx = num_ctx
        self.n_batch = n_batch
        self.slots = [Slot(place) for place in range(slots)]
        self.waiting: deque[Job] = deque()
        self.drafted = options.draft_num_predict if model.drafts else 0  # tokens that it drafts for each pass
        self.dead = False
        self.refs = 0  # requests that hold it (server/sched.go, refCount)
        self.keep_alive_s = 0.0
        self.expires_at = 0.0  # on the loop's clock; meaningful while refs is 0
        self._processor = processor
        self._loop = asyncio.get_running_loop()
        self._passing = False  # a pass is under way, or about to begin
        self._uses = 0
        self._block: list[Job] = []  # the jobs whose prompts are being computed in this very pass
        self.pings = Pings()

    def submit(self, job: Job) -> None:
        """Put a job in the queue; it begins when a slot falls free."""
        if self.dead:
            self._end(job, ApiError(500, DIED_WAITING))
            return
        self.waiting.append(job)
        self._grant()
        self.kick()
        self._processor.changed()

    def cancel(self, job: Job) -> None:
        """The client is gone: free the slot at once, or in a prefill at the end of the current prompt block."""
        if job.state is State.ENDED:
            return
        if job.state is State.WAITING:
            job.state = State.ENDED
            if job in self.waiting:
                self.waiting.remove(job)
            self._processor.changed()
            return
        job.state = State.ENDED
        if job not in self._block:
            self._free(job)
            self._grant()
            self.kick()
        self._processor.changed()

    def freeze(self, job: Job, *, frozen: bool) -> None:
        """Keep a job in its slot without a token, or let it go on."""
        job.frozen = frozen
        if frozen or self.dead:
            return
        if job.state is State.DECODE and job.said >= job.limit:
            self._free(job)
            self._end(job, None)
            self._grant()
        self.kick()

    def kill(self) -> None:
        """The runner's process dies: every request on it is told so."""
        if self.dead:
            return
        self.dead = True
        running = [slot.job for slot in self.slots if slot.job is not None]
        waiting = list(self.waiting)
        self.waiting.clear()
        for job in running:
            message = DIED_DECODING if job.state is State.DECODE else DIED_PREFILLING
            self._free(job)
            self._end(job, ApiError(500, message))
        for job in waiting:
            self._end(job, ApiError(500, DIED_WAITING))
        self._processor.changed()

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        return sum(slot.job is not None for slot in self.slots)

    def kick(self) -> None:
        """Begin a pass soon, if there is anything to compute."""
        if not self._passing and not self.dead and self._has_work():
            self._passing = True
            self._loop.call_soon(self._begin)

    # One pass.

    def _has_work(self) -> bool:
        return any(slot.job is not None and not slot.job.frozen for slot in self.slots)

    def _begin(self) -> None:
        if self.dead or not self._has_work() or not self._processor.may_pass():
            self._passing = False
            return
        started_ns = time.monotonic_ns()
        decoding: list[Job] = []
        prompts: list[Job] = []
        for slot in self.slots:
            job = slot.job
            if job is None or job.frozen:
                continue
            if job.state is State.DECODE:
                decoding.append(job)
            elif job.state is State.PREFILL:
                prompts.append(job)
        left = max(self.n_batch - len(decoding) * (1 + self.drafted), 1)
        prefilling: list[Job] = []
        tokens = 0
        for job in prompts:
            take = min(left - tokens, len(job.prompt) - job.computed)
            if take <= 0 and tokens >= left:
                break
            if not job.prefill_ns:
                job.prefill_ns = started_ns
            job.computed += take
            tokens += take
            prefilling.append(job)
        self._block = prefilling
        cost = self._processor
        members = len(decoding) + len(prefilling)
        lasts_s = cost.pass_s + cost.member_s * members + cost.prefill_token_s * tokens
        if lasts_s > 0:
            self._loop.call_later(lasts_s, self._finish, decoding, prefilling, tokens, started_ns)
        else:
            self._finish(decoding, prefilling, tokens, started_ns)

    def _finish(self, decoding: list[Job], prefilling: list[Job], tokens: int, started_ns: int) -> None:
        self._block = []
        if self.dead:
            return
        processor = self._processor
        processor.passes += 1
        processor.prompt_tokens_computed += tokens
        now_ns = time.monotonic_ns()
        processor.pass_log.append(
            PassRecord(
                processor.passes,
                self.number,
                tuple([job.live.id for job in decoding]),
                tuple([job.live.id for job in prefilling]),
                tokens,
                started_ns,
                now_ns,
            )
        )
        for job in decoding:
            if job.state is State.DECODE:
                self._decode(job, now_ns)
        for job in prefilling:
            if job.state is State.ENDED:
                self._free(job)  # cancelled in this block
            elif job.state is State.PREFILL and job.computed >= len(job.prompt):
                self._prompt_done(job, now_ns)
        self._go_on()

    def _go_on(self) -> None:
        if self.dead:
            return  # a token of this pass has killed it
        self._grant()
        self._processor.changed()
        if self._has_work():
            self._loop.call_soon(self._begin)
        else:
            self._passing = False

    def _prompt_done(self, job: Job, now_ns: int) -> None:
        job.decode_ns = job.done_ns = now_ns
        if job.is_embedding:
            self._free(job)
            self._end(job, None)
        elif job.crash_after == 0:
            self.kill()
        else:
            job.state = State.DECODE
            job.live.first_token_ns = now_ns
            self._token(job, now_ns)

    def _decode(self, job: Job, now_ns: int) -> None:
        """Its token of this pass, and the drafted ones that are right, as far as they are wanted."""
        if not self.drafted:
            self._token(job, now_ns)
            return
        drafts = self.model.drafts
        right = min(self.drafted, drafts[job.decoded % len(drafts)])
        job.decoded += 1
        with self._processor.clock.stopped():
            self._token(job, now_ns)
            for _ in range(right):
                if not job.is_in(State.DECODE) or job.frozen:
                    return
                self._token(job, now_ns)

    def _token(self, job: Job, now_ns: int) -> None:
        place = job.said
        job.said = place + 1
        job.done_ns = now_ns
        job.live.tokens = job.said
        if place < len(job.answer_tokens):
            job.on_token(place)
            if not job.is_in(State.DECODE):
                return  # the listener has ended it
            if job.crash_after == job.said:
                self.kill()
                return
        if job.said >= job.limit and not job.frozen:
            self._free(job)
            self._end(job, None)

    # Slots.

    def _grant(self) -> None:
        """Give free slots to the jobs that wait, first come first served."""
        while self.waiting and not self.dead:
            free = [slot for slot in self.slots if slot.job is None]
            if not free:
                return
            job = self.waiting.popleft()
            slot, same = self._choose(free, job)
            slot.job, job.slot = job, slot
            job.state = State.PREFILL
            # At least one token is always computed: the one that the first answer token follows from.
            job.cached = job.computed = max(min(same, len(job.prompt) - 1), 0)
            live = job.live
            live.slot_ns = time.monotonic_ns()
            live.slot = slot.number
            live.runner = self.number
            live.prompt_tokens += len(job.prompt)
            live.prompt_tokens_cached += job.cached
            if job.on_slot is not None:
                job.on_slot()

    def _choose(self, free: list[Slot], job: Job) -> tuple[Slot, int]:
        """The slot for a job, and how much of its prompt the slot holds.

        llama.cpp, tools/server/server-context.cpp, get_available_slot(): the most similar prompt if it is
        similar enough, otherwise the slot that has been idle longest (of those never used: the last).
        """
        if not self._processor.prefix_cache or job.is_embedding:
            return free[0], 0
        best: Slot | None = None
        best_same = 0
        oldest = free[0]
        threshold = SLOT_PROMPT_SIMILARITY * len(job.prompt)
        for slot in free:
            if slot.used <= oldest.used:
                oldest = slot
            if slot.held:
                same = common_prefix(slot.held, job.prompt)
                if same > threshold and same > best_same:
                    best, best_same = slot, same
        if best is not None:
            return best, best_same
        return oldest, common_prefix(oldest.held, job.prompt)

    def _free(self, job: Job) -> None:
        slot = job.slot
        if slot is None or slot.job is not job:
            return
        slot.job = None
        # The last token was sampled, but never computed: the slot does not hold it.
        said = job.answer_tokens[: max(job.said - 1, 0)]
        slot.held = [*job.prompt[: job.computed], *said]
        self._uses += 1
        slot.used = self._uses

    def _end(self, job: Job, error: ApiError | None) -> None:
        job.state = State.ENDED
        job.error = error
        job.on_end()


def common_prefix(left: Sequence[str], right: Sequence[str]) -> int:
    """How many tokens two sequences have in common at their begin."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
