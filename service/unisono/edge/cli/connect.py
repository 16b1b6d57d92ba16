"""A service to talk to: the one that is named, the one that is running, or one of our own."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from unisono._generated.unisono.v1 import batch_inference_pb2_grpc
from unisono.core.errors import UnisonoError
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_call, stop_for_call
from unisono.edge.cli.ports import StartServer
from unisono.edge.cli.terminal import printable

DEFAULT_SERVER = "127.0.0.1:50051"
# How long a service that nobody named may take to say that it is there, and one that was named.
_QUICK_S = 0.3
_PATIENT_S = 5.0
# A service whose machine has vanished is noticed in half a minute; one that is back, within seconds.
_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which service a command wants."""

    # HOST:PORT; None: whatever is running, or one of our own.
    server: str | None = None
    # Either of these asks for a service of our own, with that backend.
    embedded: bool = False
    ollama_url: str | None = None
    # Whether the service is spoken to over TLS, and the file of certificates that it is trusted by; None: the usual.
    tls: bool = False
    ca: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A service that has answered."""

    # HOST:PORT.
    target: str
    stub: batch_inference_pb2_grpc.BatchInferenceStub


@asynccontextmanager
async def connect(wish: Wish, start: StartServer, say: Callable[[str], None]) -> AsyncIterator[Connection]:
    """A service that answers, until the context is left; `say` is told which. Raises StopError."""
    if wish.server and (wish.embedded or wish.ollama_url):
        raise StopError(
            "--server uses a service that is running, with the backend that it has; "
            "--embedded and --ollama are for a service that is started here. Leave one of them out.",
            code=ExitCode.USAGE,
        )
    credentials = _credentials(wish)
    if not (wish.embedded or wish.ollama_url):
        target = _target(wish)
        is_asked_for = bool(wish.server or credentials)
        async with _open(target, credentials) as channel:
            error = await _check(channel, _PATIENT_S if is_asked_for else _QUICK_S)
            if error is None:
                say(f"using the service at {target}")
                yield Connection(target=target, stub=batch_inference_pb2_grpc.BatchInferenceStub(channel))
                return
            if is_asked_for:
                raise stop_for_call(error, target)
            say(f"no service at {target} ({_why(error)}), so one is started for this command")
    async with _start(wish, start, say) as target, _open(target) as channel:
        yield Connection(target=target, stub=batch_inference_pb2_grpc.BatchInferenceStub(channel))


@asynccontextmanager
async def connect_to_running(wish: Wish) -> AsyncIterator[Connection]:
    """The service that is running, until the context is left: one of our own would end with the command.

    Raises StopError.
    """
    target = _target(wish)
    async with _open(target, _credentials(wish)) as channel:
        error = await _check(channel, _PATIENT_S)
        if error is None:
            yield Connection(target=target, stub=batch_inference_pb2_grpc.BatchInferenceStub(channel))
        elif error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise StopError(
                f"The service at {target}: {printable(problem_of_call(error).message, one_line=True)} "
                f"({error.code().name})",
                "Batches are kept by a service that stays: start one with `unisono serve`, or name it with --server.",
                code=ExitCode.UNREACHABLE,
            )
        else:
            raise stop_for_call(error, target)


def _target(wish: Wish) -> str:
    return wish.server or os.environ.get("UNISONO_SERVER") or DEFAULT_SERVER


@asynccontextmanager
async def _start(wish: Wish, start: StartServer, say: Callable[[str], None]) -> AsyncIterator[str]:
    context = start(embedded=wish.embedded or None, ollama_url=wish.ollama_url, on_progress=say)
    try:
        server = await context.__aenter__()
    except UnisonoError as error:
        raise StopError(
            f"No service could be started: {printable(error.message)} ({error.reason})", code=ExitCode.UNREACHABLE
        ) from error
    except OSError as error:
        raise StopError(f"No service could be started: {error}", code=ExitCode.UNREACHABLE) from error
    try:
        say(f"started a service for this command, using {server.backend_description}")
        yield server.target
    finally:
        await context.__aexit__(None, None, None)


def _credentials(wish: Wish) -> grpc.ChannelCredentials | None:
    """Those of TLS; None: in the clear. Raises StopError."""
    if not (wish.tls or wish.ca):
        return None
    if wish.embedded or wish.ollama_url:
        raise StopError("--tls and --ca are for a service that is running, not for one's own.", code=ExitCode.USAGE)
    try:
        return grpc.ssl_channel_credentials(Path(wish.ca).read_bytes() if wish.ca else None)
    except OSError as error:
        raise StopError(f"{wish.ca} cannot be read: {error.strerror}", code=ExitCode.USAGE) from error


def _open(target: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A channel. Proxies of the environment are for other machines, not for this one."""
    options = [*_OPTIONS, *([("grpc.enable_http_proxy", 0)] if _is_loopback(target) else [])]
    if credentials is not None:
        return grpc.aio.secure_channel(target, credentials, options=options)
    return grpc.aio.insecure_channel(target, options=options)


def _is_loopback(target: str) -> bool:
    host = target.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or target.startswith("unix:")


async def _check(channel: grpc.aio.Channel, timeout_s: float) -> grpc.aio.AioRpcError | None:
    """None if the service serves; else what its health check ended with."""
    try:
        # Not HealthStub: its annotations know nothing of grpc.aio.
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        details=f"it is there, but not serving ({state})",
    )


def _why(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {_QUICK_S * 1000:.0f} ms"
    problem = problem_of_call(error)
    return (
        "nothing listens there" if "refused" in problem.message.lower() else printable(problem.message, one_line=True)
    )
