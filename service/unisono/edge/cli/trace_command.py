"""`unisono trace-check`: a batch's trace out of Jaeger, its tree, and what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.text import Text

from unisono.edge.cli.errors import ExitCode, StopError
from unisono.edge.cli.options import Finish, seconds
from unisono.edge.cli.terminal import Terminal, can_write, emit, printable, write
from unisono.edge.cli.trace_check import Finding, check
from unisono.edge.cli.trace_spans import NotTraceError, Span, read_spans
from unisono.edge.cli.trace_tree import ASCII, DEFAULT_ITEMS, UNICODE, Row, draw_tree

DEFAULT_JAEGER = "http://127.0.0.1:16686"
# Spans are exported every five seconds, unless OTEL_BSP_SCHEDULE_DELAY says otherwise.
_WAIT_S = 8.0
_PAUSE_S = 0.25
_QUIET_S = 2.0
_PATIENCE_S = 30.0
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")
# A batch is looked for among the traces of so long, and this many, where the Jaeger does not search by attribute.
_SEARCHED = timedelta(days=2)
_SEARCH_DEPTH = 50

_HELP = """Looks at the trace of a batch in Jaeger: prints its tree, and what is wrong with it.

The id is a trace's (32 hexadecimal digits) or a batch's, as the report of
unisono run names it. The service must export its traces to that Jaeger:
OTEL_EXPORTER_OTLP_ENDPOINT. Spans are sent every few seconds, so a trace that
is not whole is waited for.

An item's bar is light while it waits to be released, half light until its
first token, then full.

Examples:

    unisono trace-check batch_5f1d0c8e2b7a49d3a6e0c4f1
    unisono trace-check 0af7651916cd43dd8448eb211c80319c --items 200
    unisono trace-check batch_5f1d0c8e2b7a49d3a6e0c4f1 --json | jq .findings

