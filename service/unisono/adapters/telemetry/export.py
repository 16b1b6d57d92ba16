"""How spans leave the process, and what happens while nobody takes them.

The SDK's exporter and batch processor are right about spans and loud about failures: without a collector they print
a line for each attempt of each export, and a shutdown waits for the last of them for up to half a minute. So the
exporter stands behind `QuietExporter`, which says once that spans are lost and once that they arrive again; and
`shut_down` ends the exporter itself when its time is over.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

_log = logging.getLogger(__name__)

# Where the SDK complains of exports; `QuietExporter` speaks for these.
_EXPORT_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.common.http",
)
# Where the batch processor says that its queue is full, and drops spans.
_PROCESSOR_LOGGER = "opentelemetry.sdk._shared_internal"
# After the exporter was ended, its threads have this long to notice.
_GRACE_S = 0.5


class QuietExporter(SpanExporter):
    """An exporter that says once that it fails, and can be ended from any thread at any time."""

    def __init__(self, exporter: SpanExporter, target: str) -> None:
        self.target = target
        self._exporter = exporter
        self._lock = threading.Lock()
        self._is_shut_down = False
        # Spans lost since the last export that was taken.
        self._lost = 0
        _hush_the_sdk()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends spans; never raises, for the processor would print the traceback."""
        if self._is_shut_down:
            return SpanExportResult.FAILURE
        _heard.complaint = ""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - whatever it is: spans are lost, and the service goes on
            _heard.complaint = repr(error)
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            if self._lost:
                _log.warning("traces reach %s again; %d spans were lost", self.target, self._lost)
            self._lost = 0
            _failing.discard(self)
        else:
            if not self._lost and not self._is_shut_down:
                _log.warning(
                    "traces cannot be delivered to %s and are lost until they can: %s",
                    self.target,
                    _heard.complaint or "no reason given",
                )
            self._lost += len(spans)
            _failing.add(self)
        return result

    def shutdown(self) -> None:
        """Ends an export in progress, and lets none begin."""
        with self._lock:
            if self._is_shut_down:
                return
            self._is_shut_down = True
        _failing.discard(self)
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing waits here."""
        return self._exporter.force_flush(timeout_millis)


# -- Silence ---------------------------------------------------------------------------------------------------


class _Heard(threading.local):
    """What the SDK last complained of in this thread; an export logs in the thread that runs it."""

    complaint = ""


_heard = _Heard()
# Those whose last export was lost.
_failing: weakref.WeakSet[QuietExporter] = weakref.WeakSet()


def _overhear(record: logging.LogRecord) -> bool:
    """A logging filter that lets nothing through, and remembers it."""
    _heard.complaint = record.getMessage()
    return False


def _is_news(_record: logging.LogRecord) -> bool:
    """A logging filter: that a queue is full which nobody empties has been said already."""
    return not _failing


def _hush_the_sdk() -> None:
    for name in _EXPORT_LOGGERS:
        filters = logging.getLogger(name).filters
        if _overhear not in filters:
            # Before the SDK's own filter of duplicates, which would keep the reason from it.
            filters.insert(0, _overhear)
    logging.getLogger(_PROCESSOR_LOGGER).addFilter(_is_news)


# -- Ends ------------------------------------------------------------------------------------------------------


def shut_down(provider: TracerProvider, exporters: Sequence[QuietExporter], timeout_s: float) -> bool:
    """Sends what is left, for at most `timeout_s`, and ends the exporters. True: all of it was tried in time.

    Blocks; half a second longer than told at the very worst.
    """
    # The SDK's own shutdown waits 30 s, whatever it is told. Ending the exporter under it makes it return.
    worker = _in_thread("telemetry-shutdown", provider.shutdown)
    worker.join(timeout_s)
    in_time = not worker.is_alive()
    for exporter in exporters:
        exporter.shutdown()
    worker.join(_GRACE_S)
    return in_time


def flush(provider: TracerProvider, timeout_s: float) -> bool:
    """Sends what has ended so far; True: it was tried in time. Blocks for at most `timeout_s`."""
    worker = _in_thread("telemetry-flush", provider.force_flush)
    worker.join(timeout_s)
    return not worker.is_alive()


def _in_thread(name: str, work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(name=name, target=work, daemon=True)
    thread.start()
    return thread
