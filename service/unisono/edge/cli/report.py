"""The report at a batch's end: its figures in words, aligned.

A figure that is not known is left out, or said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unisono._generated.unisono.v1 import event_pb2
from unisono.core.durations import format_duration
from unisono.edge.cli.schedule import draw_schedule, explain_runner, explain_slots, seconds_of
from unisono.edge.cli.terminal import printable

# Failures that are told one by one; the rest are counted.
FAILURES_TOLD = 10
_LABEL_WIDTH = 15

_SLOT_SOURCES = {
    event_pb2.SLOT_SOURCE_CONFIGURED: "stated in the configuration",
    event_pb2.SLOT_SOURCE_TOLD: "told by the backend",
    event_pb2.SLOT_SOURCE_LEARNED: "learned: items were seen waiting while so many ran",
    event_pb2.SLOT_SOURCE_REMEMBERED: "remembered, and not confirmed yet",
}
_METHODS = {
    event_pb2.PASS_METHOD_CREATED_AT: "counted by when the backend made each token",
    event_pb2.PASS_METHOD_ARRIVAL: "counted by when each token arrived",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A line of the file that has no answer."""

    item_id: str
    # How it ended: "failed", "expired", "cancelled".
    state: str
    reason: str
    message: str


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the command itself saw; the service's report may be missing."""

    # Results by state, in words.
    states: dict[str, int] = field(default_factory=dict)
    # The first few failures.
    failures: list[Failure] = field(default_factory=list)
    # Items that were sent, and of which no result came.
    unanswered: int = 0
    # Whether lines of the file were left unread.
    is_cut_short: bool = False
    # Tokens of the answers that came.
    completion_tokens: int = 0
    duration_s: float = 0.0

    def add(self, state: str, failure: Failure | None, tokens: int = 0) -> None:
        """Counts a result."""
        self.states[state] = self.states.get(state, 0) + 1
        self.completion_tokens += tokens
        if failure is not None and len(self.failures) < FAILURES_TOLD:
            self.failures.append(failure)

    @property
    def total(self) -> int:
        """Results of any kind."""
        return sum(self.states.values())

    @property
    def failed(self) -> int:
        """Results that are no answers."""
        return self.total - self.states.get("completed", 0)


def draw_report(tally: Tally, report: event_pb2.Report | None) -> list[str]:
    """The report's lines; those of headings do not begin with a space."""
    lines = ["Report", *_draw_batch(tally, report)]
    for group in report.groups if report else ():
        lines += ["", *draw_group(group)]
    if tally.failures:
        lines += ["", *_draw_failures(tally)]
    return lines


def _draw_batch(tally: Tally, report: event_pb2.Report | None) -> list[str]:
    states = ", ".join(
        f"{tally.states[state]:,} {state}"
        for state in ("completed", "failed", "expired", "cancelled")
        if tally.states.get(state)
    )
    lines = [labelled("items", states or "none ended")]
    if tally.unanswered:
        lines.append(labelled("no result", f"{tally.unanswered:,} that had been sent"))
    if tally.is_cut_short:
        lines.append(labelled("not sent", "the rest of the file"))
    duration_s = seconds_of(report.duration) if report and report.HasField("duration") else tally.duration_s
    lines.append(labelled("time", format_duration(duration_s)))
    answered = report.completion_tokens if report else tally.completion_tokens
    tokens = f"{answered:,} answered"
    if answered and duration_s:
        tokens += f" ({answered / duration_s:,.1f} a second)"
    if report and report.prompt_tokens:
        tokens += f", {report.prompt_tokens:,} of prompts"
        if report.HasField("cached_prompt_tokens"):
            tokens += f" (of these, {report.cached_prompt_tokens:,} found in a cache)"
    lines.append(labelled("tokens", tokens))
    if report:
        lines.append(labelled("retries", f"{report.retries:,}" if report.retries else "none"))
        lines.append(labelled("batch", report.batch_id))
        if report.HasField("counted_since"):
            since = report.counted_since.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
            lines.append(labelled("below", f"what happened since the service was started again ({since} UTC)"))
    return lines


