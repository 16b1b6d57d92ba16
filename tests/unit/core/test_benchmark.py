"""The arithmetic of measurements."""

from __future__ import annotations

import pytest

from unisono.core.benchmark import (
    Advice,
    AdviceKind,
    BatchRun,
    Step,
    advise,
    best_size,
    describe_advice,
    flattens_at,
    ratios,
    share_between,
    spread,
    steps_of,
)


def run(items: int, tokens_per_s: float, *, passes: int | None = None) -> BatchRun:
    """A batch that took a second."""
    return BatchRun(
        items=items,
        duration_s=1.0,
        latencies_s=(0.5, 1.0, 0.75),
        completion_tokens=round(tokens_per_s),
        passes=passes,
    )


def gains(**by_size: float) -> tuple[Step, ...]:
    """Steps of these gains: `gains(_1=1, _2=1.8)`."""
    return steps_of(run(int(size[1:]), gain * 100) for size, gain in by_size.items())


def test_a_spread_is_the_median_and_the_extremes() -> None:
    """Of an even number of values the median lies between the middle two."""
    found = spread([3.0, 1.0, 8.0, 2.0])
    assert (found.median, found.low, found.high, found.count) == (2.5, 1.0, 8.0, 4)
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_ratios_are_to_the_best_of_each_run() -> None:
    """The best of the others differs from run to run; a run without a side, or with 0 to divide by, gives none."""
    ours = {0: 2.0, 1: 3.0, 2: 5.0, 3: 1.0}
    assert ratios(ours, [{0: 4.0, 1: 6.0, 3: 0.0}, {0: 5.0, 1: 2.0}]) == [0.5, 1.5]
    assert ratios(ours, []) == []


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # Wilson's interval of 95 %, as in the tables of Newcombe, 1998.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_a_share_lies_between(count: int, total: int, low: float, high: float) -> None:
    """Known intervals."""
    least, most = share_between(count, total)
    assert least == pytest.approx(low, abs=5e-5)
    assert most == pytest.approx(high, abs=5e-5)


def test_steps_tell_speed_latency_and_gain() -> None:
    """Each size's medians, and what it gives beside the first; empty batches count for nothing."""
    steps = steps_of(
        [
            run(4, 300, passes=100),
            run(1, 100),
            run(1, 120),
            run(4, 330, passes=110),
            run(4, 360, passes=0),
            BatchRun(items=2, duration_s=1.0, latencies_s=(), completion_tokens=1),
            BatchRun(items=2, duration_s=0.0, latencies_s=(1.0,), completion_tokens=1),
            BatchRun(items=2, duration_s=1.0, latencies_s=(1.0,), completion_tokens=0),
        ]
    )
    assert [step.items for step in steps] == [1, 4]
    one, four = steps
    assert (one.gain, one.tokens_per_s.median, one.items_per_pass, one.latency_s.median) == (1.0, 110, None, 0.75)
    assert (four.gain, four.tokens_per_s.low, four.tokens_per_s.high) == (3.0, 300, 360)
    assert (four.items_per_pass, four.duration_s.count) == (3.0, 3)


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        ((), None),
        (gains(_1=1), None),
        (gains(_1=1, _2=1.9, _4=3.5), None),
        (gains(_1=1, _2=1.9, _4=3.5, _8=3.6), 4),
        (gains(_1=1, _2=1.05), 1),
        # A dip is not the end.
        (gains(_1=1, _2=0.9, _4=3.0, _8=3.1), 4),
    ],
)
def test_where_the_gain_is_flat(steps: tuple[Step, ...], size: int | None) -> None:
    """Where no larger batch brings a tenth more; never the largest."""
    assert flattens_at(steps) == size


@pytest.mark.parametrize(
    ("steps", "slots", "advice"),
    [
        (gains(_1=1, _2=1.8), None, Advice(kind=AdviceKind.UNKNOWN, slots=None)),
        (gains(_1=1, _2=1.8, _4=1.8), None, Advice(kind=AdviceKind.FLAT, slots=2)),
        (gains(_1=1, _2=1.0), 1, Advice(kind=AdviceKind.RAISE, slots=8)),
        (gains(_1=1, _2=1.8, _4=1.8, _8=1.8), 8, Advice(kind=AdviceKind.FEWER_DO, slots=2)),
        (gains(_1=1, _2=1.8, _4=3.4, _8=6.0, _16=6.2), 8, Advice(kind=AdviceKind.TRY_MORE, slots=16)),
        (gains(_1=1, _2=1.8, _4=3.4, _8=3.9, _16=4.0), 8, Advice(kind=AdviceKind.RIGHT, slots=8)),
        (gains(_8=1, _16=2), 8, Advice(kind=AdviceKind.RIGHT, slots=8)),
        ((), 4, Advice(kind=AdviceKind.RIGHT, slots=4)),
    ],
)
def test_advice(steps: tuple[Step, ...], slots: int | None, advice: Advice) -> None:
    """What to set, from what was seen."""
    assert advise(steps, slots) == advice


def test_the_best_size_is_where_the_gain_is_flat() -> None:
    """Or the largest that was measured, where it is not flat yet."""
    assert [best_size(steps) for steps in (gains(_1=1, _2=1.8, _4=1.8), gains(_1=1, _2=1.8), ())] == [2, 2, 0]


@pytest.mark.parametrize("kind", list(AdviceKind))
def test_advice_is_a_sentence(kind: AdviceKind) -> None:
    """It names the number that it is about, and the setting of an Ollama only for an Ollama."""
    words = [describe_advice(Advice(kind=kind, slots=6), is_ollama=is_ollama) for is_ollama in (True, False)]
    assert all(text[0].isupper() and text.endswith(".") for text in words)
    assert all("6" in text for text in words) or kind is AdviceKind.UNKNOWN
    assert "OLLAMA" not in words[1]
