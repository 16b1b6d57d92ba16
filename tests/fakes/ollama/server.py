"""The stand-in for Ollama: an HTTP server with slots, forward passes, prefixes, reloads, and scripted faults."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from tests.fakes.ollama.answers import Answer
from tests.fakes.ollama.api import Api
from tests.fakes.ollama.faults import FaultKind, Faults
from tests.fakes.ollama.foreign import Foreign
from tests.fakes.ollama.http import Connection, Exchange
from tests.fakes.ollama.log import Changes, LiveRequest, Outcome, PassRecord, RequestRecord
from tests.fakes.ollama.models import DEFAULT_MODELS, FakeModel, RunnerOptions, parse_name
from tests.fakes.ollama.openai import OpenAi
from tests.fakes.ollama.routes import Routes
from tests.fakes.ollama.runner import Runner
from tests.fakes.ollama.scheduler import Scheduler
from tests.fakes.ollama.wire import WallClock

_BACKLOG = 4096


class FakeOllama:
    """An Ollama to test against: `async with FakeOllama() as fake: ... fake.url`.

    Durations are seconds. `num_parallel`, `pass_s`, `member_s`, `prefill_token_s`, `load_s`, `health_s`,
    `max_queue`, `max_loaded_models` and `prefix_cache` may be changed while it runs; a new `num_parallel` counts
    from the next load.
    """

    def __init__(
        self,
        models: Iterable[FakeModel] = DEFAULT_MODELS,
        *,
        num_parallel: int = 4,  # OLLAMA_NUM_PARALLEL
        max_loaded_models: int = 3,  # OLLAMA_MAX_LOADED_MODELS; 3 is Ollama's default without a GPU
        max_queue: int = 512,  # OLLAMA_MAX_QUEUE
        keep_alive_s: float = 300.0,  # OLLAMA_KEEP_ALIVE
        default_num_ctx: int = 4096,  # OLLAMA_CONTEXT_LENGTH
        n_batch: int = 512,  # tokens that one pass computes at most, unless a request says num_batch
        pass_s: float = 0.0,  # how long a forward pass lasts; 0: one turn of the event loop
        member_s: float = 0.0,  # what each sequence adds to its pass
        prefill_token_s: float = 0.0,  # what each prompt token computed adds to its pass
        load_s: float = 0.0,  # how long a load lasts
        health_s: float = 0.0,  # how long a ping of a loaded runner lasts; each request pings it, in turn
        prefix_cache: bool = True,  # False: every prompt is computed whole
        version: str = "0.32.15",
        port: int = 0,  # 0: any free one
    ) -> None:
        self.num_parallel = num_parallel
        self.max_loaded_models = max_loaded_models
        self.max_queue = max_queue
        self.keep_alive_s = keep_alive_s
        self.default_num_ctx = default_num_ctx
        self.n_batch = n_batch
        self.pass_s = pass_s
        self.member_s = member_s
        self.prefill_token_s = prefill_token_s
        self.load_s = load_s
        self.health_s = health_s
        self.prefix_cache = prefix_cache
        self.version = version
        self.port = port

        self.passes = 0  # forward passes of all runners
        self.prompt_tokens_computed = 0  # prompt tokens that were really computed
        self.loads = 0  # loads and reloads that were carried out
        self.pass_log: list[PassRecord] = []
        self.faults = Faults()
        self.connections = 0  # connections ever accepted
        self.completed = 0  # requests answered to the last byte
        self.load_gate = asyncio.Event()
        self.load_gate.set()

        self._models = {model.short_name.lower(): model for model in models}
        self._answers: list[tuple[str, Answer]] = []
        self._log: list[LiveRequest] = []
        self._changes = Changes()
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._steps: int | None = None  # passes that may still begin; None: as many as there are
        self._listener: asyncio.Server | None = None
        self._placeholder: socket.socket | None = None
        self._scheduler = Scheduler(self)
        self.clock = WallClock()
        api = Api(self._models, self._scheduler, self.clock, self._answers)
        self._routes = Routes(self, api, OpenAi(api, self.clock))

    # Life.

    async def __aenter__(self) -> Self:
        await self._listen(self._bind(self.port))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.clear()
        await self._stop(forget=True)
        if self._placeholder is not None:
            self._placeholder.close()
            self._placeholder = None

    @property
    def url(self) -> str:
        """Where it listens: http://127.0.0.1:PORT."""
        return f"http://127.0.0.1:{self.port}"

    async def go_away(self, *, forget: bool = True) -> None:
        """Stop listening and reset all connections: from now on connections are refused.

        With `forget` (a server that was restarted) the loaded models and all prefixes are gone too. The port
        stays reserved.
        """
        await self._stop(forget=forget)
        self._placeholder = self._bind(self.port)
        self.changed()

    async def come_back(self) -> None:
        """Listen again on the same port."""
        assert self._placeholder is not None, "it is not away"
        bound, self._placeholder = self._placeholder, None
        await self._listen(bound)
        self.changed()

    # What tests look at.

    @property
    def requests(self) -> list[RequestRecord]:
        """All requests so far, in the order in which their headers came; a copy that does not change."""
        return [live.freeze() for live in self._log]

    def requests_to(self, path: str) -> list[RequestRecord]:
        """All requests to one path."""
        return [live.freeze() for live in self._log if live.path == path]

    @property
    def received(self) -> int:
        """How many requests' headers have come."""
        return len(self._log)

    @property
    def open_connections(self) -> int:
        """Connections open now."""
        return len(self._open)

    @property
    def in_flight(self) -> int:
        """Requests that have begun and are not answered; those held back by their client are not counted."""
        return len(self._tasks)

    @property
    def runners(self) -> list[Runner]:
        """The loaded runners."""
        return list(self._scheduler.loaded.values())

    @property
    def busy_slots(self) -> int:
        """Slots taken, of all runners."""
        return sum(runner.busy for runner in self.runners)

    @property
    def waiting(self) -> int:
        """Requests that stand in the queues before the slots."""
        return sum(len(runner.waiting) for runner in self.runners)

    @property
    def pending(self) -> int:
        """Requests in the cold queue (the one that OLLAMA_MAX_QUEUE limits)."""
        return len(self._scheduler.queue)

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return self._scheduler.loading is not None

    def spread_ms(self, path: str | None = None, *, since: int = 0) -> float:
        """From the first to the last arrival of a last byte, of the requests after number `since`, in ms."""
        times = [
            live.last_byte_ns
            for live in self._log[since:]
            if live.last_byte_ns is not None and (path is None or live.path == path)
        ]
        return (max(times) - min(times)) / 1e6 if times else 0.0

    async def wait_for(self, condition: Callable[[FakeOllama], object], timeout_s: float = 5.0) -> None:
        """Return as soon as a condition on this server holds; AssertionError if it does not within the limit.

        The condition is looked at after every change: a request, a slot, a pass, a connection, a load.
        """
        await self._changes.wait_for(lambda: condition(self), timeout_s, self._describe)

    # What tests do to it.

    def answer(self, text: str, answer: Answer) -> None:
        """Say `answer` to every prompt whose last message contains `text`; the first that fits counts."""
        self._answers.append((text, answer))

    def hold_passes(self) -> None:
        """Let no forward pass begin before step() or release_passes()."""
        self._steps = 0

    def release_passes(self) -> None:
        """Let the passes run again."""
        self._steps = None
        self._kick()

    async def step(self, passes: int = 1, timeout_s: float = 5.0) -> None:
        """While passes are held: let so many begin, and return when they are over."""
        assert self._steps is not None, "call hold_passes() first"
        wanted = self.passes + passes
        self._steps += passes
        self._kick()
        await self.wait_for(lambda fake: fake.passes >= wanted, timeout_s)

    def hold_loads(self) -> None:
        """Let no load end before release_loads()."""
        self.load_gate.clear()

    def release_loads(self) -> None:
        """Let the loads end."""
        self.load_gate.set()

    def kill_runners(self) -> int:
        """All runner processes die; how many there were. The next request loads again."""
        alive = [runner for runner in self.runners if not runner.dead]
        for runner in alive:
            runner.kill()
        self.changed()
        return len(alive)

    async def foreign(self, *, slots: int, model: str = "fake", speaks: bool = False) -> Foreign:
        """Another client comes, with a request for each of so many slots; it stays until its `leave()`.

        With `speaks` it takes part in the passes, otherwise it only keeps its slots. Where these are taken, it
        waits for them like everybody.
        """
        runner = await self._scheduler.acquire(self._models[_short(model)], RunnerOptions(), None)
        guest = Foreign(self._scheduler, runner, slots=slots, speaks=speaks)
        self._scheduler.release(runner)
        return guest

    async def foreign_reload(self, *, num_ctx: int, model: str = "fake") -> None:
        """Another client asks for the model with another context: returns when it has been reloaded.

        It is reloaded as soon as nobody uses it, and those who come with the former context reload it again.
        """
        options = RunnerOptions(num_ctx=num_ctx)
        self._scheduler.release(await self._scheduler.acquire(self._models[_short(model)], options, None))

    def unload_all(self) -> None:
        """Forget every runner that nobody uses."""
        for runner in self.runners:
            if runner.refs <= 0:
                self._scheduler.unload(runner)

    # For the parts of the server.

    def changed(self) -> None:
        """Something happened that a test may wait for."""
        self._changes.notify()

    def may_pass(self) -> bool:
        """Whether a pass may begin; counts it if passes are held."""
        if self._steps is None:
            return True
        if self._steps <= 0:
            return False
        self._steps -= 1
        return True

    def opened(self, connection: Connection) -> None:
        """A client has connected."""
        self._open.add(connection)
        self.changed()

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._open.discard(connection)
        self.changed()

    def new_request(self, connection: Connection, method: str, path: str, headers: dict[str, str]) -> LiveRequest:
        """The headers of a request have come."""
        live = LiveRequest(len(self._log) + 1, connection.number, method, path, headers)
        self._log.append(live)
        return live

    def written(self, exchange: Exchange) -> None:
        """An answer is written to its last byte."""
        self.completed += 1
        if exchange.fault is not None and exchange.fault.kind in _BREAKING:
            exchange.live.outcome = Outcome.FAULTED

    def start(self, exchange: Exchange) -> None:
        """A request's body is whole: answer it."""
        task = asyncio.get_running_loop().create_task(self._routes.answer(exchange))
        exchange.task = task
        self._tasks.add(task)
        task.add_done_callback(self._answered)

    # Inside.

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            asyncio.get_running_loop().call_exception_handler(
                {"message": "the stand-in for Ollama has a bug", "exception": error, "task": task}
            )
        self.changed()

    def _kick(self) -> None:
        for runner in self.runners:
            runner.kick()

    def _bind(self, port: int) -> socket.socket:
        # With the protocol named, asyncio turns Nagle's algorithm off, as Go does; or answers wait 40 ms for an ACK.
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.settimeout(0.0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        return bound

    async def _listen(self, bound: socket.socket) -> None:
        self.port = bound.getsockname()[1]
        self._listener = await asyncio.get_running_loop().create_server(self._accept, sock=bound, backlog=_BACKLOG)

    def _accept(self) -> Connection:
        self.connections += 1
        return Connection(self, self.connections)

    async def _stop(self, *, forget: bool) -> None:
        if self._listener is not None:
            # Whoever was accepted in this moment gets its connection first: the event loop would lose it otherwise.
            loop = asyncio.get_running_loop()
            for listening in self._listener.sockets:
                _ = loop.remove_reader(listening.fileno())
            for _step in range(3):
                await asyncio.sleep(0)
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        if forget:
            self._scheduler.close()

    def _describe(self) -> str:
        now_ns = time.monotonic_ns()
        last = [
            f"#{live.id} {live.method} {live.path} {live.outcome} lines={live.lines} "
            f"age={(now_ns - live.headers_ns) / 1e6:.0f} ms"
            for live in self._log[-5:]
        ]
        return (
            f"received={self.received} completed={self.completed} in_flight={self.in_flight} "
            f"busy_slots={self.busy_slots} waiting={self.waiting} pending={self.pending} loading={self.loading} "
            f"open_connections={self.open_connections} passes={self.passes} loads={self.loads}; last: {last}"
        )


def _short(name: str) -> str:
    return (parse_name(name) or name).lower()


# Kinds that break an answer, so that even one written to its last byte counts as faulted.
_BREAKING = frozenset(
    {FaultKind.ANSWER, FaultKind.ERROR_LINE, FaultKind.NO_DONE, FaultKind.KILL_RUNNER, FaultKind.BAD_LINE}
)
