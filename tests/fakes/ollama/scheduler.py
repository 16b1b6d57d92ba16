"""Which models are loaded: loading, reloading, evicting, expiring, and the limit of the cold queue.

Follows server/sched.go of Ollama: a request for a runner that is loaded with the right options takes it at once;
every other request goes to one queue of at most `max_queue` (beyond: 503), which is worked off one by one, the
first of it standing outside the count. A runner that must make room is waited for until its last request is over.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tests.fakes.ollama.runner import Processor, Runner
from tests.fakes.ollama.wire import ApiError

if TYPE_CHECKING:
    from tests.fakes.ollama.models import FakeModel, RunnerOptions

MAX_QUEUE_MESSAGE = "server busy, please try again.  maximum pending requests exceeded"
EMBEDDING_BATCH = 2048  # llm/llama_server.go, DefaultEmbeddingNumBatch


class Host(Processor, Protocol):
    """What the scheduler needs from the server."""

    num_parallel: int
    max_loaded_models: int
    max_queue: int
    load_s: float
    health_s: float
    keep_alive_s: float
    default_num_ctx: int
    n_batch: int
    loads: int
    load_gate: asyncio.Event


@dataclass(eq=False, slots=True)
class Pending:
    """A request that waits for its runner."""

    model: FakeModel
    options: RunnerOptions
    keep_alive_s: float | None
    runner: asyncio.Future[Runner]
    gate: asyncio.Event | None = None  # a load for this request lasts until it is set
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the client went away


class Scheduler:
    """All runners of a server."""

    def __init__(self, host: Host) -> None:
        self.loaded: dict[str, Runner] = {}  # by digest
        self.queue: deque[Pending] = deque()
        self.loading: FakeModel | None = None
        self._host = host
        self._current: Pending | None = None
        self._worker: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()  # set whenever a runner falls idle or is gone
        self._timers: dict[int, asyncio.TimerHandle] = {}

    async def acquire(
        self,
        model: FakeModel,
        options: RunnerOptions,
        keep_alive_s: float | None,
        gate: asyncio.Event | None = None,
    ) -> Runner:
        """A runner for a request, loaded if need be; give it back with release().

        ApiError(503) when the queue is full. Cancelling while this request's own load is under way aborts it.
        """
        host = self._host
        runner = self.loaded.get(model.file_digest)
        if runner is not None and host.health_s > 0:
            await runner.pings.ping(host.health_s)
            runner = self.loaded.get(model.file_digest)  # it may be another one by now
        if runner is not None and not self._needs_reload(runner, model, options):
            self.use(runner, keep_alive_s)
            return runner
        if self._current is not None and len(self.queue) >= host.max_queue:
            raise ApiError(503, MAX_QUEUE_MESSAGE)
        loop = asyncio.get_running_loop()
        pending = Pending(model, options, keep_alive_s, loop.create_future(), gate)
        if self._current is None:
            self._current = pending
            self._worker = loop.create_task(self._work())
        else:
            self.queue.append(pending)
        host.changed()
        try:
            return await pending.runner
        except asyncio.CancelledError:
            pending.gone.set()
            if pending.runner.done() and not pending.runner.cancelled():
                self.release(pending.runner.result())
            raise

    def use(self, runner: Runner, keep_alive_s: float | None = None) -> None:
        """One more request holds a runner; give it back with release()."""
        runner.refs += 1
        if keep_alive_s is not None:
            runner.keep_alive_s = keep_alive_s  # replaces it for everybody (sched.go, useLoadedRunner())

    def release(self, runner: Runner) -> None:
        """A request is over (sched.go, processCompleted())."""
        runner.refs -= 1
        if runner.refs > 0:
            return
        self._idle.set()
        if runner.dead or runner.keep_alive_s <= 0:
            self.unload(runner)
            return
        loop = asyncio.get_running_loop()
        runner.expires_at = loop.time() + runner.keep_alive_s
        if runner.number not in self._timers and runner.keep_alive_s < float("inf"):
            self._timers[runner.number] = loop.call_at(runner.expires_at, self._expire, runner)

    def expire(self, model: FakeModel) -> None:
        """Unload as soon as nobody uses it: an empty request with keep_alive 0 (sched.go, expireRunner())."""
        runner = self.loaded.get(model.file_digest)
        if runner is None:
            return
        runner.keep_alive_s = 0.0
        if runner.refs <= 0:
            self.unload(runner)

    def unload(self, runner: Runner) -> None:
        """Forget a runner and all that its slots hold."""
        if self.loaded.get(runner.model.file_digest) is runner:
            del self.loaded[runner.model.file_digest]
        timer = self._timers.pop(runner.number, None)
        if timer is not None:
            timer.cancel()
        runner.kill()
        self._idle.set()
        self._host.changed()

    def close(self) -> None:
        """The server ends: runners, queue and loads are gone."""
        if self._worker is not None:
            self._worker.cancel()
        self._worker = self._current = None
        self.loading = None
        self.queue.clear()
        for runner in list(self.loaded.values()):
            self.unload(runner)

    def _needs_reload(self, runner: Runner, model: FakeModel, options: RunnerOptions) -> bool:
        return runner.dead or runner.options.needs_reload(
            options,
            num_ctx=self._host.default_num_ctx,
            num_batch=self._batch(model),
            trained=model.context_length,
        )

    def _batch(self, model: FakeModel) -> int:
        return self._host.n_batch if model.can("completion") else EMBEDDING_BATCH

    def _expire(self, runner: Runner) -> None:
        self._timers.pop(runner.number, None)
        loop = asyncio.get_running_loop()
        if runner.refs > 0 or self.loaded.get(runner.model.file_digest) is not runner:
            return
        if runner.expires_at <= loop.time():
            self.unload(runner)
        else:
            self._timers[runner.number] = loop.call_at(runner.expires_at, self._expire, runner)

    async def _work(self) -> None:
        """Work off the queue (sched.go, processPending())."""
        while True:
            pending = self._current
            if pending is not None and not pending.gone.is_set():
                try:
                    runner = await self._runner_for(pending)
                except ApiError as error:
                    if not pending.runner.done():
                        pending.runner.set_exception(error)
                else:
                    if runner is not None and not pending.runner.done():
                        self.use(runner, pending.keep_alive_s)
                        pending.runner.set_result(runner)
            if not self.queue:
                self._current = None
                return
            self._current = self.queue.popleft()

    async def _runner_for(self, pending: Pending) -> Runner | None:
        model, host = pending.model, self._host
        while True:
            runner = self.loaded.get(model.file_digest)
            if runner is not None and not self._needs_reload(runner, model, pending.options):
                return runner
            if runner is None and len(self.loaded) < max(host.max_loaded_models, 1):
                break
            # Make room: this model's own runner, else an idle one, else the one with the shortest keep_alive.
            victim = runner or min(
                self.loaded.values(), key=lambda one: (one.refs > 0, one.keep_alive_s, one.model.file_digest)
            )
            victim.keep_alive_s = 0.0
            self._idle.clear()
            if victim.refs <= 0:
                self.unload(victim)
            else:
                await self._idle.wait()
        return await self._load(pending)

    async def _load(self, pending: Pending) -> Runner | None:
        """Load; None if the client went away meanwhile (llm/llama_server.go, WaitUntilRunning())."""
        model, host = pending.model, self._host
        self.loading = model
        host.changed()
        try:
            wait = asyncio.ensure_future(self._loading_time(pending))
            gone = asyncio.ensure_future(pending.gone.wait())
            try:
                await asyncio.wait((wait, gone), return_when=asyncio.FIRST_COMPLETED)
                loaded = wait.done()
            finally:
                wait.cancel()
                gone.cancel()
        finally:
            self.loading = None
            host.changed()
        if not loaded:
            return None
        host.loads += 1
        options = pending.options
        num_ctx = min(options.num_ctx or host.default_num_ctx, model.context_length)
        runner = Runner(
            host,
            host.loads,
            model,
            options,
            slots=model.slots(host.num_parallel),
            num_ctx=num_ctx,
            n_batch=options.num_batch or self._batch(model),
        )
        runner.keep_alive_s = host.keep_alive_s if pending.keep_alive_s is None else pending.keep_alive_s
        self.loaded[model.file_digest] = runner
        host.changed()
        return runner

    async def _loading_time(self, pending: Pending) -> None:
        if pending.gate is not None:
            await pending.gate.wait()
        await self._host.load_gate.wait()
        if self._host.load_s > 0:
            await asyncio.sleep(self._host.load_s)
