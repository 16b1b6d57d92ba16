"""The gRPC server: the service, its health and its reflection on one port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from unisono.edge.grpc.service import BatchInferenceServicer

SERVICE = "unisono.v1.BatchInference"
MAX_RECEIVE_BYTES = 32 * 1024 * 1024
MAX_SEND_BYTES = 4 * 1024 * 1024

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", MAX_SEND_BYTES),
    # A second service on the same port must fail, not share it silently.
    ("grpc.so_reuseport", 0),
    # Streams may be silent for hours: callers may ask whether we live every ten seconds, also without a call.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A caller whose machine vanished is noticed within a minute and a half.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class GrpcServer:
    """Serves on one address."""

    def __init__(self, servicer: BatchInferenceServicer) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        pb_grpc.add_BatchInferenceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (pb.DESCRIPTOR.services_by_name["BatchInference"].full_name, health.SERVICE_NAME)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)

    async def start(self, listen: str) -> int:
        """Begins to serve on HOST:PORT (port 0: any that is free); answers with the port. Raises OSError."""
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {listen}: is another service there? ({error})") from None
        if port == 0:
            raise OSError(f"cannot listen on {listen}")
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def drain(self) -> None:
        """Says that no more calls should come."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Ends: calls have so long to end by themselves."""
        await self._server.stop(grace_s)
