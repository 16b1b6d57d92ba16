"""What a meter learns from when tokens come."""

from __future__ import annotations

import random

import pytest

from tests.unit.core.processor import Processor
from unisono.core.capacity import Capacity
from unisono.core.commands import Work
from unisono.core.conductor import Conductor
from unisono.core.costs import BYTES_PER_TOKEN, UNKNOWN_LENGTH, CostMeter


def speak(meter: CostMeter, members: int, passes: int, pass_s: float, now: float) -> float:
    """So many passes of the same members, one after the other; answers with the time of the last."""
    for _ in range(passes):
        now += pass_s
        for ticket in range(members):
            meter.spoke(ticket, now)
    return now


# -- Passes ------------------------------------------------------------------------------------------------------


def test_nothing_is_known_before_a_pass_was_timed() -> None:
    """A first token has no interval before it."""
    meter = CostMeter()
    assert meter.costs is None
    meter.spoke(0, 1.0)
    assert meter.costs is None
    assert meter.prompt_token_s is None


def test_half_of_a_pass_is_taken_for_fixed_until_more_is_known() -> None:
    """Passes of one size tell their time, and not how it divides: that is assumed, and called measured by nobody."""
    meter = CostMeter()
    _ = speak(meter, 4, 20, 0.040, 0.0)
    costs = meter.costs
    assert costs is not None
    assert costs.pass_s == pytest.approx(0.020)
    assert costs.token_s == pytest.approx(0.005)
    assert meter.measured is None
    assert costs.single_stream_token_s is None


def test_passes_of_two_sizes_tell_both_parts() -> None:
    """A pass of one takes 12 ms and one of eight 26 ms: 10 ms, and 2 ms a token."""
    meter = CostMeter()
    now = speak(meter, 1, 20, 0.012, 0.0)
    meter.left(0)
    _ = speak(meter, 8, 20, 0.026, now)
    costs = meter.costs
    assert costs is not None
    assert costs.pass_s == pytest.approx(0.010)
    assert costs.token_s == pytest.approx(0.002)
    assert costs.single_stream_token_s == pytest.approx(0.012)


def test_drafted_tokens_are_of_the_pass_that_gave_the_one_before() -> None:
    """Three tokens for each member: a pass of one takes 12 ms and one of eight 26 ms, so 10 ms, and 2 ms a member."""
    meter = CostMeter()
    now = 0.0
    for members, pass_s in ((1, 0.012), (8, 0.026)):
        for _ in range(20):
            now += pass_s
            for ticket in range(members):
                for place in range(3):
                    meter.spoke(ticket, now + place * 1e-5, is_drafted=place > 0)
        for ticket in range(members):
            meter.left(ticket)
    costs = meter.costs
    assert costs is not None
    assert meter.tokens_a_pass == pytest.approx(3)
    assert costs.pass_s == pytest.approx(0.010)
    assert costs.token_s == pytest.approx(0.002 / 3)
    assert costs.single_stream_token_s == pytest.approx(0.012 / 3)


def test_a_draft_beside_a_prompt_is_of_no_stretch() -> None:
    """What came while passes were not even tells nothing of how many tokens a pass gives."""
    meter = CostMeter()
    now = speak(meter, 1, 20, 0.010, 0.0)
    meter.prompt_begun(4_000, now)
    for _ in range(10):
        now += 0.030
        meter.spoke(0, now)
        meter.spoke(0, now, is_drafted=True)
    meter.prompt_done(now)
    _ = speak(meter, 1, 20, 0.010, now)
    assert meter.tokens_a_pass == 1


