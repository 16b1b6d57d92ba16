"""The commands for kept batches: what may be written after each."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from unisono.edge.cli.connect import Wish
from unisono.edge.cli.forms import FORMS_KEY
from unisono.edge.cli.kept import cancel, delete, show_list, show_status
from unisono.edge.cli.options import (
    BatchTimeout,
    Ca,
    CoScheduling,
    Finish,
    ItemsPerSecond,
    ItemTimeout,
    MaxConcurrency,
    Model,
    NoMap,
    NumPredict,
    Passes,
    Priority,
    Seed,
    Server,
    Temperature,
    Tls,
    Weight,
    rows_of,
    within,
)
from unisono.edge.cli.passmap import DEFAULT_ROWS
from unisono.edge.cli.results import ResultsOptions, results
from unisono.edge.cli.submit import SubmitOptions, retry, submit
from unisono.edge.cli.watch import WatchOptions, watch

_PANEL = "Kept batches"
_BATCH = "batch_5f1d0c8e2b7a49d3a6e0c4f1"


class State(StrEnum):
    """How a batch stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


_SUBMIT_HELP = """Submits the items of a JSONL file as a batch that is kept, and prints its id.

The batch is on the service's disk when this command ends; it goes on without
it, also after the service was started again. FILE is as for unisono run:
of any size, with up to 50,000 items. A line that cannot be read is told and
left out, unless --strict.

Examples:

    unisono submit questions.jsonl --model llama3.2
    unisono submit questions.jsonl --wait
    unisono submit night.jsonl --request-id night-7 --metadata job=night
    id=$(unisono submit questions.jsonl); unisono results $id --follow

Sent again under the same --request-id, the same file is the same batch.

Exit codes: 0 kept (with --wait: every item answered); 1 some lines were left
out, or some items were not answered; 2 wrong usage or a bad file; 3 no
service, or it has no room at this moment; 130 interrupted (what was submitted
goes on).
"""

_WATCH_HELP = f"""Follows a kept batch to its end: progress, pass map and report, on standard error.

Interrupt it and come back at will: the batch goes on. A lost connection is
opened again for up to ten minutes, also to a service that was started again.
The pass map is kept while the batch runs, and begins anew with the service.
Results are shown by unisono results.

Examples:

    unisono watch {_BATCH}
    unisono watch {_BATCH} --no-map

Exit codes: 0 every item answered; 1 some were not; 2 no such batch; 3 no
service, or none any more; 130 interrupted.
"""

_RESULTS_HELP = f"""Writes the results of a kept batch, as unisono run does, in the order in which items ended.

While the batch runs: those so far; with --follow, the others as they come.

Examples:

    unisono results {_BATCH} --output answers.jsonl
    unisono results {_BATCH} --failed | jq -r .error.message
    unisono results {_BATCH} --follow

Exit codes: 0 all that was written are answers; 1 some are not; 2 no such
batch; 3 no service, or none any more; 130 interrupted.
"""

_STATUS_HELP = f"""Tells how a kept batch stands.

Examples:

    unisono status {_BATCH}
    unisono status {_BATCH} --json | jq .state

Exit codes: 0 no item is without an answer that has ended; 1 some are; 2 no
such batch; 3 no service.
"""

_LIST_HELP = """Lists kept batches, the newest first.

Examples:

    unisono list
    unisono list --state running --state expired
    unisono list --limit 1000 --json | jq -r .id

Exit codes: 0 listed; 2 wrong usage; 3 no service.
"""

_CANCEL_HELP = f"""Cancels a batch, or some of its items; what has ended stays as it is.

Examples:

    unisono cancel {_BATCH}
    unisono cancel {_BATCH} question-7 question-8

Exit codes: 0 cancelled, or ended before; 2 no such batch or item; 3 no
service, or it has no room at this moment.
"""

_RETRY_HELP = f"""Submits what failed, expired or was cancelled of a batch as a new one, and prints its id.

Examples:

    unisono retry {_BATCH}
    unisono retry {_BATCH} --wait

Exit codes: 0 kept (with --wait: every item answered); 1 some items were not
answered; 2 no such batch, or nothing to try again, or it has not ended; 3 no
service, or it has no room at this moment; 130 interrupted (the new batch goes
on).
"""

_DELETE_HELP = f"""Deletes a kept batch that has ended, with its items and results.

Examples:

    unisono delete {_BATCH}

Exit codes: 0 deleted; 2 no such batch, or it has not ended; 3 no service.
"""

