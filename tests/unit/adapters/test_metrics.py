"""What happens to batches is counted: a scripted batch, and the registry as a scraper reads it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import pytest
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import generate_latest

from tests.fakes.scraped import Scraped
from tests.fakes.scripted_batch import METHOD, SECRET, ScriptedBatch, chat_item, completed, play, stopped
from unisono.adapters.metrics.series import _MOST_PLACES, OTHER, Series
from unisono.adapters.metrics.standing import StandingCollector
from unisono.adapters.metrics.watch import MetricsListener
from unisono.adapters.telemetry.trace import TraceListener
from unisono.app.listeners import BothListeners
from unisono.app.ports import Listener, LoadOutcome, ReleaseTimes
from unisono.core.commands import ReleaseReason
from unisono.core.errors import ConnectionLostError, LoadFailedError, ModelNotFoundError, RunnerDiedError
from unisono.core.events import BatchState
from unisono.core.idle import IdleReason
from unisono.core.model import RunnerOptions, RunnerSpec, Slots, SlotSource, SlotState
from unisono.core.report import RunnerFigures

SMOL = {"backend": "desk", "model": "smol"}
# What an item may cost on the machine that the design was measured on, and what a busy one may make of that.
_GOAL_S, _SLACK = 20e-6, 10


class Counted:
    """A listener that counts, and what it has counted."""

    def __init__(self) -> None:
        self.series = Series(version="1.2.3")
        self.listener = MetricsListener(self.series)

    def batch(self) -> ScriptedBatch:
        """A batch that is watched."""
        return ScriptedBatch(self.listener)

    def scrape(self) -> Scraped:
        """What a scraper would read now."""
        return Scraped(generate_latest(self.series.registry).decode())


@pytest.fixture
def counted() -> Counted:
    """Nothing counted yet."""
    return Counted()


def test_every_item_is_counted_once_by_how_it_ended(counted: Counted) -> None:
    """With the reason where it has no answer; an item that never had a group belongs nowhere."""
    play(counted.batch())
    seen = counted.scrape()
    assert seen.by("unisono_items_total", "state") == {
        "completed": 3.0,
        "failed": 2.0,
        "cancelled": 1.0,
        "expired": 1.0,
    }
    assert seen.by("unisono_item_errors_total", "reason") == {
        "MODEL_NOT_FOUND": 2.0,
        "CANCELLED": 1.0,
        "ITEM_TIMEOUT": 1.0,
    }
    assert seen.value("unisono_items_total", backend="", model="") == 2.0
    assert seen.by("unisono_item_retries_total", "reason") == {"RUNNER_DIED": 1.0}
    assert seen.value("unisono_batches_total", state="completed") == 1.0
    assert seen.value("unisono_batches_running") == 0.0
    assert seen.value("unisono_build_info", version="1.2.3") == 1.0


def test_tokens_and_times_are_those_of_the_results(counted: Counted) -> None:
    """Each result's usage and timings are added up; in seconds."""
    batch = counted.batch()
    batch.plan("smol")
    for index in range(3):
        batch.run(chat_item(index))
    seen = counted.scrape()
    assert seen.value("unisono_prompt_tokens_total", **SMOL) == 3 * 21
    assert seen.value("unisono_cached_prompt_tokens_total", **SMOL) == 3 * 5
    assert seen.value("unisono_completion_tokens_total", **SMOL) == 3 * 13
    assert seen.value("unisono_item_queue_seconds_count", **SMOL) == 3
    assert seen.value("unisono_item_queue_seconds_sum", **SMOL) == 0.75
    assert seen.value("unisono_time_to_first_token_seconds_sum", **SMOL) == 1.5
    assert seen.value("unisono_time_to_first_token_seconds_bucket", le="0.25", **SMOL) == 0
    assert seen.value("unisono_time_to_first_token_seconds_bucket", le="0.5", **SMOL) == 3
    assert seen.value("unisono_batches_running") == 1


def test_passes_come_with_the_report(counted: Counted) -> None:
    """Items per pass, weighted and by group, which are fewer than tokens where a model drafts.

    A group of a single item tells nothing of sharing.
    """
    batch = counted.batch()
    batch.plan("smol")
    batch.end()
    lone = counted.batch()
    lone.plan("smol", items=1)
    lone.end(BatchState.CANCELLED)
    seen = counted.scrape()
    assert seen.value("unisono_passes_total", **SMOL) == 20
    assert seen.value("unisono_pass_items_total", **SMOL) == 50
    assert seen.value("unisono_items_per_pass_sum", **SMOL) == 2.5
    assert seen.by("unisono_batches_total", "state") == {"completed": 1.0, "cancelled": 1.0}


