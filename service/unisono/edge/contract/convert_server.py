"""Plans, models and the state of the service → messages of the contract."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from unisono._generated.unisono.v1 import server_pb2
from unisono.core import model as core
from unisono.core import report
from unisono.core.harmonise import BYTES_PER_TOKEN
from unisono.core.model import SlotSource
from unisono.edge.contract.convert_figures import MAX_FAMILIES, digest_of, group_planned, slot_count
from unisono.edge.contract.convert_out import ID_BYTES, RELEASE_REASONS
from unisono.edge.contract.wire import timestamp
from unisono.edge.status import cut, to_status, utf8

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from unisono.core import plan
    from unisono.core.commands import ReleaseReason
    from unisono.core.errors import UnisonoError
    from unisono.core.limits import Limits
    from unisono.core.model import Item
    from unisono.core.prefixes import Prefix

# Bytes of an error among others in one message: as many as stand there by the contract stay below 4 MiB.
PLAN_ERROR_BYTES: Final = 1024
_WARNING_BYTES: Final = 1024


# -- Plans -----------------------------------------------------------------------------------------------------


def group_plan(
    number: int, group: plan.Group, state: core.SlotState, order: Iterable[tuple[str, ReleaseReason]]
) -> server_pb2.GroupPlan:
    """A group as planned, with those of its items' ids, and why each goes when it does, that stand on this page."""
    order = list(order)
    planned = report.GroupPlanned(
        group=number,
        runner=group.runner,
        item_count=len(group.items),
        is_loaded=group.is_loaded,
        slots=state.slots,
        state=state,
        context_reason=group.context_reason,
        memory=group.memory_with(state.fewest),
        measured_bytes=group.measured_bytes,
    )
    return server_pb2.GroupPlan(
        group=group_planned(planned),
        item_ids=[item_id for item_id, _ in order],
        release_reasons=[RELEASE_REASONS[reason] for _, reason in order],
        estimated_prompt_tokens=group.estimated_prompt_tokens,
        max_completion_tokens=group.max_completion_tokens,
        reason=utf8(group.reason),
        families=_families(group),
    )


def _families(group: plan.Group) -> list[server_pb2.FamilyPlan]:
    """The families among a group's items, the largest first."""
    example: dict[int, tuple[Item, Prefix]] = {}
    counts: Counter[int] = Counter()
    for item, prefix in zip(group.items, group.prefixes, strict=False):
        if prefix is not None:
            _ = example.setdefault(prefix.key, (item, prefix))
            counts[prefix.key] += 1
    return [
        server_pb2.FamilyPlan(
            estimated_prefix_tokens=example[key][1].size // BYTES_PER_TOKEN,
            item_count=count,
            example_item_id=cut(example[key][0].item_id, ID_BYTES),
        )
        for key, count in counts.most_common(MAX_FAMILIES)
    ]


def plan_warning(warned: plan.Warned, prefix: str = "") -> server_pb2.PlanWarning:
    """Something that will work, but perhaps not as meant; `prefix` ("items[3].") goes before the field's path."""
    return server_pb2.PlanWarning(
        item_id=cut(warned.item_id, ID_BYTES),
        field=prefix + warned.field if warned.field else "",
        reason=warned.reason,
        message=cut(warned.message, _WARNING_BYTES),
    )


def plan_refusal(item_id: str, index: int, error: UnisonoError) -> server_pb2.PlanRefusal:
    """An item of a request that would fail at once; the paths of its fields are those of the request."""
    status = to_status(error, f"items[{index}].", max_bytes=PLAN_ERROR_BYTES)
    return server_pb2.PlanRefusal(item_id=cut(item_id, ID_BYTES), index=index, error=status)


# -- The service -----------------------------------------------------------------------------------------------


def model(info: core.ModelInfo, runners: Iterable[server_pb2.RunnerStatus] = ()) -> server_pb2.Model:
    """A model that a backend can load, with the runners of it that are known."""
    return server_pb2.Model(
        backend=info.backend,
        name=utf8(info.name),
        digest=digest_of(info.digest, info.name),
        family=utf8(info.family),
        parameter_size=utf8(info.parameter_size),
        quantization=utf8(info.quantization),
        context_length=info.context_length,
        capabilities=sorted(map(utf8, info.capabilities or ())),
        size_bytes=info.size_bytes,
        runners=runners,
    )


def runner_status(loaded: core.LoadedRunner, state: core.SlotState | None = None) -> server_pb2.RunnerStatus:
    """A model in a backend's memory, with its slots: as known here, or else as the backend tells."""
    if state is None or not (state.slots.count or state.at_least):
        told = loaded.slots or 0
        slots = core.Slots(count=told, source=SlotSource.TOLD if told else SlotSource.UNKNOWN)
        state = replace(state or core.SlotState(), slots=slots)
    return server_pb2.RunnerStatus(
        model=utf8(loaded.model),
        digest=digest_of(loaded.digest, loaded.model),
        context_length=loaded.context_length,
        size_bytes=loaded.size_bytes,
        size_vram_bytes=loaded.size_vram_bytes,
        expires_at=None if loaded.expires_at_ns is None else timestamp(loaded.expires_at_ns),
        slots=slot_count(state.slots, state),
    )


def runners(
    digest: str | None, loaded: Iterable[core.LoadedRunner], known: Mapping[core.RunnerSpec, core.SlotState]
) -> list[server_pb2.RunnerStatus]:
    """The runners of one model, by its digest: those in memory, then others whose slots are known.

    None: of all models, those in memory alone. `known` is what one backend's runners have shown.
    """
    rows: list[server_pb2.RunnerStatus] = []
    left = {spec: state for spec, state in known.items() if state.slots.count or state.at_least}
    for there in loaded:
        if digest in (None, there.digest):
            own = [spec for spec in left if _is(spec, there)]
            rows.append(runner_status(there, left[own[0]] if own else None))
            for spec in own:
                del left[spec]
    for spec, state in left.items():
        if digest == spec.digest:
            gone = core.LoadedRunner(model=spec.model, digest=spec.digest, context_length=spec.options.num_ctx or 0)
            rows.append(runner_status(gone, state))
    return rows


def _is(spec: core.RunnerSpec, there: core.LoadedRunner) -> bool:
    """Whether what is in memory is this runner, as far as a backend tells."""
    return spec.digest == there.digest and spec.options.num_ctx in (None, there.context_length)


def server_limits(limits: Limits, *, max_receive_bytes: int, max_send_bytes: int) -> server_pb2.ServerLimits:
    """The limits of the service, with those of its messages."""
    return server_pb2.ServerLimits(
        max_items=limits.max_items,
        max_item_text_bytes=limits.max_item_text_bytes,
        max_image_bytes=limits.max_image_bytes,
        max_receive_bytes=max_receive_bytes,
        max_send_bytes=max_send_bytes,
        max_batches=limits.max_batches,
        max_journal_bytes=limits.max_journal_bytes,
    )
