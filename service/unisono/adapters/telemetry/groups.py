"""Backends, groups and batches → the attributes of their spans."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from unisono.adapters.telemetry import conventions as names
from unisono.adapters.telemetry.content import encodable
from unisono.core.model import SlotSource

if TYPE_CHECKING:
    from unisono.adapters.telemetry.items import Attributes
    from unisono.core.events import Summary
    from unisono.core.report import GroupPlanned, GroupReport

# Backends of the last two kinds are llama.cpp's server. The conventions list a name for neither.
_PROVIDERS = {"ollama": "ollama", "llama-server": "llama.cpp", "embedded": "llama.cpp"}


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


def place_of(backend: KnownBackend | None) -> Attributes:
    """Who answers there, and where that is."""
    if backend is None:
        return {names.PROVIDER_NAME: "ollama"}
    place: Attributes = {names.PROVIDER_NAME: _PROVIDERS.get(backend.kind, backend.kind)}
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
    """What is known of a group when it is planned."""
    runner = planned.runner
    attributes: Attributes = {
        names.GROUP: planned.group,
        names.BACKEND: encodable(runner.backend),
        names.REQUEST_MODEL: encodable(runner.model),
        names.DIGEST: encodable(runner.digest),
        names.IS_LOADED: planned.is_loaded,
        **changing_attributes(planned),
    }
    for option in fields(runner.options):
        value = getattr(runner.options, option.name)
        if value is not None:
            attributes[names.RUNNER_PREFIX + option.name] = value
    if runner.shift is not None:
        attributes[f"{names.RUNNER_PREFIX}shift"] = runner.shift
    return attributes


def changing_attributes(planned: GroupPlanned) -> Attributes:
    """What a later plan may say anew of a group."""
    attributes: Attributes = {names.ITEMS: planned.item_count}
    if planned.slots.source is not SlotSource.UNKNOWN:
        attributes[names.SLOTS] = planned.slots.count
        attributes[names.SLOT_SOURCE] = planned.slots.source.value
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
        names.USAGE_INPUT_TOKENS: report.prompt_tokens,
        names.USAGE_OUTPUT_TOKENS: report.completion_tokens,
    }
    if report.fewest_passes is not None:
        figures[names.FEWEST_PASSES] = report.fewest_passes
    if report.items_per_pass is not None:
        figures[names.PASSES_ITEMS_MEAN] = report.items_per_pass
    return figures


def batch_figures(summary: Summary) -> Attributes:
    """What a batch came to."""
    report = summary.report
    counts = report.counts
    return {
        names.STATE: summary.state.value,
        names.ITEMS: counts.completed + counts.failed + counts.cancelled + counts.expired,
        names.ITEMS_COMPLETED: counts.completed,
        names.ITEMS_FAILED: counts.failed,
        names.ITEMS_CANCELLED: counts.cancelled,
        names.ITEMS_EXPIRED: counts.expired,
        names.RETRIES: report.retries,
        names.PASSES: sum(group.passes.count for group in report.groups),
        names.USAGE_INPUT_TOKENS: report.prompt_tokens,
        names.USAGE_OUTPUT_TOKENS: report.completion_tokens,
    }
