"""Names → models, and what is loaded where: asked of the backends, and remembered for a moment.

Theory of operation. All backends are asked for a name at one time, each question is asked once however many want to
know, and answers are remembered for some seconds. One that is away must not hold up the models that others have: as
soon as one backend has the model, the others have a moment (`GRACE_S`) to say so too, and none if they did not answer
the last time. Only for a model that nobody else has is a backend that is away waited for, since it might.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from unisono.core import retry
from unisono.core.errors import BackendUnavailableError, ConnectionLostError, ModelNotFoundError, UnisonoError
from unisono.core.model import RunnerSpec
from unisono.core.placement import BackendState, place

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from unisono.app.driver import BackendDriver
    from unisono.app.ports import Clock
    from unisono.core.model import LoadedRunner, ModelInfo

# How long answers are remembered. A model that was pulled, or removed, is seen after so long.
MODEL_TTL_S = 5.0
LOADED_TTL_S = 1.0
# How long backends may take to say that they have a model too, and what they have in memory.
GRACE_S = 0.25
LOADED_TIMEOUT_S = 2.0
# Names that are asked about at one time, and remembered at most.
AT_A_TIME = 16
MOST_REMEMBERED = 10_000


Value = TypeVar("Value")

# What a backend says of a name: models that it may mean, or why there is none.
_Answer = tuple["ModelInfo", ...] | UnisonoError


@dataclass(frozen=True, slots=True)
class _Known(Generic[Value]):
    value: Value
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Where items would go at this moment."""

    # For each name the model, on the backend that answers its items, or why there is none.
    models: Mapping[str, ModelInfo | UnisonoError]
    # What these backends have in memory.
    loaded: Mapping[str, tuple[LoadedRunner, ...]]