@pytest.mark.parametrize("of_eight_s", [0.020, 0.030, 0.250])
def test_parts_that_cannot_be_told_apart_are_not_called_measured(of_eight_s: float) -> None:
    """Eight members as quick as one, quicker, or more than eight times as slow; what one costs alone is known."""
    meter = CostMeter()
    now = speak(meter, 1, 100, 0.030, 0.0)
    meter.left(0)
    now = speak(meter, 8, 100, of_eight_s, now)
    measured, timed = meter.measured, meter.timed
    assert measured is None
    assert timed is not None
    assert timed.single_stream_token_s == pytest.approx(0.030)
    # Until they can.
    for ticket in range(8):
        meter.left(ticket)
    _ = speak(meter, 8, 2_000, 0.080, now)
    later = meter.measured
    assert later is not None
    assert later.token_s > 0


def test_larger_passes_that_are_quicker_cost_nothing_a_token() -> None:
    """An accident of a busy machine makes no cost negative."""
    meter = CostMeter()
    now = speak(meter, 1, 20, 0.030, 0.0)
    meter.left(0)
    _ = speak(meter, 8, 20, 0.020, now)
    costs = meter.costs
    assert costs is not None
    assert costs.token_s == 0
    assert costs.pass_s > 0


def test_a_change_is_followed() -> None:
    """A machine that becomes twice as slow is known to be so after some hundred passes."""
    meter = CostMeter()
    now = speak(meter, 2, 2_000, 0.010, 0.0)
    _ = speak(meter, 2, 1_500, 0.020, now)
    costs = meter.costs
    assert costs is not None
    assert costs.pass_s + 2 * costs.token_s == pytest.approx(0.020, rel=0.06)


def test_a_pause_between_two_items_is_no_pass() -> None:
    """When somebody has left, the time to the next token of another belongs to no pass."""
    meter = CostMeter()
    now = speak(meter, 2, 10, 0.010, 0.0)
    meter.left(0)
    _ = speak(meter, 2, 10, 0.010, now + 60.0)
    costs = meter.costs
    assert costs is not None
    assert costs.pass_s + 2 * costs.token_s == pytest.approx(0.010)


# -- Prompts -----------------------------------------------------------------------------------------------------


def test_an_episode_is_taken_as_a_whole() -> None:
    """Two prompts of 500 tokens that overlap for 1 s cost 1 ms a token."""
    meter = CostMeter()
    meter.prompt_begun(2_000, 10.0)
    meter.prompt_begun(2_000, 10.1)
    meter.prompt_done(10.5)
    assert meter.prompt_token_s is None
    meter.prompt_done(11.0)
    assert meter.prompt_token_s == pytest.approx(0.001)


def test_passes_between_prompts_are_not_theirs() -> None:
    """Of 1 s in which 1,000 tokens of prompt were computed, ten passes took 0.2 s, and the last, of one, 0.015."""
    meter = CostMeter()
    now = speak(meter, 2, 20, 0.020, 0.0)
    meter.prompt_begun(4_000, now)
    # The first of these only begins: what was before it was disturbed.
    _ = speak(meter, 2, 11, 0.020, now)
    meter.prompt_done(now + 1.0)
    assert meter.prompt_token_s == pytest.approx(0.000785)


def test_passes_of_unknown_cost_are_not_taken_off() -> None:
    """Before a pass was timed, all of an episode counts as prompt."""
    meter = CostMeter()
    meter.prompt_begun(4_000, 0.0)
    _ = speak(meter, 1, 3, 0.020, 0.0)
    meter.prompt_done(1.0)
    assert meter.prompt_token_s == pytest.approx(0.001)


def test_short_prompts_tell_nothing() -> None:
    """An episode of 50 tokens is mostly something else."""
    meter = CostMeter()
    meter.prompt_begun(200, 0.0)
    meter.prompt_done(5.0)
    assert meter.prompt_token_s is None


def test_a_lost_prompt_spoils_its_episode() -> None:
    """Of one that went away, nobody knows how much was computed; the next episode counts again."""
    meter = CostMeter()
    meter.prompt_begun(4_000, 0.0)
    meter.prompt_begun(400, 0.0)
    meter.prompt_lost()
    meter.prompt_done(7.0)
    assert meter.prompt_token_s is None
    meter.prompt_begun(4_000, 8.0)
    meter.prompt_done(9.0)
    assert meter.prompt_token_s == pytest.approx(0.001)


