"""The gRPC server: the service, its health and its reflection on one port."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

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

# What a system says of an address, and what to do about it.
_WHY_NOT: Final = {
    errno.EADDRINUSE: "another program listens there: end it, or choose another port",
    errno.EADDRNOTAVAIL: "it is not an address of this machine: choose one that is, or 0.0.0.0 for all of them",
    errno.EACCES: "this user may not: choose another one, as a rule with a port above 1023",
}


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
        except RuntimeError:
            # gRPC says no more than that it could not.
            port = 0
        if port == 0:
            raise OSError(f"cannot listen on {listen}: {_why_not(listen)} (UNISONO_LISTEN, or --listen)")
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


def _why_not(listen: str) -> str:
    """Why nobody can listen there, found by trying, and what to do."""
    path = listen.removeprefix("unix:")
    try:
        if path != listen:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(path)
            Path(path).unlink()
        else:
            host, _, port = listen.rpartition(":")
            for family, _, _, _, where in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(where)
                    probe.listen()
    except socket.gaierror as error:
        return f"{error.strerror}: choose an address of this machine"
    except OSError as error:
        return _WHY_NOT.get(error.errno or 0) or f"{error.strerror or error}: choose another one"
    return "another program had it just now: try again"
