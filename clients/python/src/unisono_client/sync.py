"""The client for code without an event loop: the same names, and plain loops.

    with Client("127.0.0.1:50051") as client:
        for result in client.run(["Why is the sky blue?", "Why is grass green?"], model="llama3.2"):
            print(result.item_id, result.content)

Behind it is the asynchronous client, in a thread with an event loop of its own. Any thread may call; one thread reads
the results of a run.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from types import TracebackType
from typing import Final, Self, Unpack

import grpc

from unisono_client import client as asynchronous
from unisono_client import scripts
from unisono_client import session as asynchronous_session
from unisono_client.client import DEFAULT_TARGET, GIVE_UP_AFTER_S
from unisono_client.config import BatchConfig, Deltas, Options
from unisono_client.errors import ClosedError
from unisono_client.forks import is_forked
from unisono_client.items import Item, check_items
from unisono_client.order import InOrder
from unisono_client.portal import leave, portal
from unisono_client.results import Delta, Report, Result
from unisono_client.run import OnProgress
from unisono_client.scripts import BenchmarkRun, ModelBenchmark

__all__ = ["BenchmarkRun", "Client", "ModelBenchmark", "Run", "Session", "batch_benchmark", "batch_generate"]

# Items that `run` takes beforehand out of what it is given, and adds at a time.
_AHEAD: Final = 1_000
_AT_A_TIME: Final = 100


class Client:
    """A connection to a service at HOST:PORT; see `unisono_client.Client` for what each name promises."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        self._client = asynchronous.Client(
            target, credentials=credentials, metadata=metadata, give_up_after_s=give_up_after_s
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Batches under way are cancelled, unless their `on_disconnect` is DETACH."""
        leave(self._client.aclose())

    def run(
        self,
        items: Iterable[Item],
        *,
        in_order: bool = False,
        on_progress: OnProgress | None = None,
        **config: Unpack[BatchConfig],
    ) -> Run:
        """Runs a batch: `for result in client.run(items)` gives each result as it is there.

        `items` are taken in the calling thread, between results: where they are slow to come, so are results; then
        use a session. Leaving the loop early cancels the batch; where the run is kept in a variable, use it in a
        `with`. Otherwise as `unisono_client.Client.run`.
        """
        session = portal().call(_made(self._client, config, releases_itself=True))
        return Run(Session(session), items, in_order=in_order, on_progress=on_progress)

    def session(self, **config: Unpack[BatchConfig]) -> Session:
        """A batch to which items are added while its results are read, by another thread or in turn."""
        return Session(portal().call(_made(self._client, config, releases_itself=False)))

    def infer(self, item: Item, *, raise_errors: bool = True, **config: Unpack[BatchConfig]) -> Result:
        """One answer; raises ItemError where there is none, unless `raise_errors` is false."""
        return portal().call(self._client.infer(item, raise_errors=raise_errors, **config))

    def stream(
        self, item: Item, *, deltas: Deltas | None = None, **config: Unpack[BatchConfig]
    ) -> Generator[Delta | Result, None, None]:
        """One answer as it is generated: deltas, and the result at the end."""
        return portal().each(self._client.stream(item, deltas=deltas, **config))

    def attach(self, batch_id: str, *, after_sequence: int = 0) -> Generator[Result, None, None]:
        """The results of a batch that is known to the service, from an event on, until it ends."""
        return portal().each(self._client.attach(batch_id, after_sequence=after_sequence))

    def cancel(self, batch_id: str, *item_ids: str) -> tuple[int, int]:
        """Cancels items of a batch, or all: how many were cancelled, and how many had ended before."""
        return portal().call(self._client.cancel(batch_id, *item_ids))


class Session:
    """A batch to which items are added while results are read; see `unisono_client.Session`."""

    def __init__(self, session: asynchronous_session.Session) -> None:
        self._session = session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, *items: Item) -> None:
        """More items; never waits for results that were not read."""
        portal().call(self._session.add(*items))

    def release(self) -> None:
        """What was added goes now."""
        portal().call(self._session.release())

    def cancel(self, *item_ids: str) -> None:
        """Cancels items, or all of them; their results still come."""
        portal().call(self._session.cancel(*item_ids))

    def close_input(self) -> None:
        """No more items will be added."""
        portal().call(self._session.close_input())

    def take(self, *, waits: bool = True) -> list[Result]:
        """All results that are there and were not read; waits for one. Empty: the batch has ended.

        With `waits` false, empty: there is none yet.
        """
        return portal().call(self._session.take(waits=waits))

    def __iter__(self) -> Iterator[Result]:
        """The results, as items finish, until the batch has ended: for that, its input must have been closed."""
        while results := self.take():
            yield from results

    @property
    def batch_id(self) -> str:
        """The service's name for the batch; "" until it was accepted."""
        return self._session.batch_id

    @property
    def report(self) -> Report | None:
        """The figures of the batch, once it has ended."""
        return self._session.report

    @property
    def is_over(self) -> bool:
        """Whether the batch has ended; results may be there that were not read."""
        return self._session.is_over

    @property
    def added(self) -> int:
        """Items that were added."""
        return self._session.added

    @property
    def outstanding(self) -> int:
        """Results that are still to come, of what was added."""
        return self._session.outstanding

    @property
    def unsent(self) -> int:
        """Items that were added and not yet sent, for want of credit or time."""
        return self._session.unsent

    def close(self) -> None:
        """Leaves the batch: it is cancelled if it has not ended, unless `on_disconnect` is DETACH."""
        leave(self._session.aclose())

    def abandon(self) -> None:
        """Leaves the batch as `close` does, and does not wait for that."""
        if not is_forked():
            portal().post(self._session.abandon)


