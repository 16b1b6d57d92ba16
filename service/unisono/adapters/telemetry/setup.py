"""The standard `OTEL_*` variables → a tracer provider.

Read: OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_{ENDPOINT,HEADERS,PROTOCOL,TIMEOUT,COMPRESSION,
INSECURE,CERTIFICATE,CLIENT_KEY,CLIENT_CERTIFICATE} and their …_TRACES_… forms, OTEL_TRACES_SAMPLER(_ARG),
OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME, OTEL_BSP_{SCHEDULE_DELAY,MAX_QUEUE_SIZE,MAX_EXPORT_BATCH_SIZE},
OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT. The SDK itself reads the OTEL_…_LIMIT variables. The timeout is
in seconds, as for all of Python's exporters.

Two things differ from the SDK's own reading. Without OTEL_TRACES_EXPORTER and without an endpoint nothing is
exported: a service on a desk has no collector, and must not look for one. And what cannot be understood is an error
at the start (`TelemetrySettingError`), not a log line nobody reads.

The provider is handed over, never made the process's global one: a program that embeds this service keeps its own.
"""

from __future__ import annotations

import importlib
import platform
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.version import __version__ as sdk_version

from unisono.adapters.telemetry.export import QuietExporter, flush, shut_down
from unisono.adapters.telemetry.spans import ChosenIds
from unisono.adapters.telemetry.trace import DEFAULT_ITEM_LIMIT, TraceListener

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from unisono.adapters.telemetry.groups import KnownBackend

SERVICE_NAME = "unisono"
SHUTDOWN_S = 3.0
# Spans that wait, and spans that travel together. The standard's 2,048 waiting spans are two batches of this service;
# at about 5 kB each, 8,192 take 42 MB while no collector takes them. With content a span can have 70 kB, and what
# travels together must stay below the 4 MiB that a collector takes.
_QUEUE_SIZE = 8192
_QUEUE_SIZE_WITH_CONTENT = 2048
_EXPORT_SIZE = 512
_EXPORT_SIZE_WITH_CONTENT = 32


class TelemetrySettingError(ValueError):
    """An `OTEL_*` variable cannot be understood, or asks for what is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Tracing, ready to use."""

    provider: TracerProvider
    service_version: str
    # Where spans go, for the line that a start prints; empty for nowhere.
    targets: tuple[str, ...] = ()
    # Whether prompts and answers go into spans.
    captures_content: bool = False
    _exporters: tuple[QuietExporter, ...] = field(default=(), repr=False)

    def listener(
        self, backends: Iterable[KnownBackend] = (), *, item_limit: int = DEFAULT_ITEM_LIMIT
    ) -> TraceListener:
        """A Listener that makes traces; it says of each backend in `backends` where it is."""
        return TraceListener(
            self.provider,
            service_version=self.service_version,
            backends=backends,
            item_limit=item_limit,
            capture_content=self.captures_content,
        )

    def flush(self, timeout_s: float = SHUTDOWN_S) -> bool:
        """Sends what has ended so far; blocks for at most `timeout_s`. False where that was too short."""
        return flush(self.provider, timeout_s)

    def shutdown(self, timeout_s: float = SHUTDOWN_S) -> bool:
        """Sends what is left and ends; blocks for at most half a second more than `timeout_s`, also the second time.

        False where that was too short, and spans were lost.
        """
        return shut_down(self.provider, self._exporters, timeout_s)


def configure(service_version: str, environ: Mapping[str, str]) -> Telemetry | None:
    """Tracing as the environment asks for it; None where OTEL_SDK_DISABLED says so.

    Raises TelemetrySettingError.
    """
    settings = _Settings(environ)
    if settings.flag("OTEL_SDK_DISABLED"):
        return None
    captures_content = settings.text("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT").lower() in {
        "true",
        "span_only",
        "span_and_event",
    }
    exporters = _exporters(settings)
    provider = TracerProvider(
        sampler=_sampler(settings),
        id_generator=ChosenIds(),
        resource=_resource(settings, service_version),
        # Its handler at exit waits too long; bootstrap calls Telemetry.shutdown.
        shutdown_on_exit=False,
    )
    queue_size = settings.number(
        "OTEL_BSP_MAX_QUEUE_SIZE", _QUEUE_SIZE_WITH_CONTENT if captures_content else _QUEUE_SIZE
    )
    export_size = settings.number(
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _EXPORT_SIZE_WITH_CONTENT if captures_content else _EXPORT_SIZE
    )
    delay_ms = settings.number("OTEL_BSP_SCHEDULE_DELAY", 5000)
    for exporter in exporters:
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=queue_size,
                schedule_delay_millis=delay_ms,
                max_export_batch_size=min(export_size, queue_size),
            )
        )
    return Telemetry(
        provider=provider,
        service_version=service_version,
        targets=tuple(exporter.target for exporter in exporters),
        captures_content=captures_content,
        _exporters=exporters,
    )


