"""gRPC's interoperability cases, as far as they apply to this service: what all languages' callers have in common.

Names are those of gRPC's own list (its doc/interop-test-descriptions.md) where it has the case. Left out is what
a service without authentication, without echoed metadata and without compressed answers has nothing to say to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.clients.programs import LIMIT_S
from tests.fakes.ollama import Answer, Fault, FaultKind
from tests.integration.service import House, house

CASES = (
    "cancel_after_begin",
    "cancel_after_first_response",
    "client_compressed_unary",
    "client_streaming",
    "empty_stream",
    "empty_unary",
    "large_response",
    "large_unary",
    "message_too_large",
    "ping_pong",
    "server_streaming",
    "special_status_message",
    "status_code_and_message",
    "timeout_on_sleeping_server",
    "unimplemented_method",
    "unimplemented_service",
)
# This one takes its time, so it has a test of its own.
KEEPALIVE = "keepalive"
# The rate that the service permits, and how long a caller keeps to it: four pings.
PING_EVERY_S, PING_FOR_S, PINGS = 10.0, 43.0, 4

MAX_RECEIVE, MAX_SEND = 32 * 1024 * 1024, 4 * 1024 * 1024
# What the backend is asked to do.
SHORT, ENDLESS, BIG, BROKEN = "[[tokens=2]]", "[[tokens=4000]]", "a big answer", "a special error"
# Characters of one to four bytes, and what would end a header.
SPECIAL = "test with whitespace\t\r\nand é, Unicode BMP ☺ and non-BMP 😈"


@asynccontextmanager
async def interop_service() -> AsyncGenerator[House, None]:
    """A service over a backend that does what the cases ask it for."""
    # As Ollama passes on what llama.cpp's server says: JSON inside its own message.
    inner = json.dumps({"error": {"message": SPECIAL}}, ensure_ascii=False)
    fault = Fault(
        FaultKind.ANSWER, when=lambda body: BROKEN in str(body), times=None, status=400, body={"error": inner}
    )
    settings: dict[str, Any] = {"slots": 4}
    async with house(num_parallel=4, pass_s=0.002, settings=settings) as h:
        h.fake.answer(BIG, Answer(content=("x" * (MAX_SEND + 1_000_000),)))
        _ = h.fake.faults.add(fault)
        yield h


async def output(program: Path, *arguments: str) -> str:
    """What a program that runs cases writes."""
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(PING_FOR_S + LIMIT_S):
        out, _ = await process.communicate()
    return out.decode()
