"""A channel to a service, and what every call carries: the trace of whoever calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import grpc
import grpc.aio

from unisono_client._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

_OPTIONS: Final = (
    # An answer of the service's is at most 4 MiB; what it takes is at most 32 MiB, which it says itself.
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    # A connection of its own: another client's in this process may be far behind.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC's own pauses between connections are up to two minutes; ours are up to five seconds.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A service whose machine has vanished is noticed within half a minute; more often it is not to be asked.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Nothing is sent twice but by us.
    ("grpc.enable_retries", 0),
)


class Transport:
    """One connection; to be made, and used, in one event loop."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.target = target
        self._metadata = tuple((metadata or {}).items())
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, _OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, _OPTIONS)
        self.stub = pb_grpc.BatchInferenceStub(self._channel)

    def metadata(self) -> Sequence[tuple[str, str]]:
        """What a call carries that is made now."""
        return (*self._metadata, *trace_context())

    async def close(self) -> None:
        """Ends the connection, and all calls on it."""
        await self._channel.close()


def trace_context() -> Sequence[tuple[str, str]]:
    """`traceparent` and `tracestate` of the current OpenTelemetry span; nothing where there is no span, or no API."""
    try:
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415  # an import for those who have it
            TraceContextTextMapPropagator,
        )
    except ImportError:
        return ()
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
