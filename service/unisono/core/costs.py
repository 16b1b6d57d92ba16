"""What things cost on one runner: learned from when its tokens come.

Theory of operation. All slots of a runner share one processor, so the time of a batch is about

    a · passes  +  c · tokens of answers  +  p · prompt tokens computed

*a* and *c*: while no prompt is being computed and nobody comes or goes, passes follow each other evenly. Such a
stretch tells how long a pass with so many members takes; a straight line through all of them gives both. Until
stretches with different numbers of members were seen, half of a pass is assumed to be fixed; what is assumed serves
to decide, and is never reported. Where a model drafts, a pass gives a member several tokens: they are counted beside,
so that *a* is of a pass and *c* of a token all the same.

*p*: from the release of a request to its first token the runner computes its prompt. Requests overlap there, so one
*episode* is taken as a whole, from when the first prompt is begun until no prompt is left: its time, less that of
the passes in between and of the one that gave the last first token, ÷ the prompt tokens that were computed.

Lengths of answers are predicted by how much of its `num_predict` an answer used so far, or by the mean where there
is no bound. Everything fades, so that a change is followed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, sqrt

from unisono.core.report import Costs

# Bytes of text a token, until prompts were counted: English prose has about four.
BYTES_PER_TOKEN = 4.0
# Pass intervals, and prompt tokens, after which what was seen before counts for a third.
_PASS_MEMORY = 500.0
_PROMPT_MEMORY = 8_192.0
# An episode of fewer prompt tokens tells more of everything else than of prompts.
_LEAST_PROMPT_TOKENS = 64.0
# Answers after which their lengths are believed; and how much a former one counts beside the next.
_LEAST_ANSWERS = 4
_ANSWER_FADING = 0.98
# Of a pass, the part of the members, until passes with different numbers of them were seen.
_ASSUMED_SHARE = 0.5
# How much the numbers of members must differ (their variance) to tell that part; and how much in all passes together
# until it is sure enough to be told to others.
_LEAST_SPREAD, _SURE_SPREAD = 0.05, 16.0
# Of a pass, a part that is smaller is none that was measured.
_LEAST_PART = 0.005
# Of a pass, the part that is shared, as far as one may hope: for a second lane to be tried.
_HOPED_SHARE = 0.9
# Answers beside others after which it will not be told, as it seems, what part that is.
_UNTOLD_ANSWERS = 16
# Families whose lengths are remembered.
_MOST_FAMILIES = 1_000
# Passes of a stretch that are taken into account at one time.
_STRETCH_PASSES = 8
# The length of an answer of which nothing is known.
UNKNOWN_LENGTH = 256.0


@dataclass(slots=True)
class _Lengths:
    """How long answers were, and how much of their bounds they used; what is older fades."""

    answers: int = 0
    weight: float = 0.0
    tokens: float = 0.0
    squares: float = 0.0
    # Of those that had a bound: their tokens, their tokens² ÷ bound, and the bounds.
    bounded: float = 0.0
    bounded_squares: float = 0.0
    bounds: float = 0.0

    def add(self, tokens: int, bound: int | None) -> None:
        self.answers += 1
        self.weight = self.weight * _ANSWER_FADING + 1
        self.tokens = self.tokens * _ANSWER_FADING + tokens
        self.squares = self.squares * _ANSWER_FADING + tokens**2
        if bound is not None and bound > 0:
            used = min(tokens, bound)
            self.bounded = self.bounded * _ANSWER_FADING + used
            self.bounded_squares = self.bounded_squares * _ANSWER_FADING + used**2 / bound
            self.bounds = self.bounds * _ANSWER_FADING + bound


@dataclass(slots=True)
class _Stretch:
    """Passes that followed each other evenly."""

    members: int = 0
    passes: int = 0
    # Tokens that these passes gave beside one for each member.
    drafted: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0


class CostMeter:
    """Learns the costs of one runner. All times are seconds by one clock."""

    def __init__(self) -> None:
        # Of stretches: weight, members, members², time of a pass, members × time; and of single streams.
        self._w = self._wm = self._wmm = self._wt = self._wmt = 0.0
        self._single_w = self._single_wt = 0.0
        # Drafted tokens of stretches, and of single streams.
        self._wd = self._single_wd = 0.0
        self._passes = 0
        # Of a pass with one member, the part of that member; None: not known. It is kept where passes with one number
        # of members only are seen for long: their time tells how fast the machine is, not what is shared.
        self._token_share: float | None = None
        self._is_sure = False
        # Whether the last fit gave all of a pass to one part, as no processor does: the two cannot be told apart yet.
        self._is_clipped = False
        # Answers that ended while others were being given.
        self._beside = 0
        # Who is being answered: each takes part in every pass, though it may say nothing in it.
        self._speakers: set[int] = set()
        # The pass under way: who spoke in it, its drafted tokens, when it began (None: not known), and its stretch.
        self._spoken: set[int] = set()
        self._drafted = 0
        self._mark_s: float | None = None
        self._stretch = _Stretch()
        # The episode under way: prompts being computed, when it began, its prompt tokens, its passes' time.
        self._prefilling = 0
        self._episode_s = 0.0
        self._episode_tokens = 0.0
        self._episode_passes_s = 0.0
        self._episode_prompts = 0
        self._prompt_tokens = self._prompt_s = 0.0
        self._bytes = self._told_tokens = 0.0
        self._all = _Lengths()
        self._by_family: dict[int, _Lengths] = {}

    # -- What it has learned -----------------------------------------------------------------------------------

    @property
    def costs(self) -> Costs | None:
        """The costs so far; None until a pass was timed."""
        if self._w == 0:
            return None
        pass_s, member_s = self._parts()
        return Costs(
            pass_s=pass_s,
            token_s=member_s / self.tokens_a_pass,
            prompt_token_s=self.prompt_token_s,
            passes_measured=self._passes,
            single_stream_token_s=self._single_wt / (self._single_w + self._single_wd) if self._single_w else None,
        )

    def _parts(self) -> tuple[float, float]:
        """Of the time of a pass, what is fixed, and what each member adds; both 0 until a pass was timed."""
        if self._w == 0:
            return 0.0, 0.0
        mean_m, mean_t = self._wm / self._w, self._wt / self._w
        share = self._token_share
        member_s = mean_t * (_ASSUMED_SHARE / mean_m if share is None else share / (1 - share + share * mean_m))
        return mean_t - member_s * mean_m, member_s

    @property
    def tokens_a_pass(self) -> float:
        """How many tokens a pass gives each of its members: one, unless the model drafts."""
        return 1 + self._wd / self._wm if self._wm else 1.0

    @property
    def measured(self) -> Costs | None:
        """The costs, if nothing of them is assumed, and enough passes were seen to tell their parts; else None."""
        return None if self._is_clipped else self.timed

    @property
    def timed(self) -> Costs | None:
        """The same where its parts may be no measurement, but what one item costs by itself is one."""
        return self.costs if self._is_sure else None

    def costs_to_join(self, taken: int) -> Costs | None:
        """What to reckon with when a lane more is considered, while so many are taken; None: not known yet.

        As long as answers came from one lane only, nobody can say what part of a pass is shared. A second lane tells
        that: it is tried where it would pay if nearly all were. Then the others wait until it has told; but not for
        ever, since answers of a token or two never share two passes that follow each other evenly.
        """
        if self._is_alone and self._beside < _UNTOLD_ANSWERS and self.costs is not None:
            return replace(self.costs, pass_s=_HOPED_SHARE * self._wt / self._w) if taken <= 1 else None
        return self.costs

    @property
    def _is_alone(self) -> bool:
        """Whether all passes so far had one member."""
        return self._token_share is None and self._w > 0 and self._wm / self._w < 1.05

    @property
    def prompt_token_s(self) -> float | None:
        """Seconds for one prompt token; None until measured."""
        return self._prompt_s / self._prompt_tokens if self._prompt_tokens else None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token of the prompts so far."""
        return self._bytes / self._told_tokens if self._told_tokens >= 1 else BYTES_PER_TOKEN

    def tokens(self, text_bytes: float) -> float:
        """About how many tokens a text of so many bytes has."""
        return text_bytes / self.bytes_per_token

    def expected_length(self, bound: int | None, family: int) -> float:
        """About how many tokens an answer will have, at least 1. `bound`: its num_predict, where it has one."""
        seen = self._seen(family)
        is_known = seen.answers >= _LEAST_ANSWERS
        if bound is not None and bound > 0:
            return max(1.0, bound * seen.bounded / seen.bounds) if is_known and seen.bounds else float(bound)
        return max(1.0, seen.tokens / seen.weight) if is_known else UNKNOWN_LENGTH

    def surprise(self, family: int) -> float:
        """How much answers differ from their expected lengths, as a part of these; 0 until some are known."""
        seen = self._seen(family)
        if seen.answers < _LEAST_ANSWERS:
            return 0.0
        if seen.bounds:
            mean, square = seen.bounded / seen.bounds, seen.bounded_squares / seen.bounds
        else:
            mean, square = seen.tokens / seen.weight, seen.squares / seen.weight
        return sqrt(max(0.0, square - mean**2)) / mean if mean else 0.0

    def _seen(self, family: int) -> _Lengths:
        """The answers by which those of a family are judged: its own, if there are enough of them; else all."""
        own = self._by_family.get(family)
        return own if own is not None and own.answers >= _LEAST_ANSWERS else self._all

    # -- What happens ------------------------------------------------------------------------------------------

    def prompt_begun(self, computed_bytes: float, now: float) -> None:
        """A request got a slot, and so many bytes of its prompt are not in that slot's cache."""
        self._disturb()
        if self._prefilling == 0:
            self._episode_s, self._episode_tokens, self._episode_passes_s = now, 0.0, 0.0
            self._episode_prompts = 0
        self._prefilling += 1
        self._episode_prompts += 1
        self._episode_tokens += self.tokens(computed_bytes)

    def prompt_done(self, now: float) -> None:
        """A request spoke its first token."""
        self._prefilling -= 1
        if self._prefilling:
            return
        if self._episode_tokens >= _LEAST_PROMPT_TOKENS:
            pass_s, member_s = self._parts()
            last_s = pass_s + member_s * self._episode_prompts
            took_s = max(0.0, now - self._episode_s - self._episode_passes_s - last_s)
            fading = exp(-self._episode_tokens / _PROMPT_MEMORY)
            self._prompt_s = self._prompt_s * fading + took_s
            self._prompt_tokens = self._prompt_tokens * fading + self._episode_tokens
        self._disturb()

    def prompt_lost(self) -> None:
        """A request went away before it spoke: the episode tells nothing any more."""
        self._prefilling -= 1
        self._episode_tokens = 0.0

    def spoke(self, ticket: int, now: float, *, is_drafted: bool = False) -> None:
        """A token came. Who speaks again begins the next pass, unless `is_drafted`: its last one was of the same."""
        if is_drafted:
            self._drafted += 1
            return
        if ticket not in self._speakers:
            self._speakers.add(ticket)
            if not self._prefilling:
                self._disturb()
        if ticket not in self._spoken:
            self._spoken.add(ticket)
            if self._mark_s is None:
                self._mark_s = now
            return
        members, began_s, drafted = len(self._speakers), self._mark_s, self._drafted
        self._spoken, self._mark_s, self._drafted = {ticket}, now, 0
        if self._prefilling:
            pass_s, member_s = self._parts()
            self._episode_passes_s += pass_s + member_s * members
            return
        stretch = self._stretch
        if not stretch.passes:
            stretch.members, stretch.began_s = members, now if began_s is None else began_s
            stretch.drafted = 0
        stretch.passes += 1
        stretch.drafted += drafted
        stretch.ended_s = now
        if stretch.passes >= (2 if self._token_share is None else _STRETCH_PASSES):
            self._end_stretch()

    def left(self, ticket: int) -> None:
        """It does not speak any more."""
        self._beside += len(self._speakers) > 1 and ticket in self._speakers
        self._speakers.discard(ticket)
        self._disturb()

    def counted(self, *, prompt_tokens: int, prompt_bytes: int) -> None:
        """The backend said how many tokens a prompt of so many bytes had."""
        if prompt_tokens > 0 and prompt_bytes > 0:
            self._told_tokens = self._told_tokens * 0.99 + prompt_tokens
            self._bytes = self._bytes * 0.99 + prompt_bytes

    def answered(self, tokens: int, bound: int | None, family: int) -> None:
        """An answer of so many tokens is whole."""
        if family not in self._by_family and len(self._by_family) >= _MOST_FAMILIES:
            self._by_family.clear()
        self._all.add(tokens, bound)
        self._by_family.setdefault(family, _Lengths()).add(tokens, bound)

    def _disturb(self) -> None:
        """The passes do not follow each other evenly any more."""
        self._end_stretch()
        self._spoken.clear()
        self._drafted = 0
        self._mark_s = None

    def _end_stretch(self) -> None:
        """Takes the stretch into account."""
        stretch = self._stretch
        passes, members = stretch.passes, stretch.members
        if not passes:
            return
        stretch.passes = 0
        took_s = (stretch.ended_s - stretch.began_s) / passes
        fading = exp(-passes / _PASS_MEMORY)
        self._w = self._w * fading + passes
        self._wm = self._wm * fading + passes * members
        self._wmm = self._wmm * fading + passes * members**2
        self._wt = self._wt * fading + passes * took_s
        self._wmt = self._wmt * fading + passes * members * took_s
        self._wd = self._wd * fading + stretch.drafted
        if members == 1:
            self._single_w = self._single_w * fading + passes
            self._single_wd = self._single_wd * fading + stretch.drafted
            self._single_wt = self._single_wt * fading + passes * took_s
        self._passes += passes
        mean_m, mean_t = self._wm / self._w, self._wt / self._w
        spread = self._wmm / self._w - mean_m**2
        if spread > _LEAST_SPREAD:
            self._is_sure = self._is_sure or spread * self._w > _SURE_SPREAD
            slope = (self._wmt / self._w - mean_m * mean_t) / spread
            token_s = min(max(slope, 0.0), mean_t / mean_m)
            self._is_clipped = not _LEAST_PART < slope * mean_m / mean_t < 1 - _LEAST_PART
            self._token_share = token_s / (mean_t - token_s * (mean_m - 1))
