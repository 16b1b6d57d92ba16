"""What a driver asks its backend beside answers: to load a runner, to unload it, and whether it is there at all.

None of these raises: each gives back what there is to tell the arbiter. A defect of ours costs the items that it
concerns, and is reported; it must not end the driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.errors import InternalError, UnisonoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from unisono.app.ports import Backend, LoadOutcome
    from unisono.core.model import RunnerSpec


class Errands:
    """Goes to one backend."""

    def __init__(self, backend: Backend, report_defect: Callable[[str, BaseException], None]) -> None:
        self._backend = backend
        self._report_defect = report_defect

    async def load(self, runner: RunnerSpec, keep_alive_s: float) -> LoadOutcome | UnisonoError:
        """Makes a runner ready."""
        try:
            return await self._backend.load(runner, keep_alive_s=keep_alive_s)
        except UnisonoError as failure:
            return failure
        except Exception as defect:  # noqa: BLE001 - it costs this runner's items only
            self._report_defect(f"loading {runner.model}", defect)
            return defect_error(defect)

    async def unload(self, runner: RunnerSpec) -> None:
        """Takes a runner out of memory. Nobody waits for it; a backend that is away has done so in its own way."""
        try:
            await self._backend.unload(runner)
        except UnisonoError:
            return
        except Exception as defect:  # noqa: BLE001 - it must not end the driver
            self._report_defect(f"unloading {runner.model}", defect)

    async def probe(self) -> UnisonoError | None:
        """Why the backend does not answer; None: it does."""
        try:
            _ = await self._backend.version()
        except UnisonoError as failure:
            return failure
        except Exception as defect:  # noqa: BLE001 - it must not end the driver
            self._report_defect("a probe", defect)
            return defect_error(defect)
        return None


def defect_error(defect: Exception) -> InternalError:
    """What the items are told that a defect of ours concerns."""
    return InternalError(f"a defect of this service: {type(defect).__name__}: {defect}")