def draw_group(report: event_pb2.GroupReport) -> list[str]:
    """A group's figures under its heading."""
    lines = [name_group(report.group)]
    lines.append(labelled("items", f"{report.group.item_count:,}"))
    lines.append(labelled("slots", describe_slots(report.group.slots)))
    lines += [labelled(label, printable(text, one_line=True)) for label, text in explain_slots(report.group.slots)]
    if runner := describe_runner(report.group):
        lines.append(labelled("loaded with", runner))
    lines += [labelled(label, printable(text, one_line=True)) for label, text in explain_runner(report.group)]
    if report.HasField("passes") and report.passes.count:
        lines.append(
            labelled("passes", f"{report.passes.count:,}, {_METHODS.get(report.passes.method, 'estimated')}")
        )
        lines.append(labelled("", _describe_certainty(report.passes)))
    else:
        lines.append(labelled("passes", "none counted"))
    if report.HasField("fewest_passes"):
        lines.append(labelled("fewest possible", f"{report.fewest_passes:,} passes, on so many slots"))
    elif report.passes.count and not report.group.slots.count:
        lines.append(labelled("fewest possible", "not known until the slots are"))
    if report.items_per_pass:
        lines.append(labelled("items per pass", f"{report.items_per_pass:.1f}"))
    lines += [labelled(label, text) for label, text in draw_schedule(report)]
    lines += _draw_waves(report)
    if report.loads:
        times = "once" if report.loads == 1 else f"{report.loads:,} times"
        lines.append(labelled("model loaded", f"{times}, in {format_duration(seconds_of(report.load_duration))}"))
    elif report.group.loaded:
        lines.append(labelled("model loaded", "already"))
    return lines


def _draw_waves(report: event_pb2.GroupReport) -> list[str]:
    if not report.waves:
        return []
    lines = [labelled("releases", f"{report.waves:,}")]
    if report.HasField("first_wave"):
        first = report.first_wave
        text = f"{first.item_count:,} request{'' if first.item_count == 1 else 's'}"
        if first.item_count > 1:
            text += f" within {format_duration(seconds_of(first.release_spread))}"
        if first.HasField("first_token_spread"):
            text += f", their first tokens within {format_duration(seconds_of(first.first_token_spread))}"
        lines.append(labelled("first release", text))
    return lines


def name_group(group: event_pb2.GroupPlanned) -> str:
    """A group as a heading: "SmolLM2-135M-Instruct on embedded"."""
    return printable(f"{group.model or 'the default model'} on {group.backend}", one_line=True)


def describe_slots(slots: event_pb2.SlotCount) -> str:
    """How many sequences run side by side, and how that is known."""
    source = _SLOT_SOURCES.get(slots.source)
    if not slots.count or source is None:
        if slots.at_least > 1:
            return f"at least {slots.at_least:,}: the number is learned once items have to wait"
        return "not known yet: learned once items have to wait"
    return f"{slots.count:,} ({source})"


def describe_runner(group: event_pb2.GroupPlanned) -> str:
    """The options that the model was loaded with, where any were asked for: "num_ctx 4096"."""
    return ", ".join(f"{option.name} {value}" for option, value in group.runner.ListFields())


def _describe_certainty(count: event_pb2.PassCount) -> str:
    text = f"confidence {count.confidence:.0%}"
    if count.imputed_share:
        text += f"; {_percent(count.imputed_share)} of the participations concluded, not seen"
    return text


def _percent(share: float) -> str:
    return "less than 1%" if share < 0.01 else f"{share:.0%}"


def _draw_failures(tally: Tally) -> list[str]:
    lines = ["Without an answer"]
    for failure in tally.failures:
        lines.append(f"  {printable(failure.item_id, one_line=True)}: {failure.state}, {failure.reason}")
        lines.append(f"    {printable(failure.message, one_line=True)}")
    if (rest := tally.failed - len(tally.failures)) > 0:
        lines.append(f"  … and {rest:,} more")
    return lines


def labelled(label: str, text: str) -> str:
    """A line of a report."""
    return f"  {label:<{_LABEL_WIDTH}}  {text}"


def headings(groups: Sequence[event_pb2.GroupReport]) -> Mapping[int, str]:
    """The name of each group, by number."""
    return {report.group.group: name_group(report.group) for report in groups}
