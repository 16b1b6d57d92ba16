"""The commands: what may be written after `unisono`, and what each is for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from enum import StrEnum
from typing import Annotated

import typer

from unisono.core.errors import UnisonoError
from unisono.edge.cli.bench_command import add_bench
from unisono.edge.cli.connect import DEFAULT_SERVER, Wish
from unisono.edge.cli.doctor import diagnose
from unisono.edge.cli.errors import ExitCode, StopError
from unisono.edge.cli.eval import ANSWER, EXPECTED, EvalOptions, evaluate
from unisono.edge.cli.kept_command import add_kept
from unisono.edge.cli.options import (
    BatchTimeout,
    Ca,
    CoScheduling,
    Embedded,
    ItemsPerSecond,
    ItemTimeout,
    MaxConcurrency,
    Model,
    NoMap,
    NumPredict,
    Ollama,
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
from unisono.edge.cli.output import drop_output
from unisono.edge.cli.passmap import DEFAULT_ROWS
from unisono.edge.cli.ports import Serve, StartEngine, StartServer
from unisono.edge.cli.run import RunOptions, run
from unisono.edge.cli.signals import until_signalled
from unisono.edge.cli.terminal import OutputError, Terminal
from unisono.edge.cli.trace_command import add_trace_check


class Order(StrEnum):
    """In which order results are written."""

    FINISHED = "finished"
    INPUT = "input"


class LogLevel(StrEnum):
    """How much the service tells of its work."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_HELP = """Runs whole batches of conversations through Ollama, so that they share forward passes.

Begin with [bold]unisono doctor[/bold], which tells what is there, and [bold]unisono run FILE.jsonl[/bold].
"""

_RUN_HELP = """Runs the items of a JSONL file, and writes a result for each.

FILE holds one item a line; - reads standard input. A line is OpenAI's batch
line, or plain:

    {"custom_id": "a", "url": "/v1/chat/completions", "body": {…}}
    {"id": "b", "prompt": "Why is the sky blue?", "model": "llama3.2"}
    {"messages": [{"role": "user", "content": "Hello!"}]}
    {"input": ["a text to embed", "another"]}

A line without an id is called line-N. A line that cannot be read fails
alone, unless --strict. Results go to standard output, as JSON where that is
not a terminal; all else goes to standard error.

Without --server, the service in UNISONO_SERVER or at 127.0.0.1:50051 is used
if it answers; else one is started for this command.

Examples:

    unisono run questions.jsonl --model llama3.2
    unisono run questions.jsonl --output answers.jsonl --num-predict 200
    unisono run questions.jsonl --output answers.jsonl --resume
    unisono run - --order input < questions.jsonl | jq -r .content

A lost connection is opened again for up to a minute, and the batch goes on.
A run that was broken off goes on with the same command and --resume: items
whose id has an answer in the output are not asked again. For hours of work,
and to leave meanwhile: unisono submit.

Exit codes: 0 every item answered; 1 some were not; 2 wrong usage or a bad
file; 3 no service, or none any more; 130 interrupted.
"""

_DOCTOR_HELP = """Tells which backends and models there are, how many slots each has shown, and what to change.

Examples:

    unisono doctor
    unisono doctor --ollama http://gpu-box:11434
    unisono doctor --json | jq .advice

Exit codes: 0 items can be answered; 1 they cannot, and why is told; 2 wrong usage; 3 no service.
"""

_EVAL_HELP = """Runs a data set of questions with known answers, and scores it.

FILE holds one question a line, as JSON; - reads standard input. GSM8K's test
file is such a one:

    {"question": "… How much is it?", "answer": "16 - 7 = 9 …\\n#### 18"}

A line's answer is right where the last thing that --answer-regex finds in it
(its first group, where it has one) equals what the line expects. Numbers are
compared as numbers: 1,000 is 1000. and 1000.0. Temperature is 0.

Examples:

    unisono eval gsm8k_test.jsonl --model llama3.2 --num-predict 300
    unisono eval test.jsonl --limit 100 --answer-regex '(-?[\\d,]+)'
    unisono eval capitals.jsonl --field prompt --expect city -o verdicts.jsonl

Exit codes: 0 every question answered, rightly or not; 1 some were not; 2
wrong usage or a bad file; 3 no service; 130 interrupted.
"""

_SERVE_HELP = """Runs the service until it is interrupted.

Examples:

    unisono serve
    unisono serve --listen 0.0.0.0:50051 --ollama http://gpu-box:11434
    unisono serve --embedded
