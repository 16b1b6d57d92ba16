"""Whether the service answers, for a container's health check: exit code 0 where its health is SERVING.

It asks at UNISONO_SERVER, or where UNISONO_LISTEN says, on this machine.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_PATIENCE_S = 3.0
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - nothing is bound here


def target() -> str:
    """Where the service is asked."""
    listen = os.environ.get("UNISONO_LISTEN") or "127.0.0.1:50051"
    return os.environ.get("UNISONO_SERVER") or (listen if listen.startswith("unix:") else _reached(listen))


def _reached(listen: str) -> str:
    """Where one that listens there is reached from this machine: what listens everywhere does so on loopback too."""
    host, _, port = listen.rpartition(":")
    return f"{_EVERYWHERE.get(host, host)}:{port}"


def main() -> int:
    """The exit code."""
    with grpc.insecure_channel(target()) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_PATIENCE_S)
        except grpc.RpcError:
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
