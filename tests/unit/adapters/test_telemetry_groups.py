"""What spans of plans and groups say, and that they do not say what nobody knows."""

from __future__ import annotations

from dataclasses import replace

from unisono.adapters.telemetry.groups import changing_attributes, group_figures, plan_attributes
from unisono.core.idle import IdleReason
from unisono.core.model import PassMethod, RunnerSpec, Slots, SlotSource, SlotState
from unisono.core.passes import PassCount
from unisono.core.report import Costs, GroupPlanned, GroupReport

PLANNED = GroupPlanned(
    group=0, runner=RunnerSpec(backend="desk", model="smol", digest="sha256:smol"), item_count=4, is_loaded=True
)
REPORT = GroupReport(
    group=PLANNED,
    passes=PassCount(count=0, method=PassMethod.CREATED_AT, imputed_share=0.0, confidence=0.0),
    fewest_passes=None,
    waves=0,
    first_wave=None,
    loads=0,
    load_s=0.0,
    duration_s=None,
    prompt_tokens=0,
    completion_tokens=0,
)


def test_what_is_not_known_is_not_said() -> None:
    """No zero stands for slots, memory, costs or a gain that nobody has measured."""
    assert changing_attributes(PLANNED) == {"unisono.items": 4}
    assert group_figures(REPORT) == {
        "unisono.items": 4,
        "unisono.passes": 0,
        "unisono.pass_method": "created_at",
        "unisono.pass_confidence": 0.0,
        "unisono.pass_imputed_share": 0.0,
        "unisono.waves": 0,
        "unisono.loads": 0,
        "unisono.runner_deaths": 0,
        "unisono.families": 0,
        "unisono.prompt_tokens": 0,
        "unisono.completion_tokens": 0,
    }
    costs = Costs(pass_s=0.5, token_s=0.0, passes_measured=3)
    said = group_figures(replace(REPORT, costs=costs, cached_prompt_tokens=0, context_used=0.0))
    assert said["unisono.token_cost_s"] == 0.0
    assert said["unisono.cached_prompt_tokens"] == 0
    assert said["unisono.context_used"] == 0.0
    assert {
        "unisono.prompt_token_cost_s",
        "unisono.single_stream_token_cost_s",
        "unisono.gain",
    } & said.keys() == set()


def test_one_slot_is_explained() -> None:
    """Why there is only one, and what to do about it, is on the span."""
    one = Slots(count=1, source=SlotSource.LEARNED)
    state = SlotState(slots=one, at_least=1, limit=1, reason="it was started with one", remedy="give it more slots")
    assert changing_attributes(replace(PLANNED, slots=one, state=state)) == {
        "unisono.items": 4,
        "unisono.slots": 1,
        "unisono.slot_source": "learned",
        "unisono.slots_at_least": 1,
        "unisono.slots_limit": 1,
        "unisono.slots_reason": "it was started with one",
        "unisono.slots_remedy": "give it more slots",
    }


def test_every_reason_for_an_idle_slot_has_a_flat_name() -> None:
    """One attribute a reason."""
    idle = tuple((reason, 0.5) for reason in IdleReason)
    said = group_figures(replace(REPORT, idle_s=idle))
    named = {name for name in said if name.startswith("unisono.idle_")}
    assert named == {f"unisono.idle_{reason.value}_s" for reason in IdleReason}
    assert all(name.count(".") == 1 for name in named)


def test_a_plan_quotes_each_reason_once_and_not_too_many() -> None:
    """A batch of many models has as many contexts; the span stays small."""
    twice = [replace(PLANNED, context_reason="2,048 tokens: asked for")] * 2
    assert plan_attributes(twice, 3) == {
        "unisono.groups": 2,
        "unisono.items": 8,
        "unisono.families": 3,
        "unisono.context_reason": "2,048 tokens: asked for",
    }
    many = [replace(PLANNED, context_reason=f"r{n}") for n in range(20)]
    assert plan_attributes(many, 0)["unisono.context_reason"] == "r0; r1; r2; r3; r4; r5; r6; r7; and 12 more"
    assert "unisono.context_reason" not in plan_attributes([PLANNED], 0)
