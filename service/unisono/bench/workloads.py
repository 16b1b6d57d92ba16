"""The workloads: what is asked, by seed. Pure.

Of one workload, run and side, the same seed gives the same requests. Sides get the same lengths and the same words,
but each prompt begins with a number of its own (`salt`), so that no side finds in a slot's cache what another one
left there. Where a workload is about a warm prefix, its second phase repeats the first one's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

# Plain words, most of them one token for most tokenizers.
# fmt: off
_WORDS = (
    "river", "stone", "light", "house", "garden", "winter", "morning", "table", "paper", "market", "window", "bridge",
    "people", "water", "story", "summer", "forest", "village", "music", "letter", "mountain", "kitchen", "school",
    "evening", "travel", "island", "doctor", "engine", "silver", "corner", "harvest", "library", "captain", "shadow",
    "harbor", "blanket", "candle", "mirror", "orchard", "valley",
)
# fmt: on
_SHORTEST, _LONGEST = 6, 200
# The exponent of the tail: some answers are thirty times as long as most.
_TAIL = 0.9


class Figure(Enum):
    """What is measured; of all of them less is better, but for the last."""

    SECONDS = "time, s"
    PASSES = "passes ÷ fewest possible"
    PROMPT = "prompt tokens ÷ least possible"
    LOADS = "loads"
    LOST = "lost items"
    LATENCY = "median latency, s"
    RSS = "memory growth, MB"
    ITEMS_PER_S = "items/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    name: str
    # "" for none.
    system: str = ""
    user: str
    num_predict: int
    # Which of the workload's prefix families it belongs to; those of one family begin alike.
    family: int | None = None
    num_ctx: int | None = None
    # Which of the backend's models: its place in the list.
    model: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Requests that are sent as one batch."""

    # Such as "cold"; "" where the workload has one phase only.
    name: str = ""
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the requests depend on."""

    # How many the backend computes side by side.
    slots: int
    # The repeat, which chooses lengths and orders, and the side, which does not.
    run: int = 0
    side: int = 0
    # A tenth of the work or so, for a first look and for tests.
    is_quick: bool = False
    # As much as the workload knows of.
    is_full: bool = False

    @property
    def salt(self) -> str:
        """A number that no other side's prompts have; always as long."""
        return f"{self.run % 1000:03d}{self.side % 100:02d}"


class Sending(Enum):
    """How a workload's requests are sent."""

    # All of a phase as one batch.
    BATCH = "batch"
    # By so many callers as the workload says, each one request after the other, on its own.
    CALLERS = "callers"
    # As one stream of items.
    STREAM = "stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of work."""

    name: str
    # For people, short.
    title: str
    build: Callable[[Shape, random.Random], tuple[Phase, ...]]
    # What matters of it, the most telling first.
    figures: tuple[Figure, ...]
    sending: Sending = Sending.BATCH
    # Whether it needs a backend that loads models on demand: an Ollama.
    loads: bool = False
    # Whether the model must not be loaded when it begins.
    is_cold: bool = False
    # How many models it mixes.
    models: int = 1
    # Sides that are left out, by name: what nobody would do, or cannot be waited for.
    without: tuple[str, ...] = ()

    def phases(self, shape: Shape) -> tuple[Phase, ...]:
        """The requests; the seed is the workload's name and the run, so that all sides have the same lengths."""
        return self.build(shape, random.Random(f"{self.name}/{shape.run}"))  # noqa: S311 - no secret: the same seed must give the same work


def words(rng: random.Random, count: int) -> str:
    """So many words."""
    return " ".join(rng.choice(_WORDS) for _ in range(count))


def heavy_tail(rng: random.Random, longest: int = _LONGEST) -> int:
    """A length between 6 and 200: most are short, a few very long."""
    return min(longest, int(_SHORTEST * rng.paretovariate(_TAIL)))


def _story(
    shape: Shape, number: int, rng: random.Random, num_predict: int, *, num_ctx: int | None = None, model: int = 0
) -> Ask:
    """A request of its own, that makes a model talk for long."""
    return Ask(
        name=f"{shape.salt}-{number:05d}",
        user=f"{shape.salt}{number:05d}. Write a very long story about a {words(rng, 3)}.",
        num_predict=num_predict,
        num_ctx=num_ctx,
        model=model,
    )


