"""Backends, groups and batches → the attributes of their spans."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from unisono.adapters.telemetry import conventions as names
from unisono.adapters.telemetry.content import encodable
from unisono.adapters.telemetry.items import tidy
from unisono.core.model import SlotSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.adapters.telemetry.items import Attributes
    from unisono.core.events import Summary
    from unisono.core.report import Costs, GroupPlanned, GroupReport

# Backends of the last two kinds are llama.cpp's server. The conventions list a name for neither.
_PROVIDERS = {"ollama": "ollama", "llama-server": "llama.cpp", "embedded": "llama.cpp"}
# Reasons that the span of a plan quotes.
_MAX_REASONS = 8


class KnownBackend(Protocol):
    """What a trace says of a backend; every `Backend` is one."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""
        ...

    @property
    def kind(self) -> str:
        """What it is: "ollama", "llama-server" or "embedded"."""
        ...

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        ...


def provider_of(backend: KnownBackend | None) -> str:
    """Who answers there, in a word of the conventions where they have one."""
    return "ollama" if backend is None else _PROVIDERS.get(backend.kind, backend.kind)


def place_of(backend: KnownBackend | None) -> Attributes:
    """Where it is; nothing where that is not known."""
    if backend is None:
        return {}
    place: Attributes = {}
    try:
        url = urlsplit(backend.url)
        host, port = url.hostname, url.port
    except ValueError:
        # A URL that cannot be read is the configuration's business; here it only says nothing.
        return place
    if host:
        place[names.SERVER_ADDRESS] = host
        place[names.SERVER_PORT] = port or (443 if url.scheme == "https" else 80)
    return place


def group_attributes(planned: GroupPlanned) -> Attributes:
    """What is known of a group when it is planned, and never changes."""
    runner = planned.runner
    attributes: Attributes = {
        names.GROUP: planned.group,
        names.BACKEND: encodable(runner.backend),
        names.MODEL: encodable(runner.model),
        names.DIGEST: encodable(runner.digest),
        names.IS_LOADED: planned.is_loaded,
    }
    for option in fields(runner.options):
        value = getattr(runner.options, option.name)
        if value is not None:
            attributes[names.RUNNER_PREFIX + option.name] = value
    if runner.shift is not None:
        attributes[f"{names.RUNNER_PREFIX}shift"] = runner.shift
    return attributes


def changing_attributes(planned: GroupPlanned) -> Attributes:
    """What a later plan, or the report, may say anew of a group."""
    attributes: Attributes = {names.ITEMS: planned.item_count}
    if planned.slots.source is not SlotSource.UNKNOWN:
        attributes[names.SLOTS] = planned.slots.count
        attributes[names.SLOT_SOURCE] = planned.slots.source.value
    state = planned.state
    for name, value in (
        (names.SLOTS_AT_LEAST, state.at_least),
        (names.SLOTS_LIMIT, state.limit),
        (names.SLOTS_REASON, encodable(state.reason)),
        (names.SLOTS_REMEDY, encodable(state.remedy)),
        (names.CONTEXT_REASON, encodable(planned.context_reason)),
        (names.MEMORY_ESTIMATE_BYTES, planned.memory.total_bytes if planned.memory is not None else 0),
        (names.MEMORY_MEASURED_BYTES, planned.measured_bytes),
    ):
        # Zero and nothing both mean: not known.
        if value:
            attributes[name] = value
    return attributes


def plan_attributes(groups: Sequence[GroupPlanned], families: int) -> Attributes:
    """What a plan came to."""
    attributes: Attributes = {
        names.GROUPS: len(groups),
        names.ITEMS: sum(group.item_count for group in groups),
        names.FAMILIES: families,
    }
    # One word for all groups, as a rule; a batch of many models has as many.
    reasons = list(dict.fromkeys(group.context_reason for group in groups if group.context_reason))
    if reasons:
        left_out = [f"and {len(reasons) - _MAX_REASONS} more"] if len(reasons) > _MAX_REASONS else []
        attributes[names.CONTEXT_REASON] = encodable("; ".join([*reasons[:_MAX_REASONS], *left_out]))
    return attributes


def group_figures(report: GroupReport) -> Attributes:
    """What a group came to."""
    figures: Attributes = {
        **changing_attributes(report.group),
        names.PASSES: report.passes.count,
        names.PASSES_METHOD: report.passes.method.value,
        names.PASSES_CONFIDENCE: report.passes.confidence,
        names.PASSES_IMPUTED_SHARE: report.passes.imputed_share,
        names.WAVES: report.waves,
        names.LOADS: report.loads,
        names.PROMPT_TOKENS: report.prompt_tokens,
        names.COMPLETION_TOKENS: report.completion_tokens,
    }
    figures[names.RUNNER_DEATHS] = report.runner_deaths
    figures[names.FAMILIES] = len(report.families)
    if report.families:
        figures[names.LARGEST_FAMILY] = max(family.item_count for family in report.families)
    for reason, idle_s in report.idle_s:
        figures[f"{names.IDLE_PREFIX}{reason.value}{names.IDLE_SUFFIX}"] = idle_s
    for name, value in (
        (names.FEWEST_PASSES, report.fewest_passes),
        (names.PASSES_ITEMS_MEAN, report.items_per_pass),
        (names.CACHED_PROMPT_TOKENS, report.cached_prompt_tokens),
        (names.DURATION_S, report.duration_s),
        (names.ONE_AT_A_TIME_S, report.one_at_a_time_s),
        (names.GAIN, report.gain),
        (names.CONTEXT_USED, report.context_used),
    ):
        if value is not None:
            figures[name] = value
    if report.costs is not None:
        figures.update(_costs(report.costs))
    return {name: tidy(value) if isinstance(value, float) else value for name, value in figures.items()}


def _costs(costs: Costs) -> Attributes:
    figures: Attributes = {
        names.PASSES_COST_S: costs.pass_s,
        names.TOKENS_COST_S: costs.token_s,
        names.PASSES_MEASURED: costs.passes_measured,
    }
    if costs.prompt_token_s is not None:
        figures[names.PROMPT_TOKENS_COST_S] = costs.prompt_token_s
    if costs.single_stream_token_s is not None:
        figures[names.SINGLE_STREAM_TOKENS_COST_S] = costs.single_stream_token_s
    return figures


def batch_figures(summary: Summary) -> Attributes:
    """What a batch came to."""
    report = summary.report
    counts = report.counts
    figures: Attributes = {
        names.STATE: summary.state.value,
        names.ITEMS: counts.completed + counts.failed + counts.cancelled + counts.expired,
        names.ITEMS_COMPLETED: counts.completed,
        names.ITEMS_FAILED: counts.failed,
        names.ITEMS_CANCELLED: counts.cancelled,
        names.ITEMS_EXPIRED: counts.expired,
        names.RETRIES: report.retries,
        names.PASSES: sum(group.passes.count for group in report.groups),
        names.PROMPT_TOKENS: report.prompt_tokens,
        names.COMPLETION_TOKENS: report.completion_tokens,
    }
    if report.cached_prompt_tokens is not None:
        figures[names.CACHED_PROMPT_TOKENS] = report.cached_prompt_tokens
    return figures
