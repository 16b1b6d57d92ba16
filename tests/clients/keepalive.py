"""Callers that ping a service for most of a minute, as a process of their own: other tests need not wait meanwhile.

    python -m tests.clients.keepalive

Writes, for each caller, what went over its connection: {"patient": {"pings": 4, "goaways": 0, "connections": 1}, …}.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from tests.clients.go import built
from tests.clients.interop import KEEPALIVE, PING_EVERY_S, PING_FOR_S, interop_service, output
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


async def observe(go: Path | None) -> dict[str, dict[str, int]]:
    """All callers side by side; what each proxy in between has seen."""
    async with (
        interop_service() as h,
        CuttingProxy(h.target) as patient,
        CuttingProxy(h.target) as patient_go,
        CuttingProxy(h.target) as nervous,
    ):
        proxies = {"patient": patient, "nervous": nervous}
        callers = [ping(patient.target, PING_EVERY_S), ping(nervous.target, 1.0)]
        if go is not None:
            proxies["patient_go"] = patient_go
            callers.append(ping_from_go(go, patient_go.target))
        _ = await asyncio.gather(*callers)
    return {
        name: {
            "pings": proxy.asked.count(Frames.PING),
            "goaways": proxy.answered.count(Frames.GOAWAY),
            "connections": proxy.connections,
        }
        for name, proxy in proxies.items()
    }


def main() -> None:
    """Without Go there is one caller less; the other tests of Go say that it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        go: Path | None = None
        if shutil.which("go"):
            try:
                go = built("./cmd/interop", Path(folder))
            except pytest.skip.Exception as missing:
                print(missing, file=sys.stderr)  # noqa: T201
        print(json.dumps(asyncio.run(observe(go))))  # noqa: T201


if __name__ == "__main__":
    main()