def test_what_a_pass_consists_of_is_not_forgotten() -> None:
    """After thousands of passes with four members, which by themselves do not tell it."""
    meter = CostMeter()
    now = speak(meter, 1, 20, 0.012, 0.0)
    meter.left(0)
    now = speak(meter, 8, 20, 0.026, now)
    for ticket in range(4, 8):
        meter.left(ticket)
    _ = speak(meter, 4, 5_000, 0.018, now)
    costs = meter.measured
    assert costs is not None
    assert costs.pass_s == pytest.approx(0.010, rel=0.02)
    assert costs.token_s == pytest.approx(0.002, rel=0.02)


def test_a_handful_of_passes_decides_and_is_not_told() -> None:
    """Ten passes each of one and two members serve to choose by; they are called measured after a hundred."""
    meter = CostMeter()
    now = speak(meter, 1, 10, 0.020, 0.0)
    now = speak(meter, 2, 10, 0.030, now)
    known = meter.costs_to_join(2)
    assert known is not None
    assert known.pass_s == pytest.approx(0.010, rel=0.25)
    assert meter.measured is None
    meter.left(1)
    now = speak(meter, 1, 50, 0.020, now)
    _ = speak(meter, 2, 50, 0.030, now)
    assert meter.measured is not None


def test_a_second_lane_is_tried_in_hope() -> None:
    """From one lane nobody learns what is shared: most, for one lane more; nothing for a third until it is known."""
    meter = CostMeter()
    assert meter.costs_to_join(0) is None
    now = speak(meter, 1, 20, 0.020, 0.0)
    hope = meter.costs_to_join(1)
    assert hope is not None
    assert hope.pass_s == pytest.approx(0.018)
    assert meter.costs_to_join(2) is None
    _ = speak(meter, 2, 20, 0.030, now)
    for taken in (1, 2):
        known = meter.costs_to_join(taken)
        assert known is not None
        assert known.pass_s == pytest.approx(0.010, rel=0.15)


def test_what_nobody_tells_is_assumed_in_the_end() -> None:
    """Answers of one token beside others: after 16 of them, half of a pass counts as shared."""
    meter = CostMeter()
    now = speak(meter, 1, 20, 0.020, 0.0)
    meter.left(0)
    for ticket in range(100, 116):
        assert meter.costs_to_join(2) is None
        for beside in (ticket, -ticket):
            meter.spoke(beside, now)
            now += 0.030
        meter.left(ticket)
        meter.left(-ticket)
        meter.left(-ticket)
    assert meter.costs_to_join(2) == meter.costs
    assert meter.costs is not None
    assert meter.costs.pass_s == pytest.approx(0.010)


def test_several_lanes_are_joined_by_what_is_assumed() -> None:
    """Passes of four members tell that something is shared, and lanes that end at different times will tell what."""
    meter = CostMeter()
    _ = speak(meter, 4, 20, 0.040, 0.0)
    assert meter.costs_to_join(4) == meter.costs


def test_bytes_a_token_are_learned() -> None:
    """The backend's own counts replace the guess; a prompt without text or count tells nothing."""
    meter = CostMeter()
    assert meter.tokens(400) == 400 / BYTES_PER_TOKEN
    meter.counted(prompt_tokens=0, prompt_bytes=100)
    meter.counted(prompt_tokens=100, prompt_bytes=0)
    assert meter.bytes_per_token == BYTES_PER_TOKEN
    meter.counted(prompt_tokens=100, prompt_bytes=200)
    assert meter.tokens(400) == pytest.approx(200)


