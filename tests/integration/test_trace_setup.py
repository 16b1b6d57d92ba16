"""What the standard `OTEL_*` variables do, and that a collector which is away costs a bounded time and one line."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.otlp import OtlpReceiver
from tests.fakes.scripted_batch import METHOD, ScriptedBatch, chat_item
from unisono.adapters.telemetry.export import _EXPORT_LOGGERS, _PROCESSOR_LOGGER
from unisono.adapters.telemetry.setup import Telemetry, TelemetrySettingError, configure


def traced(telemetry: Telemetry | None, items: int = 3) -> Telemetry:
    """A batch of that many items, traced."""
    assert telemetry is not None
    batch = ScriptedBatch(telemetry.listener())
    batch.plan("smol")
    for index in range(items):
        batch.run(chat_item(index))
    batch.end()
    return telemetry


@pytest.fixture
def dead_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that takes connections, and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """What reaches standard error in a process that has set up no logging: Python's handler of last resort."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        yield capfd
    finally:
        root.handlers = handlers


@pytest.mark.parametrize("port_name", ["dead_port", "mute_port"])
def test_a_collector_that_is_away_costs_a_bounded_end_and_one_line(
    port_name: str, request: pytest.FixtureRequest, said: pytest.CaptureFixture[str]
) -> None:
    """Refused or never answered: the shutdown ends in time, no thread stays, and one line says what is lost."""
    port: int = request.getfixturevalue(port_name)
    threads = set(threading.enumerate())
    telemetry = configure(
        "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "10"}
    )
    traced(telemetry, items=600)
    assert telemetry is not None
    began = time.monotonic()
    assert telemetry.shutdown(timeout_s=1.0) is False
    assert time.monotonic() - began < 10.0
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=5)
        assert not thread.is_alive()
    out, err = said.readouterr()
    assert out == ""
    assert len(err.splitlines()) <= 1, err
    # Once more is safe.
    telemetry.shutdown(timeout_s=1.0)


def test_a_collector_that_comes_back_gets_what_follows(dead_port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Spans lost while it was away are counted in one line, and later ones arrive."""
    telemetry = configure(
        "1",
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{dead_port}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
        },
    )
    traced(telemetry)
    assert telemetry is not None
    assert telemetry.flush(timeout_s=10)
    traced(telemetry)
    assert telemetry.flush(timeout_s=10)
    with OtlpReceiver(port=dead_port) as otlp:
        traced(telemetry)
        assert telemetry.shutdown(timeout_s=10)
        assert [span.name for span in otlp.spans].count(METHOD) == 1
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("unisono")]
    assert len(lines) == 2
    assert "cannot be delivered" in lines[0]
    assert "UNAVAILABLE" in lines[0]
    assert "again; 18 spans were lost" in lines[1]
    assert not [record for record in caplog.records if record.name in {*_EXPORT_LOGGERS, _PROCESSOR_LOGGER}]


def test_a_full_queue_is_no_news_while_the_collector_is_away(
    dead_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it is said that spans are lost, losing more of them is not said again."""
    telemetry = configure(
        "1",
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{dead_port}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",
            "OTEL_BSP_MAX_QUEUE_SIZE": "8",
        },
    )
    traced(telemetry, items=1)
    assert telemetry is not None
    assert telemetry.flush(timeout_s=10)
    caplog.clear()
    traced(telemetry, items=200)
    telemetry.shutdown(timeout_s=0.5)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("environ", [{}, {"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_EXPORTER_OTLP_ENDPOINT": " "}])
def test_nothing_is_exported_unless_asked_for(environ: dict[str, str]) -> None:
    """No thread, no target and no connection, but spans: the backend learns a trace."""
    threads = threading.active_count()
    telemetry = configure("1", environ)
    assert telemetry is not None
    assert telemetry.targets == ()
    batch = ScriptedBatch(telemetry.listener())
    batch.plan("smol")
    (headers,) = batch.stage(chat_item(0))
    assert int(headers["traceparent"].split("-")[3], 16) & 1
    assert threading.active_count() == threads
    assert telemetry.shutdown()


def test_it_can_be_turned_off() -> None:
    """OTEL_SDK_DISABLED leaves nothing at all."""
    assert configure("1", {"OTEL_SDK_DISABLED": "true"}) is None