Exit codes: 0 nothing is wrong; 1 something is, or there is no such trace; 2
wrong usage; 3 no Jaeger.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What `unisono trace-check` was asked for."""

    # A trace's or a batch's id.
    wanted: str
    jaeger: str = DEFAULT_JAEGER
    # The service.name that a batch is looked for under.
    service: str = "unisono"
    items: int = DEFAULT_ITEMS
    # Words of prompts or answers that must not be there.
    absent: tuple[str, ...] = ()
    wait_s: float = _WAIT_S
    as_json: bool = False


async def check_trace(options: TraceOptions, terminal: Terminal) -> int:
    """Prints tree and findings; returns the exit code. Raises StopError where there is no trace to look at."""
    wanted = options.wanted.strip().lower()
    if not (_TRACE_ID.fullmatch(wanted) or _BATCH_ID.fullmatch(wanted)):
        what = f"{printable(options.wanted, one_line=True)!r} is neither a trace's id (32 hexadecimal digits) nor a "
        raise StopError(what + "batch's (batch_ and 24 of them).", code=ExitCode.USAGE)
    # Proxies of the environment are for other machines, not for this one.
    is_here = _host_of(options.jaeger) in {"127.0.0.1", "::1", "localhost"}
    async with httpx.AsyncClient(timeout=_PATIENCE_S, trust_env=not is_here) as client:
        spans, findings = await _Looking(client, options, wanted, terminal).until_whole()
    if not spans:
        raise StopError(
            f"There is no trace of {wanted} at {options.jaeger} (yet): spans are exported every few seconds, and a "
            "batch's own when it has ended.",
            "Does the service export there (OTEL_EXPORTER_OTLP_ENDPOINT), and was the batch sampled?",
            code=ExitCode.ITEMS_FAILED,
        )
    if options.as_json:
        emit(terminal.out, to_json(spans, findings), soft_wrap=True)
    else:
        show(terminal.out, spans, findings, items=options.items, jaeger=options.jaeger)
    return ExitCode.ITEMS_FAILED if findings else ExitCode.DONE


class _Looking:
    """Asks until the trace is whole, or the time is over."""

    def __init__(self, client: httpx.AsyncClient, options: TraceOptions, wanted: str, terminal: Terminal) -> None:
        self._client = client
        self._options = options
        self._wanted = wanted
        self._terminal = terminal
        self._base = options.jaeger.rstrip("/") + "/api/v3/traces"

    async def until_whole(self) -> tuple[tuple[Span, ...], tuple[Finding, ...]]:
        """The spans, and what is wrong with them; no spans where there is no such trace."""
        began = time.monotonic()
        is_told = False
        while True:
            spans = await self._ask()
            findings = check(spans, texts=self._options.absent)
            waited_s = time.monotonic() - began
            if not any(finding.may_be_late for finding in findings) or waited_s >= self._options.wait_s:
                return spans, findings
            if waited_s > _QUIET_S and not is_told:
                is_told = True
                what = "the trace is not whole yet" if spans else "there is no such trace yet"
                self._terminal.say(f"unisono: {what}; waiting for its spans", "dim")
            await asyncio.sleep(_PAUSE_S)

    async def _ask(self) -> tuple[Span, ...]:
        # As they were sent: Jaeger would move spans to where it thinks that they belong.
        if not self._wanted.startswith("batch_"):
            return await self._get(f"{self._base}/{self._wanted}", {"raw_traces": "true"})
        now = datetime.now(UTC)
        found = await self._get(
            self._base,
            {
                "query.service_name": self._options.service,
                # Versions that do not know it give the newest traces.
                "query.attributes": json.dumps({"unisono.batch_id": self._wanted}),
                "query.start_time_min": _rfc3339(now - _SEARCHED),
                "query.start_time_max": _rfc3339(now + timedelta(hours=1)),
                "query.num_traces": str(_SEARCH_DEPTH),
                "query.raw_traces": "true",
            },
        )
        traces = {span.trace_id for span in found if span.text("unisono.batch_id") == self._wanted}
        return tuple(span for span in found if span.trace_id in traces)

    async def _get(self, url: str, query: dict[str, str]) -> tuple[Span, ...]:
        where = self._options.jaeger
        try:
            answer = await self._client.get(url, params=query)
        except (httpx.RemoteProtocolError, httpx.ReadError) as error:
            why = printable(str(error), one_line=True) or type(error).__name__
            raise StopError(
                f"Something answers at {where}, but does not speak HTTP/1.1: {why}",
                "Is it a gRPC port, as 4317 is? Name the address of Jaeger's page: as a rule, at port 16686.",
                code=ExitCode.UNREACHABLE,
            ) from error
        except httpx.HTTPError as error:
            why = printable(str(error), one_line=True) or type(error).__name__
            raise StopError(
                f"No Jaeger answers at {where}: {why}",
                "Is it running? --jaeger URL names another.",
                code=ExitCode.UNREACHABLE,
            ) from error
        if answer.status_code == httpx.codes.NOT_FOUND and _is_of_api(answer):
            return ()
        if answer.status_code != httpx.codes.OK:
            said = printable(answer.text[:200], one_line=True)
            what = f"What answers at {where} is no Jaeger with /api/v3, or is in trouble: {answer.status_code} {said}"
            raise StopError(what.rstrip(), code=ExitCode.UNREACHABLE)
        try:
            return read_spans(answer.content)
        except NotTraceError as error:
            what = f"What answers at {where} is no Jaeger with /api/v3: {printable(str(error), one_line=True)}"
            raise StopError(what, code=ExitCode.UNREACHABLE) from error


def _host_of(url: str) -> str:
    """Raises StopError where it is no address of a web server."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise StopError(f"--jaeger {url} is no URL: {error}", code=ExitCode.USAGE) from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise StopError(f"--jaeger {url} must begin with http:// or https://.", code=ExitCode.USAGE)
    return parsed.host


def _is_of_api(answer: httpx.Response) -> bool:
    """Whether Jaeger itself says "not found"; other servers say it of any path."""
    try:
        return "error" in json.loads(answer.content)
    except (ValueError, TypeError):
        return False