def test_what_several_batches_are_told_is_counted_once(counted: Counted) -> None:
    """A release of items of two batches, and the load of a runner that both wait for."""
    first, second = counted.batch(), counted.batch()
    items = chat_item(0), chat_item(1)
    for batch in (first, second):
        batch.plan("smol")
    for batch in (first, second):
        batch.load()
    for batch in (first, second):
        batch.release(*items, others=2, wave_key=7)
    seen = counted.scrape()
    assert seen.value("unisono_release_spread_seconds_count", **SMOL) == 1
    assert seen.value("unisono_release_spread_seconds_sum", **SMOL) == pytest.approx(0.0005)
    assert seen.value("unisono_loads_total", outcome="loaded", **SMOL) == 1
    assert seen.value("unisono_load_duration_seconds_sum", **SMOL) == pytest.approx(0.05)
    first.release(*items, others=2, wave_key=8)
    first.load(error=LoadFailedError(SECRET))
    # Released alone, nothing is apart.
    second.release(items[0], wave_key=9)
    seen = counted.scrape()
    assert seen.value("unisono_release_spread_seconds_count", **SMOL) == 2
    assert seen.by("unisono_loads_total", "outcome") == {"loaded": 1.0, "failed": 1.0}
    assert seen.value("unisono_load_duration_seconds_count", **SMOL) == 1


def test_a_runner_that_was_there_is_no_load(counted: Counted) -> None:
    """It was only asked."""
    batch = counted.batch()
    batch.plan("smol")
    outcome = LoadOutcome(was_loaded=True, duration_s=0.01)
    batch.watch.group_loaded(group=0, started_ns=1, ended_ns=2, outcome=outcome, error=None)
    assert counted.scrape().value("unisono_loads_total") == 0


def test_an_attempt_that_another_item_ended_is_no_retry(counted: Counted) -> None:
    """It is not charged to the item, and stands by itself."""
    batch = counted.batch()
    batch.plan("smol")
    item = chat_item(0)
    batch.stage(item)
    batch.retry(item, RunnerDiedError("died"), is_free=True)
    batch.retry(item, ConnectionLostError("lost"))
    batch.finish(stopped(item, ModelNotFoundError("gone")))
    seen = counted.scrape()
    assert seen.by("unisono_item_broken_off_total", "reason") == {"RUNNER_DIED": 1.0}
    assert seen.by("unisono_item_retries_total", "reason") == {"CONNECTION_LOST": 1.0}
    assert seen.value("unisono_item_retries_total", **SMOL) == 1


def test_names_and_labels_are_bounded_and_tell_no_text(counted: Counted) -> None:
    """Prometheus's conventions; no label but a few, no batch, no item, no text of anybody."""
    play(counted.batch())
    seen = counted.scrape()
    for family in seen.families:
        assert re.fullmatch(r"(unisono|process)_[a-z_]+[a-z]", family.name)
        assert family.documentation.endswith(".")
        assert family.type != "counter" or f"{family.name}_total" in seen.text
    labels = {label for sample in seen.samples for label in sample.labels}
    assert labels == {"backend", "model", "state", "reason", "outcome", "le", "version"}
    assert "_created" not in seen.text
    for hidden in (SECRET, "item-", "batch-1"):
        assert hidden not in seen.text


def test_models_beyond_a_number_are_counted_together(counted: Counted) -> None:
    """Whoever has thousands of models does not get thousands of series."""
    for number in range(_MOST_PLACES + 50):
        counted.series.place("desk", f"model-{number}").prompt_tokens.inc()
    seen = counted.scrape()
    assert len(seen.by("unisono_prompt_tokens_total", "model")) == _MOST_PLACES + 1
    assert seen.value("unisono_prompt_tokens_total", model=OTHER) == 50


# -- How backends stand ------------------------------------------------------------------------------------------


class Standing:
    """A backend as it is shown."""

    def __init__(self) -> None:
        self.is_away = False
        self.queued, self.in_flight = 5, 3
        self.idle: dict[RunnerSpec, float] = {}
        self.slots: dict[RunnerSpec, SlotState] = {}

    @property
    def known_slots(self) -> Mapping[RunnerSpec, SlotState]:
        """See the port."""
        return self.slots

    def figures(self, runner: RunnerSpec) -> RunnerFigures:
        """See the port."""
        return RunnerFigures(idle_s={IdleReason.REFILL: self.idle[runner]})


def runner(num_ctx: int) -> RunnerSpec:
    """One of a model's runners."""
    return RunnerSpec(backend="desk", model="smol", digest="d", options=RunnerOptions(num_ctx=num_ctx))


def state(count: int, limit: int) -> SlotState:
    """So many slots."""
    return SlotState(slots=Slots(count=count, source=SlotSource.LEARNED), limit=limit)


