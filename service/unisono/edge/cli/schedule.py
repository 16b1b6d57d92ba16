"""How a group was scheduled, in words: what was gained, where slot time went unused, what things cost.

Each line is a label and a text; a figure that is not known has no line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from google.protobuf.duration_pb2 import Duration

from unisono._generated.unisono.v1 import event_pb2
from unisono.core.durations import format_duration

# Families that are told one by one; the rest are counted.
_FAMILIES_TOLD = 3
# Unused slot time below this share of all of it says nothing.
_LEAST_SHARE = 0.005

_WHY_IDLE = {
    event_pb2.IDLE_REASON_NO_ITEMS: "no item waited",
    event_pb2.IDLE_REASON_REFILL: "between an item and its successor",
    event_pb2.IDLE_REASON_PREFIX_COST: "another slot would have had to compute a common beginning again",
    event_pb2.IDLE_REASON_PREFIX_PRICE: "what a prompt costs was not known yet",
    event_pb2.IDLE_REASON_TOGETHER: "the end of a wave (TOGETHER)",
    event_pb2.IDLE_REASON_BATCH_LIMIT: "a batch's max_concurrency or items_per_second",
    event_pb2.IDLE_REASON_WINDOW: "gathering requests of several callers",
    event_pb2.IDLE_REASON_SUSPECTS: "items ran apart that may have ended the runner",
    event_pb2.IDLE_REASON_NOT_READY: "the runner was not ready, or it was another's turn",
    event_pb2.IDLE_REASON_MEMORY: "the context's memory was used up (UNISONO_MEMORY_FACTOR)",
    event_pb2.IDLE_REASON_YIELD: "other clients of the backend were let in (UNISONO_YIELD_EVERY)",
}

Figure = tuple[str, str]


def draw_schedule(report: event_pb2.GroupReport) -> list[Figure]:
    """All that is known, in the order in which a reader asks."""
    return [
        *_gain(report),
        *_idle(report),
        *_cached(report),
        *_families(report.families),
        *_costs(report),
        *_context(report),
        *_deaths(report),
    ]


def explain_slots(slots: event_pb2.SlotCount) -> list[Figure]:
    """Why there is only one, and why not all were used."""
    found: list[Figure] = []
    if slots.reason:
        found.append(("", f"{slots.reason}: {slots.remedy}"))
    if slots.limit and slots.count > slots.limit:
        found.append(("", f"{slots.limit:,} used at the end: others used it too, or it was short of memory"))
    return found


def explain_runner(group: event_pb2.GroupPlanned) -> list[Figure]:
    """Why it was loaded as it was, and what that takes."""
    found: list[Figure] = []
    if group.context_reason:
        found.append(("context", group.context_reason))
    if group.HasField("memory"):
        found.append(("memory", _describe_memory(group.memory)))
    return found


def _describe_memory(memory: event_pb2.MemoryEstimate) -> str:
    slots = f"{memory.slots:,} slot{'' if memory.slots == 1 else 's'}"
    text = (
        f"about {_bytes(memory.weights_bytes + memory.kv_cache_bytes)}: {_bytes(memory.weights_bytes)} of weights, "
        f"{_bytes(memory.kv_cache_bytes)} for {slots} of {memory.context_length:,} tokens"
    )
    if memory.HasField("measured_bytes"):
        text += f"; the backend says {_bytes(memory.measured_bytes)}"
    return text


def _gain(report: event_pb2.GroupReport) -> Iterator[Figure]:
    if report.HasField("gain") and report.HasField("one_at_a_time"):
        alone = format_duration(seconds_of(report.one_at_a_time))
        yield "gain", f"{report.gain:.1f} times as fast as one at a time (which would have taken about {alone})"


def _idle(report: event_pb2.GroupReport) -> Iterator[Figure]:
    """Unused slot time, the most first; its share where the slots are known."""
    spans = sorted(((seconds_of(one.slot_time), one.reason) for one in report.idle), reverse=True)
    total_s = sum(span_s for span_s, _ in spans)
    whole_s = report.group.slots.count * seconds_of(report.duration)
    if not spans or not total_s:
        return
    label = "slot time"
    if whole_s >= total_s:
        yield label, f"{1 - total_s / whole_s:.0%} used of {format_duration(whole_s)}, all slots together; unused:"
        label = ""
    told = [(span_s, why) for span_s, why in spans if span_s >= _LEAST_SHARE * max(whole_s, total_s)]
    for span_s, why in told or spans[:1]:
        before = "unused: " if label else ""
        yield label, f"{before}{format_duration(span_s)}, {_WHY_IDLE.get(why, 'for a reason that is not known here')}"
        label = ""


def _cached(report: event_pb2.GroupReport) -> Iterator[Figure]:
    if report.HasField("cached_prompt_tokens") and report.prompt_tokens:
        found, asked = report.cached_prompt_tokens, report.prompt_tokens
        yield "prompt cache", f"{found:,} of {asked:,} prompt tokens were found there ({found / asked:.0%})"


def _families(families: Sequence[event_pb2.FamilyReport]) -> Iterator[Figure]:
    label = "begin alike"
    for family in families[:_FAMILIES_TOLD]:
        times = "once" if family.computed == 1 else f"{family.computed:,} times"
        yield label, f"{family.item_count:,} items, in about {family.prefix_tokens:,} tokens, computed {times}"
        label = ""
    if (rest := len(families) - _FAMILIES_TOLD) > 0:
        yield label, f"… and {rest:,} more famil{'y' if rest == 1 else 'ies'}"


def _costs(report: event_pb2.GroupReport) -> Iterator[Figure]:
    if not report.HasField("costs"):
        return
    costs = report.costs
    # A word of Python's own, which is no attribute.
    one_pass: Duration = getattr(costs, "pass")
    text = f"a pass {_span(one_pass)}, and {_span(costs.token)} for each token in it"
    if costs.HasField("prompt_token"):
        text += f"; a prompt token {_span(costs.prompt_token)}"
    yield "costs", f"{text} ({costs.passes_measured:,} passes measured)"


def _context(report: event_pb2.GroupReport) -> Iterator[Figure]:
    if report.HasField("context_used"):
        yield "context used", f"{report.context_used:.0%} of all slots' at most"


def _deaths(report: event_pb2.GroupReport) -> Iterator[Figure]:
    if report.runner_deaths:
        times = "once" if report.runner_deaths == 1 else f"{report.runner_deaths:,} times"
        yield "runner ended", f"{times} while it answered; its items were run again, the suspects apart"


def _bytes(count: int) -> str:
    """A size for a reader: "1.4 GiB"."""
    for bound, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= bound:
            return f"{count / bound:.1f} {unit}" if count < 10 * bound else f"{count / bound:,.0f} {unit}"
    return f"{count} bytes"


def _span(duration: Duration) -> str:
    return format_duration(seconds_of(duration))


def seconds_of(duration: Duration) -> float:
    """The seconds of a message's duration."""
    return duration.ToNanoseconds() / 1e9