def _rfc3339(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# -- What is shown ---------------------------------------------------------------------------------------------


def show(console: Console, spans: Sequence[Span], findings: Sequence[Finding], *, items: int, jaeger: str) -> None:
    """The tree, where to look at it in Jaeger, and the findings."""
    marks = UNICODE if can_write(console, "█▒░│├└…µ−") else ASCII
    services = ", ".join(sorted({span.service or "?" for span in spans}))
    traces = ", ".join(sorted({span.trace_id for span in spans}))
    write(console, f"Trace {traces}: {len(spans):,} spans of {printable(services, one_line=True)}", "bold")
    wrong = {span_id for finding in findings for span_id in finding.span_ids}
    for row in draw_tree(spans, console.width, marks=marks, items=items, wrong=wrong):
        _paint(console, row)
    for trace in sorted({span.trace_id for span in spans}):
        write(console, f"{jaeger.rstrip('/')}/trace/{trace}", "dim")
    here = {span.span_id for span in spans}
    if any(span.is_batch and span.parent_id is not None and span.parent_id not in here for span in spans):
        write(console, "The caller's own span is not here: it is sent to another place, later, or not at all.", "dim")
    write(console, "")
    for line, style in draw_findings(findings):
        write(console, line, style)


def _paint(console: Console, row: Row) -> None:
    text = Text(row.label, style="red" if row.is_wrong else "" if row.bar else "dim")
    text.append(row.bar, style="red" if row.is_wrong else "cyan")
    text.rstrip()
    emit(console, text, soft_wrap=True)


def draw_findings(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Lines, each with its style."""
    if not findings:
        return [("Nothing is wrong with it.", "green")]
    lines = [(f"{len(findings)} finding{'s' if len(findings) > 1 else ''}", "bold")]
    for finding in findings:
        lines.append((f"  {printable(finding.what, one_line=True)}", "yellow"))
        lines.append((f"    {finding.remedy}", ""))
    return lines


def to_json(spans: Sequence[Span], findings: Collection[Finding]) -> str:
    """The same for programs: the spans in their order, and the findings."""
    value = {
        "trace_ids": sorted({span.trace_id for span in spans}),
        "batch_ids": [span.text("unisono.batch_id") for span in spans if span.is_batch],
        "spans": [
            {
                "span_id": span.span_id,
                "parent_id": span.parent_id,
                "name": span.name,
                "kind": span.kind,
                "service": span.service,
                "item_id": span.text("unisono.item_id") or None,
                "start_ns": span.start_ns,
                "duration_ns": span.end_ns - span.start_ns,
                "error": span.status_message if span.is_error else None,
            }
            for span in spans
        ],
        "findings": [
            {
                "kind": finding.kind.value,
                "what": finding.what,
                "to_do": finding.remedy,
                "span_ids": list(finding.span_ids),
            }
            for finding in findings
        ],
    }
    return json.dumps(value, indent=2, ensure_ascii=False)


# -- The command -----------------------------------------------------------------------------------------------


def add_trace_check(cli: typer.Typer, finish: Finish) -> None:
    """Adds the command."""

    @cli.command("trace-check", help=_HELP)
    def trace_check_command(
        wanted: Annotated[str, typer.Argument(metavar="TRACE_ID|BATCH_ID", help="Which trace, or whose.")],
        *,
        jaeger: Annotated[str, typer.Option(metavar="URL", help="Jaeger's query API.")] = DEFAULT_JAEGER,
        service: Annotated[
            str, typer.Option(metavar="NAME", help="The service.name that a batch is looked for under.")
        ] = "unisono",
        items: Annotated[
            int, typer.Option(min=1, metavar="N", help="At most so many items are drawn.")
        ] = DEFAULT_ITEMS,
        absent: Annotated[
            list[str] | None,
            typer.Option(
                metavar="TEXT",
                help="Words of a prompt or answer that must not be there, but in ids; may be repeated.",
            ),
        ] = None,
        wait: Annotated[
            float | None, typer.Option(parser=seconds, metavar="TIME", help="For a trace that is not whole. [8s]")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ) -> None:
        options = TraceOptions(
            wanted=wanted,
            jaeger=jaeger,
            service=service,
            items=items,
            absent=tuple(absent or ()),
            wait_s=_WAIT_S if wait is None else wait,
            as_json=as_json,
        )
        finish(lambda terminal: check_trace(options, terminal))
