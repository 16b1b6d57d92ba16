"""Requests that go as they came: their context is what the backend makes of them, and once begun they end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unisono.core import harmonise
from unisono.core.arbiter import Arbiter, Load
from unisono.core.batch import ContextPolicy
from unisono.core.capacity import Capacity
from unisono.core.commands import Abort, End, Release, Retry, Stage, Work
from unisono.core.conductor import Conductor, ConductorSettings
from unisono.core.errors import BackendUnavailableError, OutOfMemoryError, RunnerDiedError, UnisonoError
from unisono.core.harmonise import Standing
from unisono.core.model import (
    ChatRequest,
    Item,
    ItemState,
    LoadedRunner,
    Message,
    ModelInfo,
    Options,
    Role,
    RunnerOptions,
    RunnerSpec,
)
from unisono.core.plan import plan

MODEL = ModelInfo(backend="b", name="m", digest="d", context_length=32_768)
RUNNER = RunnerSpec(backend="b", model="m", digest="d")


def item(num_ctx: int | None = None) -> Item:
    """A request."""
    options = Options(runner=RunnerOptions(num_ctx=num_ctx))
    messages = (Message(role=Role.USER, content="hi"),)
    return Item(item_id="0", index=0, request=ChatRequest(messages=messages), model="m", options=options)


def standing(num_ctx: int | None, tokens: int, *, is_busy: bool = False) -> Standing:
    """A runner that had work."""
    return Standing(runner=harmonise.with_context(RUNNER, num_ctx), context_tokens=tokens, is_busy=is_busy)


@pytest.mark.parametrize(
    ("asked", "kept", "there", "num_ctx", "is_loaded"),
    [
        # Nothing is known: the default, which has to be asked for.
        (None, (), 0, None, None),
        (None, (), 8192, None, False),
        # The default is known by what it gave, and what is loaded is that, or is not.
        (None, (standing(None, 4096),), 4096, None, True),
        (None, (standing(None, 4096),), 8192, None, False),
        # Others are at work with more: that is another runner.
        (None, (standing(8192, 8192, is_busy=True),), 8192, None, False),
        # They are at work with as much, by name: the same.
        (None, (standing(None, 4096), standing(4096, 4096, is_busy=True)), 4096, 4096, True),
        (4096, (standing(None, 4096, is_busy=True),), 4096, None, True),
        (2048, (standing(None, 4096, is_busy=True),), 4096, 2048, False),
        (2048, (), 2048, 2048, True),
        # More than the backend gives: what it gave.
        (65_536, (standing(65_536, 32_768),), 32_768, 65_536, True),
    ],
)
def test_a_context_is_the_request_s_own(
    asked: int | None, kept: tuple[Standing, ...], there: int, num_ctx: int | None, *, is_loaded: bool | None
) -> None:
    """By what it says, or by the default; loaded is what would not be loaded anew for it."""
    loaded = [LoadedRunner(model="m", digest="d", context_length=there)] if there else []
    planned = plan([item(asked)], {"m": MODEL}, {"b": loaded}, policy=ContextPolicy.AS_SENT, standing={"b": kept})
    (group,) = planned.groups
    assert group.runner.options.num_ctx == num_ctx
    assert group.is_loaded == bool(is_loaded)


def test_a_backend_with_one_context() -> None:
    """There is nothing to choose."""
    fixed = replace(MODEL, fixed_context=2048)
    (group,) = plan([item()], {"m": fixed}, {"b": []}, policy=ContextPolicy.AS_SENT).groups
    assert group.context_tokens == 2048


def started(works: list[Work], settings: ConductorSettings | None = None) -> tuple[Conductor, dict[int, int]]:
    """A conductor with all these at the backend, and their serials."""
    conductor = Conductor(Capacity(configured=8), settings)
    commands = [*conductor.open(0.0), *conductor.add(works, 0.0)]
    serials: dict[int, int] = {}
    while len(serials) < len(works):
        command = commands.pop(0)
        if isinstance(command, Stage):
            serials[command.ticket] = command.serial
            commands += conductor.staged(command.ticket, command.serial, 0.0)
    assert any(isinstance(command, Release) for command in commands) or conductor.in_flight
    return conductor, serials


@pytest.mark.parametrize("kind", [RunnerDiedError, BackendUnavailableError, OutOfMemoryError])
def test_what_was_begun_ends(kind: type[UnisonoError]) -> None:
    """Also with what would cost nothing, or where others fell too: the caller has part of the answer."""
    conductor, serials = started([Work(ticket=1, batch=1), Work(ticket=2, batch=2)])
    error = kind("it broke")
    error.is_final = True
    commands = conductor.failed(1, serials[1], error, 1.0)
    (end,) = [command for command in commands if isinstance(command, End)]
    assert (end.ticket, end.state, end.error) == (1, ItemState.FAILED, error)
    assert not [command for command in commands if isinstance(command, Retry)]
    assert conductor.in_flight == 1


def test_silence_is_no_reason_to_give_up_who_is_patient() -> None:
    """Only the other is given up when nobody is answered for long; and with nobody else there is no such moment."""
    settings = ConductorSettings(stall_s=10.0)
    conductor, _ = started([Work(ticket=1, batch=1, is_patient=True), Work(ticket=2, batch=2)], settings)
    aborted = [command.ticket for command in conductor.tick(11.0) if isinstance(command, Abort)]
    assert aborted == [2]
    conductor, _ = started([Work(ticket=1, batch=1, is_patient=True)], settings)
    assert conductor.next_alarm() is None
    assert not conductor.tick(1000.0)


def test_what_was_seen_a_moment_ago_is_not_asked_for() -> None:
    """Else the first items of a runner wait for a load."""
    for is_sure in (False, True):
        arbiter = Arbiter(lambda _: Capacity(configured=8))
        commands = arbiter.submit(RUNNER, [Work(ticket=1, batch=1)], 0.0, is_loaded=True, is_sure=is_sure)
        assert any(isinstance(command, Load) for command in commands) is not is_sure
        assert any(isinstance(command, Stage) for command in commands) is is_sure
