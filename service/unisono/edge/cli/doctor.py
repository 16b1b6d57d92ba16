"""`unisono doctor`: which backends and models there are, and what keeps them from sharing passes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import grpc.aio
from google.protobuf.json_format import MessageToDict

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2, server_pb2
from unisono.core.advice import MORE_SLOTS, forced_one_slot
from unisono.edge.cli.connect import Wish, connect
from unisono.edge.cli.errors import ExitCode, problem_of_status, stop_for_call
from unisono.edge.cli.ports import StartServer
from unisono.edge.cli.report import describe_slots
from unisono.edge.cli.terminal import Terminal, emit, paint, printable

# Asking a backend that is away takes as long as its connect timeout.
_PATIENCE_S = 30.0

_WHEN_ONE_OF_SEVERAL = "Start it, or correct its address in UNISONO_BACKENDS. Models that others have are answered."
_WHEN_AWAY = {
    "ollama": "Start it with `ollama serve`, or say where it is with --ollama URL or OLLAMA_HOST. "
    "Without any Ollama, --embedded runs a small model in this process's care.",
    "llama-server": "Start llama-server, or correct its address in the configuration.",
    "embedded": "The embedded engine did not start; it needs the package's extra `embedded` and a model file.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Something to change, or to know."""

    # What it is about: a backend's or a model's name.
    subject: str
    text: str
    # Whether nothing can be answered before it is changed.
    is_blocking: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the service told."""

    target: str
    info: rpc.GetServerInfoResponse
    models: rpc.ListModelsResponse


async def diagnose(wish: Wish, start: StartServer, terminal: Terminal, *, as_json: bool) -> int:
    """Prints what there is; returns the exit code. Raises StopError where there is no service."""

    def say(text: str) -> None:
        terminal.say(f"unisono: {printable(text, one_line=True)}", "dim")

    async with connect(wish, start, say) as connection:
        try:
            info = await connection.stub.GetServerInfo(rpc.GetServerInfoRequest(), timeout=_PATIENCE_S)
            models = await connection.stub.ListModels(rpc.ListModelsRequest(), timeout=_PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            raise stop_for_call(error, connection.target) from error
        found = Findings(target=connection.target, info=info, models=models)
    advice = advise(found)
    if as_json:
        emit(terminal.out, to_json(found, advice), soft_wrap=True)
    else:
        paint(terminal.out, draw(found, advice))
    return ExitCode.ITEMS_FAILED if any(each.is_blocking for each in advice) else ExitCode.DONE


# -- What to change --------------------------------------------------------------------------------------------


def advise(found: Findings) -> list[Advice]:
    """What to change, the most urgent first."""
    if not found.info.backends:
        return [Advice(subject="service", text="No backend is configured.", is_blocking=True)]
    backends = found.info.backends
    advice = [each for backend in backends for each in _advise_backend(backend, found.models.models, len(backends))]
    if len(backends) > 1:
        # What one cannot answer, others may.
        is_usable = any(each.reachable for each in backends) and bool(found.models.models)
        advice = [replace(each, is_blocking=each.is_blocking and not is_usable) for each in advice]
    kinds = {backend.name: backend.kind for backend in backends}
    for model in found.models.models:
        subject = model.name if len(backends) == 1 else f"{model.name} on {model.backend}"
        advice += _advise_model(model, kinds.get(model.backend, ""), subject)
    return _merge(sorted(advice, key=lambda each: not each.is_blocking))


def _advise_backend(
    backend: server_pb2.BackendStatus, models: Iterable[server_pb2.Model], backends: int
) -> list[Advice]:
    if not backend.reachable:
        remedy = _WHEN_AWAY.get(backend.kind, "Is it running?") if backends == 1 else _WHEN_ONE_OF_SEVERAL
        return [Advice(subject=backend.name, text=remedy, is_blocking=True)]
    if not any(model.backend == backend.name for model in models):
        text = "It has no models."
        if backend.kind == "ollama":
            text += " Get one with `ollama pull llama3.2`, or a very small one with `ollama pull smollm2:135m`."
        return [Advice(subject=backend.name, text=text, is_blocking=True)]
    return []


def _advise_model(model: server_pb2.Model, kind: str, subject: str) -> list[Advice]:
    """1. Ollama forces one slot. 2. The settings do. 3. One was seen, or told. 4. Nobody knows. 5. Several: fine.

    At least two are several, though their number is still to be learned.
    """
    slots = best_slots(model)
    forced = forced_one_slot(kind, model.family, is_embedding=is_embedding(model))
    if forced is not None:
        text = f"{forced.reason}. {forced.remedy[:1].upper()}{forced.remedy[1:]}."
    elif slots.count == 1 and slots.source == event_pb2.SLOT_SOURCE_CONFIGURED:
        text = "UNISONO_SLOTS is 1, so no passes are shared: unset it, or set it to the backend's number of slots."
    elif slots.count == 1:
        text = f"It has one slot, so no passes are shared: {MORE_SLOTS.get(kind, 'give it more slots')}."
    elif slots.at_least > 1 and not slots.count:
        return []
    elif not slots.count:
        text = "How many slots it has is learned from the first batch that is larger."
        if kind == "ollama":
            text += f" If it has only one, Ollama's default, no passes are shared: {MORE_SLOTS[kind]}."
    else:
        return []
    return [Advice(subject=subject, text=text)]


def _merge(advice: Sequence[Advice]) -> list[Advice]:
    """The same advice for several models becomes one that names them all."""
    subjects: dict[tuple[str, bool], list[str]] = {}
    for each in advice:
        subjects.setdefault((each.text, each.is_blocking), []).append(each.subject)
    return [
        Advice(subject=_name_some(names), text=text, is_blocking=is_blocking)
        for (text, is_blocking), names in subjects.items()
    ]


def _name_some(names: Sequence[str]) -> str:
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:4])} and {len(names) - 4} more"


def best_slots(model: server_pb2.Model) -> event_pb2.SlotCount:
    """The slots of the model's runner that has most; a model can be loaded in several ways."""
    return max(
        (runner.slots for runner in model.runners),
        key=lambda slots: (slots.count, slots.at_least),
        default=event_pb2.SlotCount(),
    )