def test_an_exporter_asked_for_by_name_has_the_standard_s_address() -> None:
    """OTEL_TRACES_EXPORTER=otlp alone means the local collector."""
    telemetry = configure("1", {"OTEL_TRACES_EXPORTER": "otlp"})
    assert telemetry is not None
    assert telemetry.targets == ("http://localhost:4317",)
    telemetry.shutdown(timeout_s=0.5)


def test_the_variables_for_traces_come_first(otlp: OtlpReceiver) -> None:
    """Endpoint and headers for traces win over those for everything; headers are decoded."""
    telemetry = configure(
        "1",
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": "X-Team=nobody",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "X-Team=choir%20one, x-other=2",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_SERVICE_NAME": "choir",
            "OTEL_RESOURCE_ATTRIBUTES": "service.name=other,team=blue",
        },
    )
    assert traced(telemetry).shutdown(timeout_s=10)
    assert {span.resource["service.name"] for span in otlp.spans} == {"choir"}
    assert {span.resource["team"] for span in otlp.spans} == {"blue"}
    for metadata in otlp.metadata:
        assert (metadata["x-team"], metadata["x-other"]) == ("choir one", "2")


def test_an_endpoint_without_a_scheme_is_plain_where_insecure_says_so(otlp: OtlpReceiver) -> None:
    """The gRPC exporter's own form of an address works."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint.removeprefix("http://"),
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
    }
    assert traced(configure("1", environ)).shutdown(timeout_s=10)
    assert otlp.spans


@pytest.mark.parametrize(
    ("sampler", "argument", "is_exported"),
    [
        ("always_on", "", True),
        ("parentbased_always_on", "", True),
        ("always_off", "", False),
        ("parentbased_always_off", "", False),
        ("traceidratio", "1.0", True),
        ("parentbased_traceidratio", "0", False),
    ],
)
def test_samplers(otlp: OtlpReceiver, sampler: str, argument: str, is_exported: bool) -> None:  # noqa: FBT001
    """A whole batch is sampled, or none of it."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        "OTEL_TRACES_SAMPLER": sampler,
        "OTEL_TRACES_SAMPLER_ARG": argument,
    }
    assert traced(configure("1", environ)).shutdown(timeout_s=10)
    assert len(otlp.spans) == (9 if is_exported else 0)


def test_the_console_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to results, so spans for a reader go beside them."""
    assert traced(configure("1", {"OTEL_TRACES_EXPORTER": "console"})).shutdown(timeout_s=10)
    out, err = capsys.readouterr()
    assert out == ""
    assert '"name": "chat smol"' in err


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "none, otlp or console"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "grpc or http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "seconds"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli", "none or gzip"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "no-equals-sign", "key=value"),
        ("OTEL_TRACES_SAMPLER", "sometimes", "always_on"),
        ("OTEL_TRACES_SAMPLER_ARG", "2", "from 0 to 1"),
        ("OTEL_RESOURCE_ATTRIBUTES", "nothing", "key=value"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "above 0"),
    ],
)
def test_what_cannot_be_understood_is_said_at_the_start(name: str, value: str, says: str) -> None:
    """An error names the variable and what would be right, and leaves no thread behind."""
    threads = threading.active_count()
    environ = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "traceidratio", name: value}
    with pytest.raises(TelemetrySettingError, match=says) as caught:
        configure("1", environ)
    assert name in str(caught.value)
    assert threading.active_count() == threads


def test_headers_that_cannot_be_read_are_not_quoted() -> None:
    """A header may be a token: the error does not repeat it."""
    environ = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_HEADERS": "Bearer-of-secrets"}
    with pytest.raises(TelemetrySettingError) as caught:
        configure("1", environ)
    assert "Bearer-of-secrets" not in str(caught.value)


def test_a_certificate_that_is_not_there_is_said(tmp_path: Path) -> None:
    """The file's name and what is wrong with it."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem"),
    }
    with pytest.raises(TelemetrySettingError, match=r"ca\.pem cannot be read: No such file"):
        configure("1", environ)


def test_http_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the error names the package."""
    # None in sys.modules is Python's own way to say that a module cannot be imported.
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with pytest.raises(TelemetrySettingError, match="opentelemetry-exporter-otlp-proto-http"):
        configure("1", environ)