_Id = Annotated[str, typer.Argument(metavar="ID", help="The batch's id, as unisono submit prints it.")]
_RequestId = Annotated[
    str | None,
    typer.Option("--request-id", metavar="NAME", help="Makes it safe to run this command again."),
]
_Wait = Annotated[bool, typer.Option("--wait", help="Follow it to its end, as unisono watch does.")]
_Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def _metadata(pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        key, is_given, value = pair.partition("=")
        if not is_given or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--metadata")
        if key in found or key == FORMS_KEY:
            why = "is the command line's own" if key == FORMS_KEY else "is given twice"
            raise typer.BadParameter(f"{key} {why}", param_hint="--metadata")
        found[key] = value
    return found


def add_kept(cli: typer.Typer, finish: Finish) -> None:
    """Adds the commands."""

    @cli.command("submit", help=_SUBMIT_HELP, rich_help_panel=_PANEL)
    def submit_command(
        file: Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file, or - for standard input.")],
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        model: Model = None,
        request_id: _RequestId = None,
        metadata: Annotated[
            list[str] | None,
            typer.Option(metavar="KEY=VALUE", help="Given back with the batch; may be repeated."),
        ] = None,
        wait: _Wait = False,
        num_predict: NumPredict = None,
        temperature: Temperature = None,
        seed: Seed = None,
        timeout: BatchTimeout = None,
        item_timeout: ItemTimeout = None,
        co_scheduling: CoScheduling = None,
        max_concurrency: MaxConcurrency = None,
        items_per_second: ItemsPerSecond = None,
        priority: Priority = None,
        weight: Weight = None,
        no_map: NoMap = False,
        passes: Passes = str(DEFAULT_ROWS),
        strict: Annotated[bool, typer.Option("--strict", help="Submit nothing if any line is bad.")] = False,
    ) -> None:
        options = SubmitOptions(
            file=file,
            wish=Wish(server=server, tls=tls, ca=ca),
            model=model,
            request_id=request_id,
            metadata=_metadata(metadata or []),
            waits=wait,
            num_predict=within("--num-predict", num_predict, 31),
            temperature=temperature,
            seed=within("--seed", seed, 63),
            timeout_s=timeout,
            item_timeout_s=item_timeout,
            co_scheduling=co_scheduling.value if co_scheduling else None,
            priority=priority.value if priority else None,
            max_concurrency=max_concurrency,
            items_per_second=items_per_second,
            weight=weight,
            draw_map=not no_map,
            map_rows=rows_of(passes),
            is_strict=strict,
        )
        finish(lambda terminal: submit(options, terminal))

    @cli.command("watch", help=_WATCH_HELP, rich_help_panel=_PANEL)
    def watch_command(
        batch_id: _Id,
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        no_map: NoMap = False,
        passes: Passes = str(DEFAULT_ROWS),
    ) -> None:
        wish = Wish(server=server, tls=tls, ca=ca)
        options = WatchOptions(wish=wish, batch_id=batch_id, draw_map=not no_map, map_rows=rows_of(passes))
        finish(lambda terminal: watch(options, terminal))

    @cli.command("results", help=_RESULTS_HELP, rich_help_panel=_PANEL)
    def results_command(
        batch_id: _Id,
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        output: Annotated[
            str | None,
            typer.Option("--output", "-o", metavar="FILE", help="Where results go as JSONL; - is standard output."),
        ] = None,
        failed: Annotated[bool, typer.Option("--failed", help="Only items without an answer.")] = False,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="To the batch's end, as they come.")] = False,
    ) -> None:
        options = ResultsOptions(
            wish=Wish(server=server, tls=tls, ca=ca),
            batch_id=batch_id,
            output=output,
            only_failed=failed,
            follows=follow,
        )
        finish(lambda terminal: results(options, terminal))

    @cli.command("status", help=_STATUS_HELP, rich_help_panel=_PANEL)
    def status_command(
        batch_id: _Id, *, server: Server = None, tls: Tls = False, ca: Ca = None, as_json: _Json = False
    ) -> None:
        wish = Wish(server=server, tls=tls, ca=ca)
        finish(lambda terminal: show_status(wish, batch_id, terminal, as_json=as_json))

    @cli.command("list", help=_LIST_HELP, rich_help_panel=_PANEL)
    def list_command(
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        state: Annotated[list[State] | None, typer.Option(help="Only those; may be repeated.")] = None,
        limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")] = 20,
        as_json: _Json = False,
    ) -> None:
        wish = Wish(server=server, tls=tls, ca=ca)
        states = [each.value for each in state or ()]
        finish(lambda terminal: show_list(wish, states, limit, terminal, as_json=as_json))

    @cli.command("cancel", help=_CANCEL_HELP, rich_help_panel=_PANEL)
    def cancel_command(
        batch_id: _Id,
        items: Annotated[
            list[str] | None, typer.Argument(metavar="[ITEM]...", help="Ids of items; without any, all.")
        ] = None,
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
    ) -> None:
        wish = Wish(server=server, tls=tls, ca=ca)
        finish(lambda terminal: cancel(wish, batch_id, items or [], terminal))

    @cli.command("retry", help=_RETRY_HELP, rich_help_panel=_PANEL)
    def retry_command(
        batch_id: _Id,
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        request_id: _RequestId = None,
        wait: _Wait = False,
        no_map: NoMap = False,
        passes: Passes = str(DEFAULT_ROWS),
    ) -> None:
        wish = Wish(server=server, tls=tls, ca=ca)
        options = WatchOptions(wish=wish, batch_id=batch_id, draw_map=not no_map, map_rows=rows_of(passes))
        finish(lambda terminal: retry(options, terminal, waits=wait, request_id=request_id))

    @cli.command("delete", help=_DELETE_HELP, rich_help_panel=_PANEL)
    def delete_command(batch_id: _Id, *, server: Server = None, tls: Tls = False, ca: Ca = None) -> None:
        wish = Wish(server=server, tls=tls, ca=ca)
        finish(lambda terminal: delete(wish, batch_id, terminal))