"""


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}") from None


def build_cli(
    start: StartServer, serve: Serve, *, version: str, start_engine: StartEngine | None = None
) -> typer.Typer:
    """The command line of this version; `start`, `serve` and `start_engine` are what it cannot do by itself."""
    cli = typer.Typer(
        name="unisono",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @cli.callback(invoke_without_command=True)
    def main(
        *,
        show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        if show_version:
            typer.echo(f"unisono {version}")
            raise typer.Exit

    @cli.command("run", help=_RUN_HELP)
    def run_command(
        file: Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file, or - for standard input.")],
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        model: Model = None,
        output: Annotated[
            str | None,
            typer.Option("--output", "-o", metavar="FILE", help="Where results go as JSONL; - is standard output."),
        ] = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Ask only what has no answer in the output yet, and append to it.")
        ] = False,
        embedded: Embedded = False,
        ollama: Ollama = None,
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
        order: Annotated[
            Order, typer.Option(help="Results as they finish, or in the order of the file.")
        ] = Order.FINISHED,
        no_map: NoMap = False,
        passes: Passes = str(DEFAULT_ROWS),
        strict: Annotated[bool, typer.Option("--strict", help="Run nothing if any line is bad.")] = False,
    ) -> None:
        options = RunOptions(
            file=file,
            wish=Wish(server=server, tls=tls, ca=ca, embedded=embedded, ollama_url=ollama),
            model=model,
            output=output,
            resumes=resume,
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
            is_in_order=order is Order.INPUT,
            draw_map=not no_map,
            map_rows=rows_of(passes),
            is_strict=strict,
        )
        finish(lambda terminal: run(options, start, terminal))

    @cli.command("serve", help=_SERVE_HELP)
    def serve_command(
        *,
        listen: Annotated[
            str | None, typer.Option(metavar="HOST:PORT", help=f"Where to listen. [{DEFAULT_SERVER}]")
        ] = None,
        ollama: Annotated[
            str | None, typer.Option(metavar="URL", help="The Ollama to use. [OLLAMA_HOST, or 127.0.0.1:11434]")
        ] = None,
        embedded: Annotated[bool, typer.Option("--embedded", help="Use the embedded engine instead.")] = False,
        log_level: Annotated[LogLevel | None, typer.Option(help="How much to tell. [info]")] = None,
    ) -> None:
        terminal = Terminal.standard()
        if embedded and ollama:
            _stop(terminal, StopError("--embedded and --ollama exclude each other.", code=ExitCode.USAGE))
        try:
            serve(
                listen=listen, ollama_url=ollama, embedded=embedded, log_level=log_level.value if log_level else None
            )
        except UnisonoError as error:
            # What has no reason of its own here is no defect: a folder that another service has, say.
            reason = "" if error.reason == UnisonoError.reason else f" ({error.reason})"
            _stop(terminal, StopError(f"{error.message}{reason}", code=ExitCode.UNREACHABLE))
        except OSError as error:
            _stop(terminal, StopError(f"The service cannot be started: {error}", code=ExitCode.UNREACHABLE))
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None

    if start_engine is not None:
        add_bench(cli, start_engine, finish)

    @cli.command("eval", help=_EVAL_HELP)
    def eval_command(
        file: Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file, or - for standard input.")],
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        answer_regex: Annotated[
            re.Pattern[str] | None,
            typer.Option(
                parser=_regex,
                metavar="REGEX",
                show_default="the last number",
                help="Finds the answer in what was said.",
            ),
        ] = None,
        field: Annotated[str, typer.Option(metavar="NAME", help="The field with the question.")] = "question",
        expect: Annotated[str, typer.Option(metavar="NAME", help="The field with the right answer.")] = "answer",
        expect_regex: Annotated[
            re.Pattern[str] | None,
            typer.Option(
                parser=_regex,
                metavar="REGEX",
                help=f"Finds the right answer in its field; else {EXPECTED} where that is there, or all of it.",
            ),
        ] = None,
        system: Annotated[str, typer.Option(metavar="TEXT", help="What every conversation begins with.")] = "",
        model: Annotated[str | None, typer.Option(help="The model.")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Only so many lines.")] = None,
        num_predict: Annotated[int | None, typer.Option(help="The most tokens of an answer; -1: no limit.")] = None,
        output: Annotated[
            str | None,
            typer.Option("--output", "-o", metavar="FILE", help="Where each line's verdict goes, as JSONL."),
        ] = None,
        embedded: Embedded = False,
        ollama: Ollama = None,
    ) -> None:
        options = EvalOptions(
            file=file,
            wish=Wish(server=server, tls=tls, ca=ca, embedded=embedded, ollama_url=ollama),
            answer_regex=answer_regex or re.compile(ANSWER),
            expect_regex=expect_regex,
            field=field,
            expect=expect,
            system=system,
            model=model,
            limit=limit,
            num_predict=within("--num-predict", num_predict, 31),
            output=output,
        )
        finish(lambda terminal: evaluate(options, start, terminal))

    @cli.command("doctor", help=_DOCTOR_HELP)
    def doctor_command(
        *,
        server: Server = None,
        tls: Tls = False,
        ca: Ca = None,
        ollama: Ollama = None,
        embedded: Embedded = False,
        as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ) -> None:
        wish = Wish(server=server, tls=tls, ca=ca, embedded=embedded, ollama_url=ollama)
        finish(lambda terminal: diagnose(wish, start, terminal, as_json=as_json))

    add_kept(cli, finish)
    add_trace_check(cli, finish)
    return cli


def finish(command: Callable[[Terminal], Coroutine[object, object, int]]) -> None:
    """Runs a command to its end and ends the process as it says."""
    terminal = Terminal.standard()
    try:
        code = asyncio.run(until_signalled(command(terminal)))
    except StopError as error:
        _stop(terminal, error)
    except KeyboardInterrupt:
        terminal.say("unisono: interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except OutputError as error:
        drop_output()
        # Where standard error is at fault too, nobody can be told.
        with suppress(OutputError):
            terminal.say(f"unisono: what it writes cannot be written: {error}", "red")
        raise typer.Exit(ExitCode.ITEMS_FAILED) from None
    else:
        raise typer.Exit(code)


def _stop(terminal: Terminal, error: StopError) -> None:
    terminal.say(error.lines, "red")
    raise typer.Exit(error.code)
