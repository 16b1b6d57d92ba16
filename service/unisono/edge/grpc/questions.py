"""The rpcs that only ask: a plan, the passes of a batch, what the service is, and its models."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import server_pb2
from unisono.core.batch import CoScheduling
from unisono.core.errors import BackendUnavailableError, UnisonoError
from unisono.core.model import RunnerSpec
from unisono.core.preview import order_of
from unisono.edge.contract import convert_config, convert_figures, convert_server
from unisono.edge.grpc import pages
from unisono.edge.grpc.calls import wrong
from unisono.edge.status import to_status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from unisono._generated.unisono.v1 import item_pb2
    from unisono.app.batches import Batches
    from unisono.app.driver import BackendDriver
    from unisono.core.batch import BadItem
    from unisono.core.model import Item
    from unisono.edge.grpc.calls import Context

# How long a backend may take to say how it is.
_STATUS_TIMEOUT_S = 2.0
_PLAN_PAGE, _MAX_PLAN_PAGE = 10_000, 50_000
_PASSES_PAGE, _MAX_PASSES_PAGE = 1_000, 10_000
_MAX_LISTED = 1_000
# Participations of a page, of three bytes each, so that its message stays below 4 MiB.
_PAGE_MEMBERS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What the service knows of itself."""

    version: str
    started_at_ns: int
    max_receive_bytes: int
    max_send_bytes: int


class Questions(pb_grpc.BatchInferenceServicer):
    """What the servicer does when it is only asked."""

    _batches: Batches
    _drivers: Mapping[str, BackendDriver]
    _facts: ServerFacts

    @abstractmethod
    def _refused(self, context: Context) -> AbstractAsyncContextManager[None]:
        """Turns an error of the house into the call's status."""

    @abstractmethod
    async def _converted(self, messages: Sequence[item_pb2.Item]) -> list[Item | BadItem]:
        """All items of a request."""

    async def PlanBatch(self, request: pb.PlanBatchRequest, context: Context) -> pb.PlanBatchResponse:
        """See the contract."""
        async with self._refused(context):
            size = pages.size(request.page_size, default=_PLAN_PAGE, most=_MAX_PLAN_PAGE)
            start = pages.place(request.page_token)
            config = convert_config.config(request.config, bounds=self._batches.limits)
            plan = await self._batches.plan(await self._converted(request.items), config)
            response = pb.PlanBatchResponse()
            is_together = config.co_scheduling is not CoScheduling.FASTEST
            most = config.max_concurrency or 2**16
            orders = [
                order_of(group, lanes=min(state.limit, most), is_together=is_together) for group, state in plan.groups
            ]
            ids = [
                group.items[place].item_id
                for (group, _), order in zip(plan.groups, orders, strict=True)
                for place, _ in order
            ]
            reasons = [reason for order in orders for _, reason in order]
            end = pages.end(ids, start, size)
            before = 0
            for number, (group, state) in enumerate(plan.groups):
                # This page's share of the ids, which are numbered through all groups.
                share = slice(max(before, start), min(before + len(group.items), end))
                response.groups.append(
                    convert_server.group_plan(number, group, state, zip(ids[share], reasons[share], strict=True))
                )
                before += len(group.items)
            places = {item.item_id: item.index for group, _ in plan.groups for item in group.items}
            response.warnings.extend(
                convert_server.plan_warning(warning, f"items[{places.get(warning.item_id, 0)}].")
                for warning in plan.warnings[:_MAX_LISTED]
            )
            response.refusals.extend(
                convert_server.plan_refusal(item_id, index, error)
                for item_id, index, error in plan.refused[:_MAX_LISTED]
            )
            if end < len(ids):
                response.next_page_token = pages.token(end)
            return response

    async def ListPasses(self, request: pb.ListPassesRequest, context: Context) -> pb.ListPassesResponse:
        """See the contract."""
        async with self._refused(context):
            size = pages.size(request.page_size, default=_PASSES_PAGE, most=_MAX_PASSES_PAGE)
            start = pages.place(request.page_token)
            batch = self._batches.get(request.batch_id)
            # One more than asked for tells whether there is another page.
            found = batch.passes(start, size + 1)
            response = pb.ListPassesResponse(unmapped_passes=batch.unmapped_passes)
            members = 0
            for place, group, each in found:
                members += len(each.members)
                if len(response.passes) == size or (response.passes and members > _PAGE_MEMBERS):
                    response.next_page_token = pages.token(place)
                    break
                response.passes.append(convert_figures.forward_pass(group, each))
            return response

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """See the contract."""
        async with self._refused(context):
            response = pb.GetServerInfoResponse(
                version=self._facts.version,
                limits=convert_server.server_limits(
                    self._batches.limits,
                    max_receive_bytes=self._facts.max_receive_bytes,
                    max_send_bytes=self._facts.max_send_bytes,
                ),
                backends=await asyncio.gather(*(self._status(driver) for driver in self._drivers.values())),
                running_batches=self._batches.running,
            )
            response.started_at.FromNanoseconds(self._facts.started_at_ns)
            return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """See the contract."""
        async with self._refused(context):
            if request.backend and request.backend not in self._drivers:
                known = ", ".join(self._drivers)
                raise wrong("backend", f"is {request.backend!r}, which is not configured; there are: {known}")
            response = pb.ListModelsResponse()
            asked = [driver for name, driver in sorted(self._drivers.items()) if request.backend in ("", name)]
            for found in await asyncio.gather(*map(self._models, asked)):
                if isinstance(found, server_pb2.BackendStatus):
                    response.unreachable.append(found)
                else:
                    response.models.extend(found)
            return response

    async def _models(self, driver: BackendDriver) -> list[server_pb2.Model] | server_pb2.BackendStatus:
        """The models of a backend; how it is, where it does not say."""
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                models, loaded = await driver.backend.models(), await driver.backend.loaded()
        except (UnisonoError, TimeoutError):
            return await self._status(driver)
        found: list[server_pb2.Model] = []
        for model in sorted(models, key=lambda model: model.name):
            own = [runner for runner in driver.known_slots if runner.digest == model.digest]
            # What is configured, remembered or certain is known before it had any work.
            any_runner = RunnerSpec(backend=driver.backend.name, model=model.name, digest=model.digest)
            states = {runner: driver.slot_state(runner, model) for runner in own or [any_runner]}
            found.append(convert_server.model(model, convert_server.runners(model.digest, loaded, states)))
        return found

    async def _status(self, driver: BackendDriver) -> server_pb2.BackendStatus:
        """How a backend is, also when it is away."""
        backend = driver.backend
        status = server_pb2.BackendStatus(
            name=backend.name,
            kind=backend.kind,
            url=backend.url,
            queued=driver.queued,
            in_flight=driver.in_flight,
        )
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                status.version = await backend.version()
                status.runners.extend(convert_server.runners(None, await backend.loaded(), driver.known_slots))
                status.reachable = True
        except UnisonoError as error:
            status.error.CopyFrom(to_status(error))
        except TimeoutError:
            silent = BackendUnavailableError(f"{backend.url} did not answer within {_STATUS_TIMEOUT_S:g} s")
            status.error.CopyFrom(to_status(silent))
        return status
