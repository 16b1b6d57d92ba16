"""gRPC's keep-alive pings: the case that takes its time, so that callers of all languages wait side by side."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from tests.clients.go import built
from tests.clients.interop import KEEPALIVE, PING_EVERY_S, PING_FOR_S, PINGS, interop_service, output
from tests.clients.programs import CuttingProxy, Frames
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc


async def ping(target: str, every_s: float) -> None:
    """Makes a call, pings without one, and makes another."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", round(every_s * 1000)),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with grpc.aio.insecure_channel(target, options) as channel:
        stub: Any = pb_grpc.BatchInferenceStub(channel)
        _ = await stub.GetServerInfo(pb.GetServerInfoRequest())
        await asyncio.sleep(PING_FOR_S)  # the time itself is what is tested
        _ = await stub.GetServerInfo(pb.GetServerInfoRequest())


async def ping_from_go(program: Path, target: str) -> None:
    """The same, by another implementation of gRPC."""
    assert await output(program, "--target", target, KEEPALIVE) == f"{KEEPALIVE} ok\n"


@pytest.mark.slow
async def test_pings_at_the_permitted_rate_cost_nothing(tmp_path: Path) -> None:
    """A quiet caller that asks every ten seconds keeps its connection; one that asks every second is sent away."""
    # Without Go there is one caller less; the other tests of Go say that it is missing.
    program = built("./cmd/interop", tmp_path) if shutil.which("go") else None
    async with (
        interop_service() as h,
        CuttingProxy(h.target) as patient,
        CuttingProxy(h.target) as patient_go,
        CuttingProxy(h.target) as nervous,
    ):
        callers = [ping(patient.target, PING_EVERY_S), ping(nervous.target, 1.0)]
        if program is not None:
            callers.append(ping_from_go(program, patient_go.target))
        _ = await asyncio.gather(*callers)
    for proxy in (patient, patient_go) if program is not None else (patient,):
        assert proxy.asked.count(Frames.PING) >= PINGS
        assert Frames.GOAWAY not in proxy.answered
        assert proxy.connections == 1
    assert Frames.GOAWAY in nervous.answered