class _Settings:
    """The variables. An empty one counts as not set, as the standard has it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str, default: str = "") -> str:
        return self._environ.get(name, "").strip() or default

    def flag(self, name: str) -> bool:
        return self.text(name).lower() == "true"

    def number(self, name: str, default: int) -> int:
        value = self.text(name, str(default))
        if not value.isascii() or not value.isdigit() or int(value) == 0:
            _refuse(name, value, "a whole number above 0")
        return int(value)

    def otlp(self, name: str, default: str = "") -> str:
        """A variable of the OTLP exporter: the one for traces where it is set, else that for everything."""
        general = self.text(f"OTEL_EXPORTER_OTLP_{name}", default)
        return self.text(f"OTEL_EXPORTER_OTLP_TRACES_{name}", general)


def _refuse(name: str, value: str, expected: str) -> NoReturn:
    raise TelemetrySettingError(f"{name}={value} cannot be understood: expected {expected}")


# -- Exporters -------------------------------------------------------------------------------------------------


def _exporters(settings: _Settings) -> tuple[QuietExporter, ...]:
    default = "otlp" if settings.otlp("ENDPOINT") else "none"
    asked = settings.text("OTEL_TRACES_EXPORTER", default)
    exporters = []
    for name in dict.fromkeys(part.strip().lower() for part in asked.split(",")):
        match name:
            case "none" | "":
                pass
            case "otlp":
                exporters.append(_otlp(settings))
            case "console":
                # Standard output belongs to results.
                exporters.append(QuietExporter(ConsoleSpanExporter(out=sys.stderr), "standard error"))
            case _:
                _refuse("OTEL_TRACES_EXPORTER", asked, "none, otlp or console, or several with commas")
    return tuple(exporters)


def _otlp(settings: _Settings) -> QuietExporter:
    timeout = settings.otlp("TIMEOUT", "10")
    try:
        timeout_s = float(timeout)
    except ValueError:
        _refuse("OTEL_EXPORTER_OTLP_TIMEOUT", timeout, "seconds")
    headers = _pairs("OTEL_EXPORTER_OTLP_HEADERS", settings.otlp("HEADERS"))
    protocol = settings.otlp("PROTOCOL", "grpc")
    match protocol:
        case "grpc":
            return _otlp_grpc(settings, headers, timeout_s)
        case "http/protobuf":
            return _otlp_http(settings, headers, timeout_s)
        case _:
            _refuse("OTEL_EXPORTER_OTLP_PROTOCOL", protocol, "grpc or http/protobuf")


def _otlp_grpc(settings: _Settings, headers: dict[str, str], timeout_s: float) -> QuietExporter:
    endpoint = settings.otlp("ENDPOINT", "http://localhost:4317")
    # "http://" is plain and "https://" is not; INSECURE counts where the endpoint says neither.
    is_plain = endpoint.startswith("http://") or (
        not endpoint.startswith("https://") and settings.otlp("INSECURE").lower() == "true"
    )
    compression = settings.otlp("COMPRESSION", "none").lower()
    if compression not in _COMPRESSIONS:
        _refuse("OTEL_EXPORTER_OTLP_COMPRESSION", compression, "none or gzip")
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=is_plain,
        credentials=None if is_plain else _credentials(settings),
        # gRPC takes no capitals in a header's name.
        headers=tuple((name.lower(), value) for name, value in headers.items()),
        timeout=timeout_s,
        compression=_COMPRESSIONS[compression],
    )
    return QuietExporter(exporter, endpoint)


_COMPRESSIONS = {"none": grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip}


def _credentials(settings: _Settings) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_file(settings, "CERTIFICATE"),
        private_key=_file(settings, "CLIENT_KEY"),
        certificate_chain=_file(settings, "CLIENT_CERTIFICATE"),
    )


def _file(settings: _Settings, name: str) -> bytes | None:
    path = settings.otlp(name)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TelemetrySettingError(f"OTEL_EXPORTER_OTLP_{name}={path} cannot be read: {error.strerror}") from error


def _otlp_http(settings: _Settings, headers: dict[str, str], timeout_s: float) -> QuietExporter:
    try:
        module: Any = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise TelemetrySettingError(
            "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf needs the package opentelemetry-exporter-otlp-proto-http;"
            " install it, or use grpc"
        ) from error
    # The general endpoint is a base, the one for traces is the whole address.
    base = settings.text("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318").rstrip("/")
    endpoint = settings.text("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{base}/v1/traces")
    exporter = module.OTLPSpanExporter(endpoint=endpoint, headers=headers, timeout=timeout_s)
    return QuietExporter(exporter, endpoint)


# -- Which traces, and whose ------------------------------------------------------------------------------------


def _sampler(settings: _Settings) -> Sampler:
    name = settings.text("OTEL_TRACES_SAMPLER", "parentbased_always_on").lower()
    root: Sampler
    match name.removeprefix("parentbased_"):
        case "always_on":
            root = ALWAYS_ON
        case "always_off":
            root = ALWAYS_OFF
        case "traceidratio":
            ratio = settings.text("OTEL_TRACES_SAMPLER_ARG", "1.0")
            try:
                root = TraceIdRatioBased(float(ratio))
            except ValueError:
                _refuse("OTEL_TRACES_SAMPLER_ARG", ratio, "a number from 0 to 1")
        case _:
            _refuse(
                "OTEL_TRACES_SAMPLER",
                name,
                "always_on, always_off or traceidratio, or parentbased_ before one of them",
            )
    return ParentBased(root) if name.startswith("parentbased_") else root


def _resource(settings: _Settings, service_version: str) -> Resource:
    """Who speaks. Later lines win: the environment over this service, OTEL_SERVICE_NAME over both."""
    attributes: dict[str, str] = {
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "opentelemetry",
        "telemetry.sdk.version": sdk_version,
        "process.runtime.version": platform.python_version(),
        "service.name": SERVICE_NAME,
        "service.version": service_version,
        "service.instance.id": str(uuid.uuid4()),
    }
    attributes.update(_pairs("OTEL_RESOURCE_ATTRIBUTES", settings.text("OTEL_RESOURCE_ATTRIBUTES")))
    name = settings.text("OTEL_SERVICE_NAME")
    if name:
        attributes["service.name"] = name
    return Resource(attributes)


def _pairs(variable: str, text: str) -> dict[str, str]:
    """`key=value,…` with percent-encoded values."""
    pairs = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            # Without the text: it may hold a token.
            raise TelemetrySettingError(f"{variable} cannot be understood: expected key=value, several with commas")
        pairs[unquote(key.strip())] = unquote(value.strip())
    return pairs
