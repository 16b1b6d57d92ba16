"""Names → models, and what is loaded where: asked of the backends, and remembered for a moment."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from unisono.core import retry
from unisono.core.errors import BackendUnavailableError, ModelNotFoundError, UnisonoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from unisono.app.ports import Backend, Clock
    from unisono.core.model import LoadedRunner, ModelInfo

# How long answers are remembered. A model that was pulled, or removed, is seen after so long.
MODEL_TTL_S = 5.0
LOADED_TTL_S = 1.0
# Names that are asked about at one time, and remembered at most.
AT_A_TIME = 16
MOST_REMEMBERED = 10_000


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Known(Generic[Value]):
    value: Value
    until_s: float


class Resolver:
    """Finds the model for a name on the backends, in the order of the configuration."""

    def __init__(self, backends: Mapping[str, Backend], clock: Clock, *, patience_s: float) -> None:
        """`patience_s`: how long to wait for a backend that is away."""
        self._backends = backends
        self._clock = clock
        self._patience_s = patience_s
        # That a name leads nowhere is remembered too.
        self._models: dict[str, _Known[ModelInfo | UnisonoError]] = {}
        self._loaded: dict[str, _Known[tuple[LoadedRunner, ...]]] = {}

    async def models(
        self, names: Iterable[str], *, patience_s: float | None = None
    ) -> dict[str, ModelInfo | UnisonoError]:
        """For each name the model, or why there is none.

        A backend that is away is waited for: as long as this resolver is patient, or less where `patience_s` says
        so; then its answer is BackendUnavailableError.
        """
        patience_s = self._patience_s if patience_s is None else min(self._patience_s, patience_s)
        # One limit for all of them: a backend that is away is away for every name.
        deadline_s = self._clock.monotonic_s() + patience_s
        wanted = list(dict.fromkeys(names))
        found: dict[str, ModelInfo | UnisonoError] = {}
        for start in range(0, len(wanted), AT_A_TIME):
            some = wanted[start : start + AT_A_TIME]
            models = await asyncio.gather(*(self._model(name, deadline_s) for name in some))
            found.update(zip(some, models, strict=True))
        return found

    async def loaded(self, backend: str) -> tuple[LoadedRunner, ...]:
        """What a backend has in memory; nothing where it does not say."""
        now = self._clock.monotonic_s()
        known = self._loaded.get(backend)
        if known is None or known.until_s < now:
            try:
                value = await self._backends[backend].loaded()
            except UnisonoError:
                # Only the order of groups depends on it; the load itself will say what is wrong.
                value = ()
            known = self._loaded[backend] = _Known(value, now + LOADED_TTL_S)
        return known.value

    def forget_loaded(self, backend: str) -> None:
        """Something was loaded, or unloaded."""
        self._loaded.pop(backend, None)

    async def _model(self, name: str, deadline_s: float) -> ModelInfo | UnisonoError:
        known = self._models.get(name)
        if known is not None and known.until_s >= self._clock.monotonic_s():
            return known.value
        if len(self._models) >= MOST_REMEMBERED:
            self._models.clear()
        failures = 0
        while True:
            found = await self._ask(name)
            if not isinstance(found, BackendUnavailableError):
                self._models[name] = _Known(found, self._clock.monotonic_s() + MODEL_TTL_S)
                return found
            failures += 1
            pause_s = retry.backoff_s(failures, name)
            if self._clock.monotonic_s() + pause_s > deadline_s:
                return found
            await asyncio.sleep(pause_s)

    async def _ask(self, name: str) -> ModelInfo | UnisonoError:
        """The first backend that has it. One that is away might have it, so that is worth waiting for."""
        missing: UnisonoError = ModelNotFoundError("no backend is configured")
        away: UnisonoError | None = None
        for backend in self._backends.values():
            try:
                return await backend.find_model(name)
            except BackendUnavailableError as error:
                away = error
            except UnisonoError as error:
                missing = error
        return away or missing