def test_backends_are_shown_as_they_stand(counted: Counted) -> None:
    """At the moment of the scrape; the largest of a model's runners stands for it."""
    backend = Standing()
    counted.series.registry.register(StandingCollector({"desk": backend}))
    small, large = runner(2048), runner(4096)
    backend.slots = {small: state(8, 6), large: state(4, 4)}
    backend.idle = {small: 1.5, large: 1.0}
    seen = counted.scrape()
    assert seen.value("unisono_backend_up", backend="desk") == 1
    assert seen.value("unisono_queue_depth", backend="desk") == 5
    assert seen.value("unisono_in_flight", backend="desk") == 3
    assert seen.value("unisono_slots", **SMOL) == 8
    assert seen.value("unisono_slots_limit", **SMOL) == 6
    assert seen.value("unisono_idle_slot_seconds_total", reason="refill", **SMOL) == 2.5
    backend.is_away = True
    assert counted.scrape().value("unisono_backend_up", backend="desk") == 0


def test_idle_time_never_falls(counted: Counted) -> None:
    """A runner that is forgotten, and one that comes back and begins at 0, take nothing away."""
    backend = Standing()
    counted.series.registry.register(StandingCollector({"desk": backend}))
    one = runner(2048)
    shown = []
    for idle_s in (2.0, 3.0, None, 0.5, 1.0):
        backend.slots = {} if idle_s is None else {one: state(1, 1)}
        backend.idle = {one: idle_s or 0.0}
        shown.append(counted.scrape().value("unisono_idle_slot_seconds_total"))
    assert shown == [2.0, 3.0, 3.0, 3.5, 4.0]


# -- Beside traces -----------------------------------------------------------------------------------------------


def test_both_who_watch_are_told_everything() -> None:
    """Two counters beside each other count the same, and a trace's headers go on."""
    first, second = Counted(), Counted()
    play(ScriptedBatch(BothListeners(first.listener, second.listener)))
    ours = [[line for line in each.scrape().text.splitlines() if "unisono_" in line] for each in (first, second)]
    assert ours[0] == ours[1]
    assert first.scrape().value("unisono_items_total") == 7
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for listener in (
        BothListeners(TraceListener(NoOpTracerProvider()), first.listener),
        BothListeners(first.listener, TraceListener(NoOpTracerProvider())),
    ):
        batch = ScriptedBatch(listener, carrier={"traceparent": caller})
        batch.plan("smol")
        assert batch.stage(chat_item(0))[0]["traceparent"] == caller


def test_an_item_costs_little() -> None:
    """Counting one, from its staging to its end: some microseconds."""
    assert min(item_s(Counted().listener) for _ in range(5)) < _GOAL_S * _SLACK


def item_s(listener: Listener, count: int = 2_000) -> float:
    """Seconds that watching one item takes, with all that is told of it."""
    batch = ScriptedBatch(listener)
    batch.plan("smol")
    watch = batch.watch
    items = [chat_item(index) for index in range(count)]
    results = [completed(item) for item in items]
    times = ReleaseTimes(first_ns=0, last_ns=1)
    longest = ReleaseReason.LONGEST
    began = time.perf_counter()
    for index, (item, result) in enumerate(zip(items, results, strict=True)):
        _ = watch.item_staging(item=item, group=0, attempt=1, at_ns=0)
        watch.item_staged(index=index, at_ns=0)
        watch.item_released(index=index, wave=index, wave_key=index, at_ns=0, reason=longest, lane=0)
        watch.wave_released(group=0, wave=index, wave_key=index, item_count=2, others=0, times=times)
        watch.item_first_token(index=index, at_ns=0)
        watch.item_ended(result=result, at_ns=0)
    return (time.perf_counter() - began) / count


def test_what_may_end_badly_is_there_before(counted: Counted) -> None:
    """At 0, since the increase from nothing to the first failure is none to Prometheus."""
    counted.batch().plan("smol")
    text = counted.scrape().text
    for ended in ("completed", "failed", "cancelled", "expired"):
        assert f'unisono_items_total{{backend="desk",model="smol",state="{ended}"}} 0.0' in text
    assert 'unisono_batches_total{state="expired"} 0.0' in text
    assert 'unisono_loads_total{backend="desk",model="smol",outcome="failed"} 0.0' in text


def test_a_batch_that_runs_is_seen(counted: Counted) -> None:
    """From its acceptance to its end, which is counted once."""
    batch = counted.batch()
    assert counted.scrape().value("unisono_batches_running") == 1
    batch.end()
    batch.end()
    assert counted.scrape().value("unisono_batches_running") == 0
    assert METHOD not in counted.scrape().text
