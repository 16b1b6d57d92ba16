"""Other clients of the same server: they hold slots, or ask for the model with other options.

    guest = await fake.foreign(slots=3)   # three of the runner's slots are taken
    guest.leave()                         # and free again

What they do is in `passes` and in the pass log (as request 0), and not among the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, overload

from tests.fakes.ollama.log import LiveRequest
from tests.fakes.ollama.runner import Job, State

if TYPE_CHECKING:
    from tests.fakes.ollama.runner import Runner
    from tests.fakes.ollama.scheduler import Scheduler

_numbers = count(1)


class Endless(Sequence[str]):
    """An answer without end."""

    def __len__(self) -> int:
        return 1 << 40

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [f" on{n}" for n in range(*place.indices(len(self)))]
        return f" on{place}"


class Foreign:
    """A client of somebody else's, with one request in each of some slots."""

    def __init__(self, scheduler: Scheduler, runner: Runner, *, slots: int, speaks: bool) -> None:
        """`speaks`: it takes part in passes; otherwise it only keeps its slots."""
        self._scheduler = scheduler
        self._runner = runner
        self._jobs: list[Job] = []
        for _ in range(slots):
            self._scheduler.use(runner)
            job = Job(
                LiveRequest(0, 0, "POST", "/foreign", {}),
                [f"<foreign {next(_numbers)}>", *(f" word{n}" for n in range(8))],
                Endless(),
                stops=False,
                on_token=lambda _: None,
                on_end=lambda: None,
            )
            job.frozen = not speaks
            self._jobs.append(job)
            runner.submit(job)

    @property
    def holding(self) -> int:
        """How many slots it has got."""
        return sum(job.state in (State.PREFILL, State.DECODE) for job in self._jobs)

    def leave(self) -> None:
        """Goes away: its slots are free at once. Does nothing the second time."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            self._runner.cancel(job)
            self._scheduler.release(self._runner)