def _equal(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    num_predict = 12 if shape.is_quick else 64
    return (Phase(asks=tuple(_story(shape, n, rng, num_predict) for n in range(shape.slots))),)


def _tailed(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    count, longest = (shape.slots * 2, 40) if shape.is_quick else (shape.slots * 8, _LONGEST)
    return (Phase(asks=tuple(_story(shape, n, rng, heavy_tail(rng, longest)) for n in range(count))),)


def _families(families: int, each: int) -> Callable[[Shape, random.Random], tuple[Phase, ...]]:
    def build(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
        length = 60 if shape.is_quick else 450
        prefixes = [f"Notes {shape.salt}{family:03d}. {words(rng, length)}." for family in range(families)]
        asks = [
            Ask(
                name=f"{shape.salt}-{family:03d}-{number:03d}",
                system=prefix,
                user=f"Question {number:03d}: say something about the {words(rng, 2)}.",
                num_predict=8,
                family=family,
            )
            for family, prefix in enumerate(prefixes)
            for number in range(each)
        ]
        rng.shuffle(asks)
        return (Phase(asks=tuple(asks)),)

    return build


def _one_prefix(num_predict: int) -> Callable[[Shape, random.Random], tuple[Phase, ...]]:
    def build(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
        system = f"Rules {shape.salt}. {words(rng, 60 if shape.is_quick else 590)}."
        return tuple(
            Phase(
                name=name,
                asks=tuple(
                    Ask(
                        name=f"{shape.salt}-{name}-{number:03d}",
                        system=system,
                        user=f"Question {first + number:03d}: what do you think of the {words(rng, 2)}?",
                        num_predict=num_predict,
                        family=0,
                    )
                    for number in range(2 * shape.slots)
                ),
            )
            # Numbers of their own, so that of the warm questions nothing is known but the prompt before them.
            for name, first in (("cold", 0), ("warm", 500))
        )

    return build


def _two_contexts(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    asks = [_story(shape, n, rng, 6 if shape.is_quick else 24, num_ctx=(2048, 4096)[n % 2]) for n in range(16)]
    return (Phase(asks=tuple(asks)),)


def _burst(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    count = 60 if shape.is_quick else 5_000 if shape.is_full else 700
    return (Phase(asks=tuple(_story(shape, n, rng, 2) for n in range(count))),)


def _three_models(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    asks = [_story(shape, n, rng, 6 if shape.is_quick else 16, model=n % 3) for n in range(24)]
    rng.shuffle(asks)
    return (Phase(asks=tuple(asks)),)


def _callers(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    """The first caller's requests, the second one's, and so on: cut into `CALLERS` equal parts."""
    each = 1 if shape.is_quick else 4
    return (Phase(asks=tuple(_story(shape, n, rng, 16) for n in range(CALLERS * each))),)


def _flood(shape: Shape, rng: random.Random) -> tuple[Phase, ...]:
    count = 500 if shape.is_quick else 20_000
    return (Phase(asks=tuple(_story(shape, n, rng, 1) for n in range(count))),)


# Independent callers of W8.
CALLERS = 32
_PASSES = (Figure.PASSES, Figure.SECONDS)
_PREFIX = (Figure.PROMPT, Figure.SECONDS)
EQUAL = Workload(name="W1", title="as many equal items as slots", build=_equal, figures=_PASSES)
WORKLOADS: tuple[Workload, ...] = (
    EQUAL,
    Workload(name="W2", title="heavy-tailed lengths, 8 a slot", build=_tailed, figures=_PASSES),
    Workload(name="W3-4", title="4 prefixes of 450 words, 10 items each", build=_families(4, 10), figures=_PREFIX),
    Workload(name="W3-16", title="16 prefixes, 4 items each", build=_families(16, 4), figures=_PREFIX),
    Workload(name="W3-64", title="64 prefixes, 2 items each", build=_families(64, 2), figures=_PREFIX),
    Workload(name="W4-2", title="one shared prompt, 2 tokens out", build=_one_prefix(2), figures=_PREFIX),
    Workload(name="W4-24", title="one shared prompt, 24 tokens out", build=_one_prefix(24), figures=_PREFIX),
    Workload(
        name="W5",
        title="two values of num_ctx, 16 items",
        build=_two_contexts,
        figures=(Figure.LOADS, Figure.SECONDS),
        loads=True,
    ),
    Workload(
        name="W6",
        title="a burst on a model that is not loaded",
        build=_burst,
        figures=(Figure.LOST, Figure.SECONDS),
        loads=True,
        is_cold=True,
        without=("one at a time",),
    ),
    Workload(
        name="W7",
        title="three models, mixed",
        build=_three_models,
        figures=(Figure.LOADS, Figure.SECONDS),
        loads=True,
        models=3,
    ),
    Workload(
        name="W8",
        title="32 independent callers",
        build=_callers,
        figures=(Figure.LATENCY, Figure.SECONDS, Figure.PASSES),
        sending=Sending.CALLERS,
        # One caller's own semaphore knows nothing of the others.
        without=("one at a time", "semaphore"),
    ),
    Workload(
        name="W9",
        title="20,000 short items in one stream",
        build=_flood,
        figures=(Figure.SECONDS, Figure.ITEMS_PER_S, Figure.RSS),
        sending=Sending.STREAM,
        without=("one at a time", "gather", "ollama package"),
    ),
)


def find(names: tuple[str, ...]) -> tuple[Workload, ...]:
    """The workloads of these names, in their own order; "W3" is all of W3. ValueError for an unknown one."""
    wanted = {name.upper() for name in names}
    unknown = [name for name in sorted(wanted) if not any(_is_of(each, name) for each in WORKLOADS)]
    if unknown:
        raise ValueError(
            f"there is no workload {', '.join(unknown)}; there are {', '.join(each.name for each in WORKLOADS)}"
        )
    return tuple(each for each in WORKLOADS if any(_is_of(each, name) for name in wanted))


def _is_of(workload: Workload, name: str) -> bool:
    return workload.name == name or workload.name.startswith(f"{name}-")
