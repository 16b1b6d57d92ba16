"""How the backends stand at the moment of a scrape: asked then, and otherwise not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client.core import Metric

    from unisono.app.ports import BackendStanding
    from unisono.core.idle import IdleReason
    from unisono.core.model import RunnerSpec

_PLACE = ("backend", "model")


class StandingCollector:
    """Queue, slots and idle time of backends.

    Where a model has several runners, which take turns, the larger number of slots stands for it.
    """

    def __init__(self, backends: Mapping[str, BackendStanding]) -> None:
        """`backends`: by name; more may come until the first scrape."""
        self._backends = backends
        # What each runner had at the last scrape, and the sum of all that was added: a runner that is forgotten and
        # comes back begins at 0, and a counter that fell would be taken for a restart of the service.
        self._seen: dict[RunnerSpec, Mapping[IdleReason, float]] = {}
        self._idle: dict[tuple[str, str, str], float] = {}

    def describe(self) -> Iterable[Metric]:
        """No names: otherwise the backends would be asked for them when this is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The figures of this moment."""
        up = GaugeMetricFamily(
            "unisono_backend_up",
            "0: the backend was last found not to answer; it is asked while it has work.",
            labels=("backend",),
        )
        queue = GaugeMetricFamily(
            "unisono_queue_depth",
            "Items that were released to a backend's schedule and are not at the backend.",
            labels=("backend",),
        )
        in_flight = GaugeMetricFamily("unisono_in_flight", "Items that are at the backend.", labels=("backend",))
        known = GaugeMetricFamily(
            "unisono_slots", "Requests that the backend computes side by side; 0 while unknown.", labels=_PLACE
        )
        limit = GaugeMetricFamily(
            "unisono_slots_limit", "Of these, how many requests of ours may hold one now.", labels=_PLACE
        )
        before, self._seen = self._seen, {}
        for name, backend in self._backends.items():
            up.add_metric((name,), 0 if backend.is_away else 1)
            queue.add_metric((name,), backend.queued)
            in_flight.add_metric((name,), backend.in_flight)
            most: dict[str, tuple[int, int]] = {}
            for runner, state in backend.known_slots.items():
                count, allowed = most.get(runner.model, (0, 0))
                most[runner.model] = (max(count, state.slots.count), max(allowed, state.limit))
                now = self._seen[runner] = backend.figures(runner).idle_s
                self._add_idle(runner, before.get(runner, {}), now)
            for model, (count, allowed) in most.items():
                known.add_metric((name, model), count)
                limit.add_metric((name, model), allowed)
        idle = CounterMetricFamily(
            "unisono_idle_slot_seconds", "Slots × seconds that were not used, by reason.", labels=(*_PLACE, "reason")
        )
        for labels, seconds in self._idle.items():
            idle.add_metric(labels, seconds)
        return (up, queue, in_flight, known, limit, idle)

    def _add_idle(
        self, runner: RunnerSpec, before: Mapping[IdleReason, float], now: Mapping[IdleReason, float]
    ) -> None:
        for reason, seconds in now.items():
            former = before.get(reason, 0.0)
            labels = (runner.backend, runner.model, reason.value)
            self._idle[labels] = self._idle.get(labels, 0.0) + (seconds - former if seconds >= former else seconds)