class Resolver:
    """Finds models on the backends, in the order of the configuration."""

    def __init__(self, drivers: Mapping[str, BackendDriver], clock: Clock, *, patience_s: float) -> None:
        """`patience_s`: how long to wait for a backend that is away."""
        self._drivers = drivers
        self._clock = clock
        self._patience_s = patience_s
        # By backend and name. That a name leads nowhere is remembered too.
        self._models: dict[tuple[str, str], _Known[_Answer]] = {}
        # None: it did not say.
        self._loaded: dict[str, _Known[tuple[LoadedRunner, ...] | None]] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[_Answer]] = {}
        # By backend and digest, the name under which these files were asked for first.
        self._first_names: dict[tuple[str, str], str] = {}
        # Backends that did not answer the last time, or not in time.
        self._silent: set[str] = set()

    def among(self, backends: Collection[str]) -> Resolver:
        """This one, as if there were these backends only. What is asked and remembered, both of them know."""
        part = copy(self)
        vars(part)["_drivers"] = {name: driver for name, driver in self._drivers.items() if name in backends}
        return part

    async def resolve(self, names: Iterable[str], *, patience_s: float | None = None) -> Resolved:
        """For each name, as often as items ask for it, the model.

        A backend that is away is waited for: as long as this resolver is patient, or less where `patience_s` says
        so; then its answer is BackendUnavailableError. What is returned is as of now, until the caller next waits.
        """
        patience_s = self._patience_s if patience_s is None else min(self._patience_s, patience_s)
        # One limit for all of them: a backend that is away is away for every name.
        deadline_s = self._clock.monotonic_s() + patience_s
        counts = Counter(names)
        wanted = list(counts)
        found: dict[str, _Answer] = {}
        for start in range(0, len(wanted), AT_A_TIME):
            some = wanted[start : start + AT_A_TIME]
            answers = await asyncio.gather(*(self._find(name, deadline_s, patience_s) for name in some))
            found.update(zip(some, answers, strict=True))
        candidates = {name: models for name, models in found.items() if not isinstance(models, UnisonoError)}
        backends = list(dict.fromkeys(model.backend for models in candidates.values() for model in models))
        loaded = dict(zip(backends, await asyncio.gather(*map(self.loaded, backends)), strict=True))
        # Nothing may wait from here on: what is chosen by how busy backends are must still be true at the caller's.
        for name, models in candidates.items():
            candidates[name] = tuple(model for model in models if loaded[model.backend] is not None) or models
        states = {backend: self._state(backend, loaded[backend] or ()) for backend in backends}
        chosen = place(candidates, counts, states)
        errors = {name: error for name, error in found.items() if isinstance(error, UnisonoError)}
        used = {model.backend for model in chosen.values()}
        return Resolved(models={**chosen, **errors}, loaded={backend: loaded[backend] or () for backend in used})

    async def loaded(self, backend: str) -> tuple[LoadedRunner, ...] | None:
        """What a backend has in memory; None where it does not say."""
        known = self._loaded.get(backend)
        if known is None or known.until_s < self._clock.monotonic_s():
            try:
                # Nobody else has the model where there is one backend: it may take its time.
                async with asyncio.timeout(LOADED_TIMEOUT_S if len(self._drivers) > 1 else None):
                    value: tuple[LoadedRunner, ...] | None = await self._drivers[backend].backend.loaded()
            except (UnisonoError, TimeoutError):
                # Only the choice of a backend and the order of groups depend on it; the load itself will say what
                # is wrong.
                value = None
            known = self._loaded[backend] = _Known(value, self._clock.monotonic_s() + LOADED_TTL_S)
        return known.value

    def forget_loaded(self, backend: str) -> None:
        """Something was loaded, or unloaded."""
        self._loaded.pop(backend, None)

    async def close(self) -> None:
        """Breaks off the questions that are still under way."""
        asking = list(self._asking.values())
        for task in asking:
            _ = task.cancel()
        _ = await asyncio.gather(*asking, return_exceptions=True)

    def _state(self, backend: str, loaded: Iterable[LoadedRunner]) -> BackendState:
        driver = self._drivers[backend]
        ready: dict[str, int] = {}
        for one in loaded:
            runner = RunnerSpec(backend=backend, model=one.model, digest=one.digest)
            ready[one.digest] = one.slots or driver.slot_state(runner).limit
        # What was learned of one that is at work is about that one.
        ready |= {one.runner.digest: driver.slot_state(one.runner).limit for one in driver.standing if one.is_busy}
        return BackendState(busy=driver.queued + driver.in_flight, ready=ready)

    # -- One name ------------------------------------------------------------------------------------------

    async def _find(self, name: str, deadline_s: float, patience_s: float) -> _Answer:
        """The models that a name may mean, one for each backend that has it; or why there is none."""
        failures = 0
        while True:
            answers = await self._answers(name)
            found = [model for answer in answers.values() if isinstance(answer, tuple) for model in answer]
            if found:
                return self._same(name, found)
            away = next((one for one in answers.values() if isinstance(one, BackendUnavailableError)), None)
            if away is None:
                return self._missing(name, [one for one in answers.values() if isinstance(one, UnisonoError)])
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                return _waited(away, patience_s)
            failures += 1
            # The last pause is cut short: what comes back just before the end is still found.
            await asyncio.sleep(min(left_s, retry.backoff_s(failures, name)))

    def _same(self, name: str, found: list[ModelInfo]) -> _Answer:
        """What was found, unless nobody can tell which is meant: no name stands for the only model that there is."""
        if name.strip() or len({model.digest for model in found}) == 1:
            return tuple(found)
        names = ", ".join(list(dict.fromkeys(model.name for model in found))[:10])
        return ModelNotFoundError(f"no model was named, and the backends have several: {names}")

    def _missing(self, name: str, errors: list[UnisonoError]) -> UnisonoError:
        """Why nobody has it. That a backend would not answer tells more than that it has none."""
        telling = [error for error in errors if not isinstance(error, ModelNotFoundError)]
        if telling:
            return telling[0]
        if len(errors) == 1 == len(self._drivers):
            return errors[0]
        what = f"the model {name!r}" if name.strip() else "a model"
        return ModelNotFoundError(
            f"none of the backends {', '.join(self._drivers)} has {what}", metadata={"model": name}
        )

    async def _answers(self, name: str) -> dict[str, _Answer]:
        """What each backend says, as far as that is to be waited for."""
        answers: dict[str, _Answer] = {}
        asking: dict[asyncio.Task[_Answer], str] = {}
        for backend in self._drivers:
            known = self._remembered(backend, name)
            if known is not None:
                answers[backend] = known
            else:
                asking[self._ask(backend, name)] = backend
        until_s: float | None = None
        while asking:
            waiting, left_s = set(asking), None
            if any(isinstance(answer, tuple) and answer for answer in answers.values()):
                until_s = until_s or self._clock.monotonic_s() + GRACE_S
                waiting = {task for task, backend in asking.items() if backend not in self._silent}
                left_s = until_s - self._clock.monotonic_s()
                if not waiting:
                    break
                if left_s <= 0:
                    self._silent.update(asking[task] for task in waiting)
                    break
            done, _ = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answers[asking.pop(task)] = task.result()
        return {backend: answers[backend] for backend in self._drivers if backend in answers}

    def _remembered(self, backend: str, name: str) -> _Answer | None:
        """What it said lately. One that was lost meanwhile must say it again: nothing shall wait for it in vain."""
        known = self._models.get((backend, name))
        if known is None or known.until_s < self._clock.monotonic_s():
            return None
        return None if len(self._drivers) > 1 and self._drivers[backend].is_away else known.value

    def _ask(self, backend: str, name: str) -> asyncio.Task[_Answer]:
        """The question to a backend, which is under way from now on."""
        key = backend, name
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.get_running_loop().create_task(self._question(backend, name))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return task

    async def _question(self, backend: str, name: str) -> _Answer:
        answer: _Answer
        try:
            answer = await self._look(backend, name)
        except (BackendUnavailableError, ConnectionLostError) as error:
            # A connection that was lost tells nothing of the name: it is not remembered, and asked again.
            self._silent.add(backend)
            self._drivers[backend].found(is_silent=True)
            if isinstance(error, BackendUnavailableError):
                return error
            return BackendUnavailableError(error.message, metadata=error.metadata, retry_after_s=error.retry_after_s)
        except UnisonoError as error:
            answer = error
        self._silent.discard(backend)
        self._drivers[backend].found(is_silent=False)
        if len(self._models) >= MOST_REMEMBERED:
            self._models.clear()
        self._models[backend, name] = _Known(answer, self._clock.monotonic_s() + MODEL_TTL_S)
        return answer

    async def _look(self, backend: str, name: str) -> tuple[ModelInfo, ...]:
        """The model of that name. No name, where there are several backends: all models, to see if they agree."""
        port = self._drivers[backend].backend
        if not name.strip() and len(self._drivers) > 1:
            models = await port.models()
            if len(models) != 1:
                return models
            name = models[0].name
        return (await self._as_first_named(backend, await port.find_model(name)),)

    async def _as_first_named(self, backend: str, model: ModelInfo) -> ModelInfo:
        """The model under the name by which its files were first asked for, as long as that still names them.

        To the backend two names of one digest are one runner, and its slots are shared: so they must be here.
        """
        key = backend, model.digest
        if len(self._first_names) >= MOST_REMEMBERED:
            self._first_names.clear()
        name = self._first_names.setdefault(key, model.name)
        if name == model.name:
            return model
        try:
            first = await self._drivers[backend].backend.find_model(name)
        except ModelNotFoundError:
            first = None
        except UnisonoError:
            return model
        if first is None or first.digest != model.digest:
            self._first_names[key] = model.name
            return model
        return first


def _waited(error: BackendUnavailableError, patience_s: float) -> BackendUnavailableError:
    """What those are told who have waited in vain, if they waited."""
    if patience_s <= 0:
        return error
    said = f"{error.message} (waited {patience_s:g} s for it)"
    return BackendUnavailableError(said, metadata=error.metadata, retry_after_s=error.retry_after_s)
