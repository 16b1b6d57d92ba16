"""What each model gains by sharing passes, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from unisono._generated.unisono.v1 import event_pb2
from unisono.bench.models import ModelFigures
from unisono.bench.table import number
from unisono.core.benchmark import Step, describe_advice, flattens_at
from unisono.core.durations import format_duration
from unisono.edge.cli.terminal import printable

_SAMPLE_CHARACTERS = 160
_SOURCES = {
    event_pb2.SLOT_SOURCE_CONFIGURED: "stated in the configuration",
    event_pb2.SLOT_SOURCE_TOLD: "told by the backend",
    event_pb2.SLOT_SOURCE_LEARNED: "learned",
}
_HEAD = f"  {'items':>5}  {'answer takes':>14}  {'all take':>10}  {'tokens/s':>18}  {'gain':>6}  {'items/pass':>10}"


def draw_models(found: Iterable[ModelFigures], *, is_ollama: bool) -> list[str]:
    """A block for each model: its steps, a sample of its answers, and what to set."""
    lines: list[str] = []
    for each in found:
        lines += [printable(each.model, one_line=True)]
        if each.error:
            lines += [f"  could not be measured: {printable(each.error, one_line=True)}", ""]
            continue
        lines += [_HEAD, *(_line(step) for step in each.steps), ""]
        lines.append(f"  asked: {each.question}")
        lines.append(f"  said:  {_short(each.sample)}")
        lines += [f"  {line}" for line in advice_lines(each, is_ollama=is_ollama)]
        lines.append("")
    return lines[:-1]


def _line(step: Step) -> str:
    speed = number(step.tokens_per_s.median)
    if step.tokens_per_s.count > 1:
        speed += f" ({number(step.tokens_per_s.low)}–{number(step.tokens_per_s.high)})"
    shared = f"{step.items_per_pass:.1f}" if step.items_per_pass else "–"
    return (
        f"  {step.items:>5}  {format_duration(step.latency_s.median):>14}  "
        f"{format_duration(step.duration_s.median):>10}  {speed:>18}  {step.gain:>5.1f}×  {shared:>10}"
    )


def _short(text: str) -> str:
    line = printable(text, one_line=True)
    return line if len(line) <= _SAMPLE_CHARACTERS else line[: _SAMPLE_CHARACTERS - 1] + "…"


def advice_lines(found: ModelFigures, *, is_ollama: bool) -> list[str]:
    """How many slots there are, where the gain is flat, and what to set."""
    slots = "slots: not known yet" if found.slots is None else f"slots: {found.slots} ({_source(found)})"
    flat = flattens_at(found.steps)
    most = found.steps[-1].items if found.steps else 0
    where = f"no flat part up to {most} items" if flat is None else f"flat from {flat} items on"
    return [f"{slots}; gain: {where}", f"advice: {describe_advice(found.advice, is_ollama=is_ollama)}"]


def _source(found: ModelFigures) -> str:
    return _SOURCES.get(found.slot_source, "not known how")


def models_as_json(found: Iterable[ModelFigures]) -> dict[str, object]:
    """The same for programs."""
    return {
        "models": [
            {
                "model": each.model,
                "error": each.error or None,
                "steps": [asdict(step) for step in each.steps],
                "slots": each.slots,
                "flat_from_items": flattens_at(each.steps),
                "advice": {"kind": each.advice.kind.value, "slots": each.advice.slots},
                "sample": {"question": each.question, "answer": each.sample},
            }
            for each in found
        ]
    }
