"""Items that wait for a backend that stays away go on at another that has their model.

Theory of operation. A batch that uses one of several backends looks at it once a second. Once one has been away for
`AWAY_S`, its groups' items that are not at it are taken back, and released anew: they are planned like any others,
among the backends that answer. Whoever is on the way may still be answered, and comes after when that fails. Where
no other backend has the model, or none answers, items wait on, as long as the backend's driver is patient.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from unisono.app.timers import Timers
from unisono.core.errors import UnisonoError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.app.driver import BackendDriver
    from unisono.app.group_run import GroupRun
    from unisono.app.item_run import ItemRun
    from unisono.app.ports import Clock
    from unisono.app.resolve import Resolver

# How long a backend may be away before its items go elsewhere: a restart takes less. And how often that is looked at.
AWAY_S = 3.0
LOOK_S = 1.0


class Failover:
    """Watches over the groups of one batch."""

    def __init__(
        self,
        groups: Sequence[GroupRun],
        resolver: Resolver,
        clock: Clock,
        *,
        move: Callable[[GroupRun, Sequence[ItemRun]], None],
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        """`move` takes items from a group, and releases them anew."""
        self._groups = groups
        self._resolver = resolver
        self._clock = clock
        self._move = move
        self._report_defect = report_defect
        self._timers = Timers()
        # Backends that items wait for though they are away, and since when that was seen.
        self._since_s: dict[BackendDriver, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """There are groups to look after, until `stop`."""
        if "look" not in self._timers:
            self._timers.start("look", LOOK_S, self._look)

    def stop(self) -> None:
        """No more."""
        self._timers.stop_all()
        if self._task is not None:
            _ = self._task.cancel()

    def _look(self) -> None:
        now = self._clock.monotonic_s()
        away = {group.driver for group in self._groups if group.driver.is_away and group.waiting}
        self._since_s = {driver: self._since_s.get(driver, now) for driver in away}
        is_late = any(now - since_s >= AWAY_S for since_s in self._since_s.values())
        if is_late and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._move_all())
        self._timers.start("look", LOOK_S, self._look)

    async def _move_all(self) -> None:
        now = self._clock.monotonic_s()
        late = {driver for driver, since_s in self._since_s.items() if now - since_s >= AWAY_S}
        try:
            for group in [group for group in self._groups if group.driver in late]:
                await self._move_from(group)
        except Exception as defect:  # noqa: BLE001 - items go on waiting where they are
            self._report_defect("moving items to another backend", defect)

    async def _move_from(self, group: GroupRun) -> None:
        found = await self._resolver.resolve((run.item.model for run in group.waiting), patience_s=0.0)
        here = group.runner
        elsewhere = {
            name
            for name, model in found.models.items()
            # No name stands for the only model that there is, which may now be another one.
            if not isinstance(model, UnisonoError)
            and model.backend != here.backend
            and (name.strip() or model.digest == here.digest)
        }
        # Meanwhile it may have come back, and some may have ended.
        runs = [run for run in group.waiting if run.item.model in elsewhere]
        if runs and group.driver.is_away:
            self._move(group, runs)
