"""What the rpcs have in common: their service's name, what came with a call, and how a wrong field is refused."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from unisono.core.errors import InvalidRequestError, Violation

if TYPE_CHECKING:
    import grpc.aio
    from google.protobuf.message import Message

    Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "unisono.v1.BatchInference"
# As the W3C names them.
_TRACE_CONTEXT = frozenset({"traceparent", "tracestate", "baggage"})


def wrong(field: str, description: str) -> InvalidRequestError:
    """The refusal of a request for one field of it."""
    return InvalidRequestError(
        f"{field}: {description}", violations=[Violation(field=field, description=description)]
    )


def carrier_of(context: Context) -> dict[str, str]:
    """The trace context of the call's metadata, and nothing else of it: what lets the caller in is not to be kept."""
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if key in _TRACE_CONTEXT and isinstance(value, str)}


def fingerprint_of(message: Message) -> bytes:
    """Stands for the content of a request, to be compared with what comes under the same request_id."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