@pytest.mark.parametrize("seed", range(8))
def test_costs_are_learned_through_a_conductor(seed: int) -> None:
    """From arrivals that are up to 3 ms late, all three costs come within 10 % of what the runner's are."""
    rng = random.Random(seed)
    world = Processor(
        conductor=Conductor(Capacity(configured=8)),
        slots=8,
        pass_s=0.020,
        token_s=0.002,
        prompt_token_s=0.001,
        late_s=lambda: rng.uniform(0.0, 0.003),
    )
    world.lengths = {n: rng.randint(10, 150) for n in range(80)}
    world.add([Work(ticket=n, batch=0, num_predict=200, prompt_bytes=rng.randint(800, 3_000)) for n in range(80)])
    _ = world.run()
    costs = world.conductor.figures.costs
    assert costs is not None
    assert costs.pass_s == pytest.approx(0.020, rel=0.1)
    assert costs.token_s == pytest.approx(0.002, rel=0.1)
    assert costs.prompt_token_s == pytest.approx(0.001, rel=0.1)


# -- Lengths -----------------------------------------------------------------------------------------------------


def test_lengths_of_which_nothing_is_known() -> None:
    """The bound is the guess; without one, some fixed number."""
    meter = CostMeter()
    assert meter.expected_length(80, 0) == 80
    for none in (None, -1, 0):
        assert meter.expected_length(none, 0) == UNKNOWN_LENGTH


def test_lengths_are_a_share_of_the_bound() -> None:
    """Where four answers used a quarter of their bounds, the next will; and nothing is shorter than a token."""
    meter = CostMeter()
    for _ in range(4):
        assert meter.expected_length(400, 1) == 400
        meter.answered(25, 100, 1)
    assert meter.expected_length(400, 1) == pytest.approx(100)
    assert meter.expected_length(2, 1) == 1
    assert meter.expected_length(None, 1) == pytest.approx(25)


def test_lengths_without_bounds_say_nothing_of_a_share() -> None:
    """A bound is taken as it is, where no answer before had one."""
    meter = CostMeter()
    for _ in range(5):
        meter.answered(25, None, 1)
    assert meter.expected_length(400, 1) == 400
    assert meter.expected_length(None, 1) == pytest.approx(25)


@pytest.mark.parametrize("bound", [None, 100])
def test_how_much_lengths_surprise(bound: int | None) -> None:
    """Nothing, until four are known or as long as all are alike; half of what was expected, for 25 and 75 tokens."""
    meter = CostMeter()
    for _ in range(3):
        meter.answered(25, bound, 1)
    assert meter.surprise(1) == 0
    meter.answered(25, bound, 1)
    assert meter.surprise(1) == pytest.approx(0, abs=1e-6)
    for _ in range(500):
        meter.answered(25, bound, 2)
        meter.answered(75, bound, 2)
    assert meter.surprise(2) == pytest.approx(0.5, rel=0.02)
    assert meter.surprise(1) == pytest.approx(0, abs=1e-6)


def test_answers_without_a_token_surprise_nobody() -> None:
    """There is nothing to be a part of."""
    meter = CostMeter()
    for _ in range(4):
        meter.answered(0, 10, 1)
    assert meter.surprise(1) == 0


def test_a_family_has_lengths_of_its_own() -> None:
    """Its own answers count once there are four, and everybody's until then."""
    meter = CostMeter()
    for _ in range(4):
        meter.answered(10, None, 1)
        meter.answered(90, None, 2)
    assert meter.expected_length(None, 1) == pytest.approx(10)
    assert meter.expected_length(None, 2) == pytest.approx(90)
    assert 45 < meter.expected_length(None, 3) < 55


def test_no_more_than_a_thousand_families_are_remembered() -> None:
    """The next one makes it forget the others, not what all have in common."""
    meter = CostMeter()
    for key in range(1_000):
        for _ in range(4):
            meter.answered(10, None, key)
    assert meter.expected_length(None, 1) == pytest.approx(10)
    for _ in range(4):
        meter.answered(500, None, 1_000)
    everybody = meter.expected_length(None, -1)
    assert meter.expected_length(None, 1) == everybody
    assert meter.expected_length(None, 1_000) == pytest.approx(500)
