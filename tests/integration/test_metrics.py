"""GET /metrics of a service that has answered batches: what it says is what the reports say."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from urllib.parse import urlsplit

import httpx
import pytest

from tests.fakes.ollama import FakeOllama, Fault, FaultKind
from tests.fakes.scraped import Scraped
from tests.integration.service import LIMIT_S, chat, chats, house
from unisono.adapters.metrics.endpoint import MetricsEndpoint
from unisono.adapters.metrics.series import Series

FAKE = {"backend": "ollama", "model": "fake:latest"}


async def scrape(url: str) -> Scraped:
    """What a scraper reads."""
    async with httpx.AsyncClient(timeout=LIMIT_S) as client:
        answer = await client.get(url)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Scraped(answer.text)


async def test_the_figures_are_those_of_the_report() -> None:
    """Items, tokens, passes, loads, times: after two batches, their sums; and nobody's words."""
    async with house(with_metrics=True, pass_s=0.002) as h:
        batches = [await h.run(chats(count, "Tell the secret xyzzy {} [[tokens=12]]")) for count in (8, 4)]
        seen = await scrape(h.metrics_url)
        reports = [batch.report for batch in batches]
        groups = [group for report in reports for group in report.groups]
        assert seen.by("unisono_items_total", "state") == {"completed": 12.0}
        assert seen.value("unisono_prompt_tokens_total", **FAKE) == sum(r.prompt_tokens for r in reports)
        assert seen.value("unisono_completion_tokens_total", **FAKE) == sum(r.completion_tokens for r in reports)
        assert seen.value("unisono_passes_total", **FAKE) == sum(group.passes.count for group in groups)
        assert seen.value("unisono_items_per_pass_count", **FAKE) == 2
        assert 1 < seen.value("unisono_pass_items_total") / seen.value("unisono_passes_total") <= 4
        assert seen.value("unisono_loads_total", outcome="loaded", **FAKE) == sum(group.loads for group in groups)
        for name in ("item_queue", "item_duration", "time_to_first_token"):
            assert seen.value(f"unisono_{name}_seconds_count", **FAKE) == 12
        firsts = [result.timings.first_token.ToNanoseconds() / 1e9 for b in batches for result in b.results.values()]
        assert seen.value("unisono_time_to_first_token_seconds_sum") == pytest.approx(sum(firsts), abs=1e-6)
        assert seen.value("unisono_release_spread_seconds_count", **FAKE) >= 2
        assert seen.by("unisono_batches_total", "state") == {"completed": 2.0}
        idle = seen.by("unisono_idle_slot_seconds_total", "reason")
        assert all(seconds >= 0 for seconds in idle.values())
        assert seen.value("unisono_backend_up", backend="ollama") == 1
        assert seen.value("unisono_queue_depth") == seen.value("unisono_in_flight") == 0
        assert seen.value("unisono_slots_limit", **FAKE) >= 4
        assert seen.value("process_resident_memory_bytes") > 1_000_000
        for hidden in ("xyzzy", "i0", *(batch.batch_id for batch in batches)):
            assert hidden not in seen.text


async def test_work_in_hand_is_seen() -> None:
    """While a batch runs: what is at the backend, what waits, and the batch."""
    async with house(with_metrics=True, pass_s=0.02, num_parallel=2, settings={"slots": 2}) as h:
        reading = h.run_batch(chats(6, "Question {} [[tokens=200]]"))
        released = await reading.until("released")
        seen = await scrape(h.metrics_url)
        assert seen.value("unisono_in_flight") >= released.item_count
        assert seen.value("unisono_in_flight") + seen.value("unisono_queue_depth") == 6
        assert seen.value("unisono_slots", **FAKE) == 2
        assert seen.value("unisono_batches_running") == 1
        await reading.lose()
        await h.until_running(0)
        seen = await scrape(h.metrics_url)
        assert seen.by("unisono_item_errors_total", "reason") == {"CANCELLED": 6.0}
        assert seen.by("unisono_batches_total", "state") == {"cancelled": 1.0}


async def test_failures_are_told_by_reason() -> None:
    """A connection that was cut and tried again, and a model that nobody has."""
    async with house(with_metrics=True) as h:
        h.fake.faults.add(
            Fault(FaultKind.RESET, path="/api/chat", when=lambda body: bool(body["messages"]), after_lines=3)
        )
        batch = await h.run([chat("a", "[[tokens=9]]"), chat("b", model="nobody-has-this")])
        assert batch.states() == {"a": "COMPLETED", "b": "FAILED"}
        seen = await scrape(h.metrics_url)
        assert seen.by("unisono_item_errors_total", "reason") == {"MODEL_NOT_FOUND": 1.0}
        assert seen.value("unisono_item_retries_total", **FAKE) == batch.report.retries == 1
        # What callers ask for is no label: only what a backend has.
        assert "nobody-has-this" not in seen.text


