"""What `unisono serve` has beside its gRPC port: where batches are kept, the HTTP port, and that of the metrics.

Each lives until a stack is left. With `bootstrap.py`, the only file that names concrete classes.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from unisono.adapters.journal.failpoints import Failpoints
from unisono.adapters.metrics.endpoint import MetricsEndpoint, written
from unisono.app.durable import DurableBatches, DurableSettings
from unisono.config import SettingError
from unisono.core.errors import UnisonoError
from unisono.folders import data_folder
from unisono.setting_kinds import parse_address

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AsyncExitStack

    from unisono.adapters.journal.sqlite import SqliteJournal
    from unisono.adapters.metrics.series import Series
    from unisono.app.batches import Batches
    from unisono.app.ports import Clock
    from unisono.config import Settings
    from unisono.edge.rest.server import RestServer

log = structlog.get_logger("unisono")
# The bodies of forwarded requests take so many times in memory what one of them may.
BODIES = 4


def report_defect(where: str, defect: BaseException) -> None:
    """Tells the log of something that should not have happened, with its trace."""
    log.error("defect", where=where, exc_info=(type(defect), defect, defect.__traceback__))


def report_trouble(why: str) -> None:
    """Tells the log that nothing can be kept for now (a full disk), or that it can again."""
    if why:
        log.warning("the journal cannot be written: running kept batches wait, and it is tried again", error=why)
    else:
        log.info("the journal is written again")


def report_lost(batch_id: str, error: Exception) -> None:
    """Tells the log of a kept batch that does not go on here: nobody else would."""
    log.error(
        "a kept batch does not go on here: it stays as it is, until the next start takes it over",
        batch=batch_id,
        error=str(error),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Where batches are kept."""

    journal: SqliteJournal
    durable: DurableBatches


async def start_store(settings: Settings, batches: Batches, clock: Clock, stack: AsyncExitStack) -> Kept | None:
    """Where batches are kept, and those that have not ended going on; None: nowhere, because it is set so.

    Nor where nobody has set a folder, and the usual one cannot be had: that is a warning.
    """
    folder = data_folder(settings, os.environ)
    if folder is None:
        return None
    # Only now: what stands behind it takes a third of a second, which a service for one command is spared.
    from unisono.adapters.journal.sqlite import SqliteJournal  # noqa: PLC0415

    journal = SqliteJournal(
        folder,
        keep_s=settings.retention,
        max_bytes=settings.max_data_bytes,
        failpoint=_failpoints(os.environ),
        report_lost=report_lost,
        report_trouble=report_trouble,
    )
    try:
        await journal.start(clock.time_ns())
    except (OSError, UnisonoError) as error:
        if settings.data_dir:
            raise
        log.warning("no batches are kept: set UNISONO_DATA_DIR to a folder, or to none", error=str(error))
        return None
    stack.push_async_callback(journal.close)
    durable = DurableBatches(
        journal,
        batches,
        clock,
        report_defect=report_defect,
        settings=DurableSettings(most_running=settings.max_kept_running, most_open=settings.max_kept_batches),
    )
    found = await durable.start()
    if found:
        log.info("batches go on that had not ended", batches=found, folder=str(folder))
    return Kept(journal=journal, durable=durable)


