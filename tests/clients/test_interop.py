"""gRPC's interoperability cases from Python, over a real connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.empty_pb2 import Empty

from tests.clients.interop import (
    BIG,
    BROKEN,
    CASES,
    ENDLESS,
    MAX_RECEIVE,
    MAX_SEND,
    SHORT,
    SPECIAL,
    interop_service,
)
from tests.integration.service import House, chat, config, reason_of, refused
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2

COMPLETED = event_pb2.BATCH_STATE_COMPLETED


# -- Unary calls -----------------------------------------------------------------------------------------------


async def empty_unary(h: House) -> None:
    """A request without a field is answered."""
    info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.limits.max_receive_bytes, info.limits.max_send_bytes) == (MAX_RECEIVE, MAX_SEND)


def _plan(size: int) -> pb.PlanBatchRequest:
    """A request of about so many bytes."""
    each = 2 * 1024 * 1024
    items = [chat(str(n), "x" * (each - 100)) for n in range(size // each)]
    return pb.PlanBatchRequest(config=config(), items=items)


async def large_unary(h: House) -> None:
    """32 MiB are received."""
    request = _plan(MAX_RECEIVE)
    assert 0.99 * MAX_RECEIVE < request.ByteSize() <= MAX_RECEIVE
    answer = await h.stub.PlanBatch(request)
    assert answer.groups or answer.refusals


async def message_too_large(h: House) -> None:
    """More than 32 MiB is RESOURCE_EXHAUSTED; the connection is as good as before."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.stub.PlanBatch(_plan(MAX_RECEIVE + MAX_SEND))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await empty_unary(h)


async def client_compressed_unary(h: House) -> None:
    """A compressed request is read."""
    answer = await h.stub.PlanBatch(_plan(MAX_SEND), compression=grpc.Compression.Gzip)
    assert answer.groups or answer.refusals


# -- Streams ---------------------------------------------------------------------------------------------------


async def client_streaming(h: House) -> None:
    """Messages of their own, then a half-close, which alone releases them."""
    stream = await h.stream().open(release=pb.ReleasePolicy(size=1000))
    for n in range(4):
        _ = await stream.add(chat(str(n), SHORT))
    _ = await stream.half_close()
    seen = await stream.to_end()
    assert (len(seen.results), seen.summary.state) == (4, COMPLETED)
    assert await stream.call.code() is grpc.StatusCode.OK


async def server_streaming(h: House) -> None:
    """One request, many answers."""
    seen = await h.run([chat("a", SHORT), chat("b", SHORT)])
    assert seen.states() == {"a": "COMPLETED", "b": "COMPLETED"}


async def large_response(h: House) -> None:
    """What is larger than 4 MiB comes in messages that are not."""
    seen = await h.run([chat("a", BIG)])
    assert seen.of("result_part")
    assert len(seen.results["a"].completion.content) > MAX_SEND
    assert max(event.ByteSize() for event in seen.events) <= MAX_SEND


async def ping_pong(h: House) -> None:
    """Each answer is waited for before the next message is sent."""
    stream = await h.stream().open()
    for n in range(4):
        _ = await stream.add(chat(str(n), SHORT))
        _ = await stream.until(lambda s: f"result {n}" in s.log)  # noqa: B023  # awaited at once
    _ = await stream.half_close()
    seen = await stream.to_end()
    assert (len(seen.results), seen.summary.state) == (4, COMPLETED)


async def empty_stream(h: House) -> None:
    """A batch without items ends; a stream without any message has no batch."""
    stream = await h.stream().open()
    _ = await stream.half_close()
    assert (await stream.to_end()).summary.state == COMPLETED
    silent = h.stream()
    _ = await silent.half_close()
    assert (await refused(silent)).code is grpc.StatusCode.INVALID_ARGUMENT


# -- Ends ------------------------------------------------------------------------------------------------------


async def cancel_after_begin(h: House) -> None:
    """A call that is cancelled before anything was sent is CANCELLED, and costs nothing else."""
    call = h.stub.StreamBatch()
    assert call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED
    await empty_unary(h)


async def cancel_after_first_response(h: House) -> None:
    """The caller hears CANCELLED, and the batch is cancelled."""
    reading = h.run_batch([chat("a", ENDLESS)])
    accepted = await reading.until("accepted")
    await reading.lose()
    assert await reading.call.code() is grpc.StatusCode.CANCELLED
    seen = await h.attach(accepted.batch_id)
    assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED


async def timeout_on_sleeping_server(h: House) -> None:
    """A deadline that is over at once is DEADLINE_EXCEEDED; one with room is the batch's, and its end is heard."""
    call = h.stub.StreamBatch(timeout=0.001)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    seen = await h.run_batch([chat("a", ENDLESS)], timeout=1.0).to_end()
    assert seen.summary.state == event_pb2.BATCH_STATE_EXPIRED
    assert reason_of(seen.results["a"]) == "BATCH_DEADLINE"


async def status_code_and_message(h: House) -> None:
    """An error has its code, its message and its reason."""
    no = await refused(h.stub.CancelBatch(pb.CancelBatchRequest(batch_id="nosuch")))
    assert (no.code, no.reason) == (grpc.StatusCode.NOT_FOUND, "BATCH_NOT_FOUND")
    assert "nosuch" in no.message


async def special_status_message(h: House) -> None:
    """What a caller wrote comes back with its line breaks as escapes; what a backend said comes back as it was."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.stub.ListModels(pb.ListModelsRequest(backend=SPECIAL))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    quoted = SPECIAL.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    assert quoted in (caught.value.details() or "")
    seen = await h.run([chat("a", BROKEN)])
    assert SPECIAL in seen.results["a"].error.message


async def unimplemented_method(h: House) -> None:
    """A method that is none."""
    await _unimplemented(h, "/unisono.v1.BatchInference/NoSuchMethod")


async def unimplemented_service(h: House) -> None:
    """A service that is none."""
    await _unimplemented(h, "/unisono.v1.NoSuchService/GetServerInfo")


async def _unimplemented(h: House, path: str) -> None:
    ask: Any = h.channel.unary_unary(path, Empty.SerializeToString, Empty.FromString)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(Empty())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", CASES)
async def test_case(name: str) -> None:
    """Each case holds."""
    case: Callable[[House], Awaitable[None]] = globals()[name]
    async with interop_service() as h:
        await case(h)
