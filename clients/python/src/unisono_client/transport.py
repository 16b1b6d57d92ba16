"""A channel to a service, and what every call carries: the trace of whoever calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import grpc
import grpc.aio

from unisono_client._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono_client.config import invalid

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


_KEY: Final = re.compile(r"[0-9a-z_.-]+")
_VALUE: Final = re.compile(r"[ -~]*")


class Transport:
    """One connection; to be made, and used, in one event loop."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        self.target = target
        self._metadata = tuple(metadata)
        self.is_secure = credentials is not None
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, _OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, _OPTIONS)
        self.stub = pb_grpc.BatchInferenceStub(self._channel)

    def metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What a call carries that is made now."""
        return (*self._metadata, *trace_context())

    async def close(self) -> None:
        """Ends the connection, and all calls on it."""
        await self._channel.close()


def metadata_of(given: Mapping[str, str | bytes]) -> Sequence[tuple[str, str | bytes]]:
    """Metadata as gRPC has it: its keys are lower case. Raises RefusedError for what cannot be sent."""
    made: list[tuple[str, str | bytes]] = []
    for name, value in given.items():
        where = f"metadata[{name!r}]"
        if not _KEY.fullmatch(key := str(name).lower()) or key.startswith("grpc-"):
            raise invalid(
                where, "is no key of metadata: letters, digits, '-', '_' and '.', and not grpc-…, which is gRPC's"
            )
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise invalid(where, f"is {type(value).__name__}; what ends with -bin is bytes")
        elif not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise invalid(
                where, "is no text of printable ASCII; for anything else end the key with -bin, and give bytes"
            )
        made.append((key, value))
    return made


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