def is_embedding(model: server_pb2.Model) -> bool:
    """Whether it can do nothing but embed."""
    return "embedding" in model.capabilities and "completion" not in model.capabilities


# -- What there is ---------------------------------------------------------------------------------------------


def draw(found: Findings, advice: Sequence[Advice]) -> list[str]:
    """All of it as lines; those of headings do not begin with a space."""
    lines = [f"Service {printable(found.info.version) or '(version not told)'} at {found.target}"]
    for backend in found.info.backends:
        lines += ["", *_draw_backend(backend, [m for m in found.models.models if m.backend == backend.name])]
    is_pressing = any(each.is_blocking for each in advice) or not all(one.reachable for one in found.info.backends)
    lines += ["", "To do" if is_pressing else "To share more passes"]
    if not advice:
        lines[-1] = "Nothing to change: every model has several slots."
    for each in advice:
        lines += [f"  {printable(each.subject, one_line=True)}", f"    {printable(each.text, one_line=True)}"]
    return lines


def _draw_backend(backend: server_pb2.BackendStatus, models: Sequence[server_pb2.Model]) -> list[str]:
    kind = " ".join(part for part in (backend.kind, backend.version) if part)
    lines = [printable(f"Backend {backend.name}: {kind}, {backend.url or 'in this process'}", one_line=True)]
    if not backend.reachable:
        why = problem_of_status(backend.error).text if backend.HasField("error") else "no reason told"
        return [*lines, f"  not reachable: {printable(why, one_line=True)}"]
    work = f", {backend.in_flight:,} in flight, {backend.queued:,} queued" if backend.in_flight else ""
    lines.append(f"  reachable{work}")
    if not models:
        lines.append("  no models")
        return lines
    lines += [f"  {row}" for row in _align([_MODEL_HEAD, *(_model_row(model) for model in models)])]
    return lines


_MODEL_HEAD = ("model", "size", "quantized", "context", "can", "loaded", "slots")


def _model_row(model: server_pb2.Model) -> tuple[str, ...]:
    loaded = [runner for runner in model.runners if runner.size_bytes or runner.context_length]
    return (
        printable(model.name, one_line=True),
        model.parameter_size or "?",
        model.quantization or "?",
        f"{model.context_length:,}" if model.context_length else "?",
        ", ".join(model.capabilities) or "?",
        "yes" if loaded else "no",
        describe_slots(best_slots(model)),
    )


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def to_json(found: Findings, advice: Sequence[Advice]) -> str:
    """The same for programs: the service's own messages in their JSON form, and the advice."""
    value = {
        "target": found.target,
        "server": MessageToDict(found.info, preserving_proto_field_name=True),
        "models": MessageToDict(found.models, preserving_proto_field_name=True),
        "advice": [{"subject": each.subject, "text": each.text, "blocking": each.is_blocking} for each in advice],
    }
    return json.dumps(value, indent=2, ensure_ascii=False)
