"""What is counted while it happens: the table of metrics, with their names, labels, buckets and meanings.

Names and units are Prometheus's: seconds, and `_total` for what only grows. Labels are bounded: a backend of the
configuration, a model that a backend has, a reason of core/errors.py, a state. Never a batch or an item.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

from unisono.core.errors import (
    BackendError,
    CallerError,
    ConnectionLostError,
    InternalError,
    InvalidRequestError,
    ItemStoppedError,
    RunnerDiedError,
    reasons,
)
from unisono.core.events import BatchState
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Sequence

# Backend and model; a model that came after so many others is counted under this name with them.
_MOST_PLACES = 200
OTHER = "other"
# How a load ended.
LOADED, FAILED = "loaded", "failed"
_PLACE = ("backend", "model")
# Why items end without an answer, why attempts are followed by another, and why they are broken off, as a rule. Any
# other reason begins its series when it comes.
_ERRORS = reasons(InternalError, InvalidRequestError, CallerError, BackendError, ItemStoppedError)
_RETRIES = reasons(BackendError)
_BROKEN_OFF = reasons(RunnerDiedError, ConnectionLostError)

# Upper bounds. The spread of a release is below a millisecond for 64 requests, and some milliseconds for 256.
_SPREAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEM_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LOAD_S = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SHARED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)


class Series:
    """All that is counted, in a registry of its own."""

    def __init__(self, *, version: str) -> None:
        # The moment at which each series began doubles their number, and nothing here asks for it.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no type for it
        self.registry = CollectorRegistry()
        # Processor time, memory and open files of this process, by the names that dashboards know.
        _ = ProcessCollector(registry=self.registry)
        self._places: dict[tuple[str, str], Place] = {}
        self._nowhere: dict[str, Ends] = {}

        build = Gauge(
            "unisono_build_info", "1, with the version of the service.", ("version",), registry=self.registry
        )
        build.labels(version).set(1)
        self.batches_running = self._gauge("unisono_batches_running", "Batches that have not ended.")
        self.batches = self._counter("unisono_batches_total", "Batches that ended, by how.", ("state",))
        for state in BatchState:
            if state is not BatchState.RUNNING:
                _ = self.batches.labels(state.value)

        self.items = self._counter("unisono_items_total", "Items that ended, by how.", (*_PLACE, "state"))
        self.errors = self._counter(
            "unisono_item_errors_total",
            "Items that ended without an answer, by reason; model is empty where none was found for them.",
            (*_PLACE, "reason"),
        )
        self.retries = self._counter(
            "unisono_item_retries_total",
            "Attempts of items that failed and were to be followed by another, by the reason of the failure.",
            (*_PLACE, "reason"),
        )
        self.broken_off = self._counter(
            "unisono_item_broken_off_total",
            "Attempts that another item's ended, or the backend's going away, by reason; not charged.",
            (*_PLACE, "reason"),
        )
        self.prompt_tokens = self._counter(
            "unisono_prompt_tokens_total", "Tokens of the prompts of completed items, cached ones included.", _PLACE
        )
        self.cached_prompt_tokens = self._counter(
            "unisono_cached_prompt_tokens_total", "Of these, tokens found in a cache, where the backend says.", _PLACE
        )
        self.completion_tokens = self._counter(
            "unisono_completion_tokens_total", "Tokens of the answers of completed items.", _PLACE
        )
        self.queued = self._histogram(
            "unisono_item_queue_seconds", "From an item's acceptance to its last release.", _ITEM_S
        )
        self.first_token = self._histogram(
            "unisono_time_to_first_token_seconds", "From an item's last release to its first token.", _FIRST_TOKEN_S
        )
        self.duration = self._histogram(
            "unisono_item_duration_seconds", "From the last release of a completed item to its end.", _ITEM_S
        )

        self.spread = self._histogram(
            "unisono_release_spread_seconds",
            "From the first to the last final byte of requests that were released together, two or more.",
            _SPREAD_S,
        )
        self.passes = self._counter(
            "unisono_passes_total",
            "Forward passes of ended batches, counted from outside; groups of a single item are left out.",
            _PLACE,
        )
        self.pass_items = self._counter(
            "unisono_pass_items_total",
            "Participations of items in these passes; divided by them: items per pass.",
            _PLACE,
        )
        self.items_per_pass = self._histogram(
            "unisono_items_per_pass",
            "Items per forward pass, once for each group of an ended batch that had two items or more.",
            _SHARED,
        )
        self.loads = self._counter(
            "unisono_loads_total",
            "Loads of models: loaded, or failed, also where only the answer to an item told that.",
            (*_PLACE, "outcome"),
        )
        self.load_duration = self._histogram("unisono_load_duration_seconds", "Of a load that succeeded.", _LOAD_S)

    def place(self, backend: str, model: str) -> Place:
        """What is counted of a model on a backend."""
        place = self._places.get((backend, model))
        if place is None:
            if len(self._places) >= _MOST_PLACES and model != OTHER:
                return self.place(backend, OTHER)
            place = self._places[backend, model] = Place(self, backend, model)
        return place

    def nowhere(self, backend: str) -> Ends:
        """What is counted of items for which no model was found; `backend`: where that was looked for, or empty."""
        ends = self._nowhere.get(backend)
        if ends is None:
            ends = self._nowhere[backend] = Ends(self, backend, "")
        return ends

    def _counter(self, name: str, meaning: str, labels: Sequence[str]) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, meaning, _PLACE, buckets=buckets, registry=self.registry)


class Ends:
    """How items end at one place: the series are found once, since looking them up costs more than counting.

    Where the backend is known all are there at 0 from the beginning: to Prometheus the increase from nothing to the
    first failure is none.
    """

    def __init__(self, series: Series, backend: str, model: str) -> None:
        self.labels = backend, model
        self._series = series
        if backend:
            for reason in _ERRORS:
                _ = series.errors.labels(*self.labels, reason)
            for state in ItemState:
                _ = series.items.labels(*self.labels, state.value)

    def count(self, state: ItemState, reason: str | None) -> None:
        """An item ended; `reason`: why it has no answer."""
        self._series.items.labels(*self.labels, state.value).inc()
        if reason is not None:
            self._series.errors.labels(*self.labels, reason).inc()


class Place(Ends):
    """The series of one model on one backend."""

    def __init__(self, series: Series, backend: str, model: str) -> None:
        super().__init__(series, backend, model)
        for reason in _RETRIES:
            _ = series.retries.labels(*self.labels, reason)
        for reason in _BROKEN_OFF:
            _ = series.broken_off.labels(*self.labels, reason)
        self.prompt_tokens = series.prompt_tokens.labels(*self.labels)
        self.cached_prompt_tokens = series.cached_prompt_tokens.labels(*self.labels)
        self.completion_tokens = series.completion_tokens.labels(*self.labels)
        self.queued = series.queued.labels(*self.labels)
        self.first_token = series.first_token.labels(*self.labels)
        self.duration = series.duration.labels(*self.labels)
        self.spread = series.spread.labels(*self.labels)
        self.passes = series.passes.labels(*self.labels)
        self.pass_items = series.pass_items.labels(*self.labels)
        self.items_per_pass = series.items_per_pass.labels(*self.labels)
        self.load_duration = series.load_duration.labels(*self.labels)
        self.loads = {outcome: series.loads.labels(*self.labels, outcome) for outcome in (LOADED, FAILED)}