async def start_rest(
    settings: Settings,
    kept: Kept | None,
    batches: Batches,
    clock: Clock,
    stack: AsyncExitStack,
    *,
    series: Series | None = None,
) -> RestServer | None:
    """Serves the HTTP port until the stack is left; None where there is to be none, or somebody else has the port.

    Batches that were made of files go on all the same.
    """
    # Only now, as with the journal.
    from unisono.app.file_batches import FileBatches, FileSettings  # noqa: PLC0415
    from unisono.app.forward import Forwarder, ForwardLimits  # noqa: PLC0415
    from unisono.edge.rest.app import make_app  # noqa: PLC0415
    from unisono.edge.rest.batch_api import BatchRoutes, WindowFacts  # noqa: PLC0415
    from unisono.edge.rest.guard import Guard  # noqa: PLC0415
    from unisono.edge.rest.kept import KeptRoutes  # noqa: PLC0415
    from unisono.edge.rest.lines import OpenAILines  # noqa: PLC0415
    from unisono.edge.rest.ollama import InferenceRoutes  # noqa: PLC0415
    from unisono.edge.rest.openai import OpenAIRoutes  # noqa: PLC0415
    from unisono.edge.rest.passed_on import PassedRoutes  # noqa: PLC0415
    from unisono.edge.rest.server import RestServer  # noqa: PLC0415
    from unisono.edge.rest.standing import StandingRoutes  # noqa: PLC0415
    from unisono.edge.rest.views import BatchViews  # noqa: PLC0415

    lines = OpenAILines(batches.limits)
    made: FileBatches | None = None
    if kept is not None:
        made = FileBatches(
            kept.journal.files(max_bytes=settings.max_files_bytes),
            kept.durable,
            batches,
            lines,
            clock,
            settings=FileSettings(keep_s=settings.retention, most_open=settings.max_kept_batches),
            report_defect=report_defect,
        )
        await made.start()
        stack.push_async_callback(made.close)
    address = parse_address(settings.http_listen)
    if address is None:
        return None

    def trouble() -> str:
        if kept is None:
            return ""
        if kept.durable.is_closing:
            return "it is being stopped"
        return f"its journal {kept.journal.trouble}" if kept.journal.trouble else ""

    def pending() -> int:
        return batches.running + (kept.durable.open_count if kept is not None else 0)

    window = WindowFacts(is_enabled=settings.batch_enabled, size=settings.batch_size, window_s=settings.batch_timeout)
    views = BatchViews(made, kept.durable if kept is not None else None)
    forwarder = Forwarder(
        batches,
        ForwardLimits(
            most=settings.max_forwarded,
            most_body_bytes=settings.max_forwarded_bytes,
            most_bytes=BODIES * settings.max_forwarded_bytes,
        ),
    )
    tables = [
        OpenAIRoutes(views).table(),
        KeptRoutes(views, lines, report_defect=report_defect).table(),
        BatchRoutes(batches, clock, window=window, pending=pending, report_defect=report_defect).table(),
        *InferenceRoutes(forwarder).tables(),
        *PassedRoutes(forwarder, allowed=settings.allow).tables(),
        StandingRoutes(trouble, figures=partial(written, series.registry) if series is not None else None).table(),
    ]
    guard = Guard(own_name=socket.gethostname(), hosts=settings.http_hosts, origins=settings.http_origins)
    app = make_app(tables, report_defect=report_defect, guard=guard)
    try:
        server = await RestServer.start(app, *address)
    except OSError as error:
        log.warning(
            "OpenAI's API is not served",
            listen=settings.http_listen,
            error=os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error),
            remedy="set UNISONO_HTTP_LISTEN to another address, or to none",
        )
        return None
    stack.push_async_callback(server.stop)
    return server


async def serve_metrics(series: Series, settings: Settings, stack: AsyncExitStack) -> str:
    """Serves metrics until the stack is left, and says where; nowhere (empty) if somebody else has the port."""
    address = parse_address(settings.metrics_listen)
    if address is None:
        return ""
    try:
        endpoint = await MetricsEndpoint.start(series.registry, *address, report_defect=report_defect)
    except OSError as error:
        log.warning(
            "metrics are not served",
            listen=settings.metrics_listen,
            # asyncio's own words name the address once more.
            error=os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error),
            remedy="set UNISONO_METRICS_LISTEN to another address, or to none",
        )
        return ""
    stack.push_async_callback(endpoint.close)
    return endpoint.url


def _failpoints(environ: Mapping[str, str]) -> Failpoints:
    """Where a test wants this process to fail; as a rule nowhere. Raises SettingError."""
    try:
        return Failpoints(environ.get("UNISONO_FAILPOINTS", ""))
    except ValueError as error:
        raise SettingError(f"UNISONO_FAILPOINTS: {error}") from error