async def test_an_outage_shows_while_nothing_could_be_planned() -> None:
    """The backend was stopped while it had nothing to do: it is not up, items queue, and their errors are its own."""
    async with house(with_metrics=True, starts_away=True, settings={"backend_patience": "1s"}) as h:
        assert (await scrape(h.metrics_url)).value("unisono_backend_up", backend="ollama") == 1
        reading = h.run_batch(chats(6))
        async with asyncio.timeout(LIMIT_S):
            # Each scrape is a moment in which the service goes on.
            while (seen := await scrape(h.metrics_url)).value("unisono_backend_up", backend="ollama"):
                pass
        assert seen.value("unisono_queue_depth", backend="ollama") == 6
        assert 'unisono_item_errors_total{backend="ollama",model="",reason="BACKEND_UNAVAILABLE"} 0.0' in seen.text
        _ = await reading.to_end()
        seen = await scrape(h.metrics_url)
        assert seen.value("unisono_item_errors_total", backend="ollama", reason="BACKEND_UNAVAILABLE") == 6
        assert seen.value("unisono_queue_depth") == 0
        assert seen.value("unisono_backend_up") == 0
        await h.fake.come_back()
        assert (await h.run([chat("a")])).states() == {"a": "COMPLETED"}
        assert (await scrape(h.metrics_url)).value("unisono_backend_up") == 1


# -- HTTP --------------------------------------------------------------------------------------------------------


async def raw(url: str, request: bytes) -> bytes:
    """What comes back until the other side closes."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(request)
    async with asyncio.timeout(LIMIT_S):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def refuse_defect(where: str, defect: BaseException) -> None:
    """Nothing may go wrong here."""
    raise AssertionError(where) from defect


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics HTTP/1.1", "200 OK"),
        ("GET /metrics?a=b HTTP/1.0", "200 OK"),
        ("HEAD /metrics HTTP/1.1", "200 OK"),
        ("GET / HTTP/1.1", "404 Not Found"),
        ("GET /metrics/more HTTP/1.1", "404 Not Found"),
        ("POST /metrics HTTP/1.1", "405 Method Not Allowed"),
        ("nonsense", "400 Bad Request"),
        (f"GET /{'x' * 20_000} HTTP/1.1", "431 Request Header Fields Too Large"),
    ],
)
async def test_only_the_figures_are_there(request_line: str, status: str) -> None:
    """Another path is 404, another method 405; a request that is none is told so."""
    registry = Series(version="1.2.3").registry
    endpoint = await MetricsEndpoint.start(registry, "127.0.0.1", 0, report_defect=refuse_defect)
    try:
        answer = await raw(endpoint.url, f"{request_line}\r\nHost: here\r\n\r\n".encode())
    finally:
        await endpoint.close()
    assert answer.startswith(f"HTTP/1.1 {status}\r\n".encode())
    assert (b"unisono_build_info{" in answer) is (request_line.startswith("GET") and status == "200 OK")
    assert b"Connection: close\r\n" in answer


async def test_openmetrics_is_spoken_where_asked_for() -> None:
    """As Prometheus does."""
    async with house(with_metrics=True) as h, httpx.AsyncClient() as client:
        answer = await client.get(h.metrics_url, headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")


async def test_whoever_says_nothing_holds_up_nobody() -> None:
    """A connection without a request: others are answered, and the end does not wait for it."""
    async with house(with_metrics=True) as h:
        parts = urlsplit(h.metrics_url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        assert (await scrape(h.metrics_url)).value("unisono_backend_up") == 1
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == b""
    writer.close()


async def test_none_means_nowhere() -> None:
    """No port is opened, and nothing is counted."""
    async with house(with_metrics=True, settings={"metrics_listen": "none"}) as h:
        assert h.metrics_url == ""
        assert (await h.run([chat("a")])).states() == {"a": "COMPLETED"}


# -- The command -------------------------------------------------------------------------------------------------


async def lines_until(reader: asyncio.StreamReader, word: bytes) -> bytes:
    """What is written until a line has this word."""
    seen = b""
    async with asyncio.timeout(LIMIT_S):
        while word not in seen:
            line = await reader.readline()
            assert line, seen
            seen += line
    return seen


async def test_a_port_that_is_taken_is_a_warning() -> None:
    """`unisono serve` serves all the same, and says what to set."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        async with FakeOllama() as fake:
            inherited = {n: v for n, v in os.environ.items() if not n.startswith(("UNISONO_", "OLLAMA_"))}
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "unisono", "serve", "--listen", "127.0.0.1:0", "--ollama", fake.url),
                env={
                    **inherited,
                    "UNISONO_STATE_DIR": "none",
                    "UNISONO_METRICS_LISTEN": where,
                    "UNISONO_HTTP_LISTEN": "none",
                },
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            assert process.stderr is not None
            try:
                said = await lines_until(process.stderr, b'"serving"')
            finally:
                process.send_signal(signal.SIGTERM)
                _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert b"metrics are not served" in said
    assert b"UNISONO_METRICS_LISTEN" in said
    assert where.encode() in said
    assert process.returncode == 0