class Run:
    """A batch that runs, and its results; made by `Client.run`, and iterated over once.

    A loop that was left may be gone on with, by another loop over the same `Run`. The batch is cancelled when nobody
    holds the `Run` any more, by `with`, `close` or `cancel`, or when the client is closed.
    """

    def __init__(
        self, session: Session, items: Iterable[Item], *, in_order: bool, on_progress: OnProgress | None
    ) -> None:
        check_items(items)
        self._session = session
        self._results = _results(session, items, InOrder() if in_order else None, on_progress)
        self._has_ended = False
        # What reads the results does not know the run: it is gone as soon as nobody holds it.
        weakref.finalize(self, session.abandon).atexit = False

    def __iter__(self) -> Iterator[Result]:
        """Each result, once. Raises ClosedError where all were given before."""
        if self._has_ended:
            raise ClosedError("the run has ended, and its results were given; make another one with `client.run`")
        return self

    def __next__(self) -> Result:
        """The next result."""
        try:
            return next(self._results)
        except StopIteration:
            self._has_ended = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the batch: it is cancelled if it has not ended, unless `on_disconnect` is DETACH."""
        self._results.close()
        self._session.close()

    @property
    def batch_id(self) -> str:
        """The service's name for the batch; "" until it was accepted."""
        return self._session.batch_id

    @property
    def report(self) -> Report | None:
        """The figures of the batch, once it has ended."""
        return self._session.report

    def cancel(self, *item_ids: str) -> None:
        """Cancels items, or all of them; their results still come."""
        self._session.cancel(*item_ids)


def _results(
    session: Session, items: Iterable[Item], order: InOrder | None, on_progress: OnProgress | None
) -> Generator[Result, None, None]:
    """What a run gives. It must not know the run."""
    done, given, has_more = 0, iter(items), True
    total = len(items) if isinstance(items, Sized) else 0
    try:
        while True:
            if has_more and session.unsent < _AHEAD:
                if chunk := list(itertools.islice(given, _AT_A_TIME)):
                    session.add(*chunk)
                else:
                    has_more = False
                    session.close_input()
            # While there is something to be sent, nobody waits for what comes back.
            results = session.take(waits=not has_more or session.unsent >= _AHEAD)
            if not results and session.is_over and not (has_more and total):
                return
            for result in results:
                done += 1
                if on_progress is not None:
                    on_progress(done, max(total, session.added, done))
                yield from (result,) if order is None else order.put(result)
    except GeneratorExit:
        # Left, perhaps where garbage is collected, and nobody can wait: the run says so itself.
        raise
    except BaseException:
        session.close()
        raise


def batch_generate(
    prompts: Iterable[Item],
    *,
    model: str | None = None,
    system: str | None = None,
    options: Options | None = None,
    max_concurrent: int | None = None,
    on_progress: OnProgress | None = None,
    target: str = DEFAULT_TARGET,
) -> list[Result]:
    """An answer for each prompt, in their order; `on_progress` is called in the calling thread.

    Otherwise as `unisono_client.batch_generate`.
    """
    config = scripts.config_of(model=model, options=options, max_concurrent=max_concurrent)
    check_items(prompts)
    items = [scripts.item_of(each, system) for each in prompts]
    with Client(target) as client:
        return list(client.run(items, in_order=True, on_progress=on_progress, **config)) if items else []


def batch_benchmark(
    models: Sequence[str],
    prompts: Sequence[Item],
    *,
    num_runs: int = 3,
    options: Options | None = None,
    max_concurrent: int | None = None,
    on_progress: OnProgress | None = None,
    target: str = DEFAULT_TARGET,
) -> list[ModelBenchmark]:
    """Models measured; `on_progress` is called in the client's own thread.

    Otherwise as `unisono_client.batch_benchmark`.
    """
    return portal().call(
        scripts.batch_benchmark(
            models,
            prompts,
            num_runs=num_runs,
            options=options,
            max_concurrent=max_concurrent,
            on_progress=on_progress,
            target=target,
        )
    )


async def _made(
    client: asynchronous.Client, config: BatchConfig, *, releases_itself: bool
) -> asynchronous_session.Session:
    """A session that belongs to the portal's event loop."""
    return client.open_session(config, releases_itself=releases_itself)
