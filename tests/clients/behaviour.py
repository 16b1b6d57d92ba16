"""What every client program does, whatever its language.

The tests of a language take it over: they have a fixture `unisono_batch` for the whole session, which builds the
program and gives a `Program`, and a class, `class TestGo(ClientBehaviour)`, which may be empty.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import EXAMPLE, CuttingProxy, HttpCollector, Program, Run, write_lines
from tests.fakes.ollama import Answer
from tests.fakes.otlp import OtlpReceiver, tree_of
from tests.integration.service import House, house


def prompts(count: int, tokens: str = "{}") -> list[dict[str, str]]:
    """Lines i0, i1, …, each of which takes a few tokens more than the one before."""
    return [{"id": f"i{n}", "prompt": f"[[tokens={tokens.format(5 * (n + 1))}]]"} for n in range(count)]


def answered(h: House) -> int:
    """How many items the stand-in has answered whole."""
    return sum(request.outcome == "completed" for request in h.work)


def refusals(run: Run) -> dict[str, str]:
    """The items that the service did not take, and why."""
    return {line["id"]: line["error"]["reason"] for line in run.lines if line["state"] == "REFUSED"}


class ClientBehaviour:
    """The promises of `unisono-batch`; `unisono_batch` is a fixture of the language."""

    @pytest.mark.embedded
    @pytest.mark.asyncio(loop_scope="session")
    async def test_the_example_batch_is_answered(
        self, unisono_batch: Program, embedded_target: str, tmp_path: Path
    ) -> None:
        """A real model answers the 24 conversations of the example, in all three forms of line.

        A few words each: how long an answer is, a program does not notice, and there is one for each language.
        """
        text, count = re.subn(r'("num_predict"|"max_tokens"): \d+', r"\1: 12", EXAMPLE.read_text())
        assert count == 24
        file = tmp_path / "batch.jsonl"
        file.write_text(text)
        code, run = await unisono_batch.run(file, target=embedded_target)
        lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
        assert code == 0, run.told
        assert sorted(run.ids) == sorted(line.get("id") or line["custom_id"] for line in lines)
        assert run.states == ["COMPLETED"] * 24
        assert all(line["content"] for line in run.lines)
        assert run.batch_id
        assert "24 completed, 0 failed" in run.told

    async def test_its_span_is_the_parent_of_the_batch(
        self,
        unisono_batch: Program,
        otlp: OtlpReceiver,
        http_collector: HttpCollector,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """The program's span is the root of the batch's trace; where it exports none, the trace is still its own."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        file = write_lines(tmp_path / "batch.jsonl", prompts(2))
        async with house() as h:
            arguments = ("--model", "fake", file)
            code, exporting = await unisono_batch.run(
                *arguments, target=h.target, env={"OTEL_EXPORTER_OTLP_ENDPOINT": http_collector.endpoint}
            )
            assert code == 0, exporting.told
            code, silent = await unisono_batch.run(*arguments, target=h.target)
            assert code == 0, silent.told
        # The service has stopped, which flushes.
        spans = await asyncio.to_thread(
            otlp.wait_for, lambda spans: len({s.trace_id for s in spans if s.parent_id is not None}) == 2
        )
        (own,) = http_collector.spans
        assert own.name == "unisono-batch"
        assert not own.parent_span_id
        assert own.trace_id.hex() == exporting.trace_id
        roots = {root.span.trace_id: root.span for root in tree_of(spans)}
        assert roots.keys() == {exporting.trace_id, silent.trace_id}
        assert roots[exporting.trace_id].name == "unisono.v1.BatchInference/StreamBatch"
        assert roots[exporting.trace_id].parent_id == own.span_id.hex()
        assert roots[silent.trace_id].parent_id

    @pytest.mark.parametrize("max_open_items", [4, 10_000], ids=["some_unsent", "all_sent"])
    async def test_a_cut_connection_is_resumed(
        self, unisono_batch: Program, tmp_path: Path, max_open_items: int
    ) -> None:
        """Cut in the middle, it says what goes on; that gives the rest: no item twice, none missing."""
        file = write_lines(tmp_path / "a batch.jsonl", prompts(12))
        settings = {"slots": 4, "max_open_items": max_open_items}
        async with house(num_parallel=4, settings=settings) as h, CuttingProxy(h.target) as proxy:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", file, target=proxy.target) as first:
                await h.fake.wait_for(lambda fake: fake.busy_slots == 4, timeout_s=20)
                while answered(h) < 5:
                    await h.fake.step()
                await first.until_lines(answered(h))
                proxy.cut()
                assert await first.exit_code() == 3, first.told
            assert 5 <= len(first.lines) < 12
            arguments = first.command_to_resume()
            assert arguments[:2] == ["--resume", first.batch_id]
            h.fake.release_passes()
            code, rest = await unisono_batch.run(*arguments, target=h.target)
        assert code == 0, rest.told
        assert sorted(first.ids + rest.ids) == sorted(f"i{n}" for n in range(12)), first.told + rest.told
        assert {*first.states, *rest.states} == {"COMPLETED"}

    async def test_nothing_listens(self, unisono_batch: Program, tmp_path: Path) -> None:
        """Without a service, it says so; there is nothing to resume."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(1))
        async with CuttingProxy("127.0.0.1:1") as proxy:
            nowhere = proxy.target
        code, run = await unisono_batch.run(file, target=nowhere)
        assert code == 3, run.told
        assert nowhere in run.told
        assert "--resume" not in run.told
        # Of items there is nothing to tell.
        assert "completed" not in run.told

    @pytest.mark.parametrize("is_open", [False, True], ids=["half_closed", "open"])
    async def test_ctrl_c_cancels_the_batch(self, unisono_batch: Program, tmp_path: Path, is_open: bool) -> None:  # noqa: FBT001
        """All that ran is cancelled and told; also when nothing more can be said on the stream."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(6))
        async with house(num_parallel=4, settings={"slots": 4}) as h:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", "-" if is_open else file, target=h.target) as run:
                if is_open:
                    await run.say(*prompts(6))
                await h.fake.wait_for(lambda fake: fake.busy_slots == 4, timeout_s=20)
                run.interrupt()
                assert await run.exit_code() == 130, run.told
            assert sorted(run.ids) == [f"i{n}" for n in range(6)]
            assert set(run.states) == {"CANCELLED"}
            assert {line["error"]["reason"] for line in run.lines} == {"CANCELLED"}
            await h.fake.wait_for(lambda fake: fake.open_connections == 0)

    async def test_a_second_ctrl_c_ends_it_at_once(self, unisono_batch: Program, tmp_path: Path) -> None:
        """Though nothing is heard of the service."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(2))
        async with house() as h, CuttingProxy(h.target) as proxy:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", file, target=proxy.target) as run:
                await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=20)
                await run.until_told("batch ")
                proxy.hold()
                told = len(run.told)
                run.interrupt()
                # It says that it heard the first one.
                await run.until(lambda: len(run.told) > told, "word of the first")
                run.interrupt()
                assert await run.exit_code() == 130, run.told
            proxy.cut()
            h.fake.release_passes()

    async def test_an_item_that_fails_has_its_reason(self, unisono_batch: Program, tmp_path: Path) -> None:
        """A failed item has reason, code and message; a line that cannot be read is told and costs only itself."""
        lines: list[Any] = [{"prompt": "Hello"}, "{", {"id": "b", "messages": [{"role": "user", "content": "Hello"}]}]
        file = write_lines(tmp_path / "batch.jsonl", lines)
        async with house() as h:
            code, run = await unisono_batch.run("--model", "nosuch", file, target=h.target)
        assert code == 1, run.told
        assert sorted(run.ids) == ["b", "line-1"]
        assert set(run.states) == {"FAILED"}
        for line in run.lines:
            assert (line["error"]["reason"], line["error"]["code"]) == ("MODEL_NOT_FOUND", 5)
            assert "nosuch" in line["error"]["message"]
        assert re.search(r"\bline 2\b", run.told)
        assert "0 completed, 2 failed" in run.told

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"prompt": "\\ud800"}', "line 2: holds half of a surrogate pair, which is not Unicode text"),
            ('{"prompt": "\\uDC00\\uD800"}', "line 2: holds half of a surrogate pair, which is not Unicode text"),
            (
                '{"id": "\\\\\\udbff", "prompt": "a"}',
                "line 2: holds half of a surrogate pair, which is not Unicode text",
            ),
            ("{", "line 2: not JSON"),
            ('{"prompt": a}', "line 2: not JSON"),
            ('{"prompt": "a"} b', "line 2: not JSON"),
        ],
        ids=["high", "wrong_way_round", "in_an_id", "broken_off", "no_value", "followed"],
    )
    async def test_a_line_that_cannot_be_read_is_told_why(
        self, unisono_batch: Program, tmp_path: Path, line: str, problem: str
    ) -> None:
        """In one line, in words for whoever wrote it; whole pairs, and what only looks like half of one, pass."""
        good = '{"id": "good", "prompt": "\\ud83d\\uDE00 \\\\ud800 \\u00e9"}'
        file = write_lines(tmp_path / "batch.jsonl", [good, line])
        async with house() as h:
            code, run = await unisono_batch.run("--model", "fake", file, target=h.target)
        assert (code, run.ids, run.states) == (1, ["good"], ["COMPLETED"]), run.told
        (told,) = [each for each in run.told.splitlines() if each.startswith(str(file))]
        assert problem in told
        assert not re.search(r"https?:|Reader|Strict|Exception", run.told)

    async def test_a_refused_item_has_its_reason(self, unisono_batch: Program, tmp_path: Path) -> None:
        """What a batch that took its last item does not take any more is told, and all else goes on."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(2))
        more = write_lines(tmp_path / "more.jsonl", prompts(3))
        async with house() as h, CuttingProxy(h.target) as proxy:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", file, target=proxy.target) as first:
                # Both go at once, and only the half-close lets them.
                await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=20)
                proxy.cut()
                assert await first.exit_code() == 3, first.told
            arguments = [*first.command_to_resume()[:-1], str(more)]
            async with unisono_batch.started(*arguments, target=h.target) as again:
                await again.until_lines(1)
                h.fake.release_passes()
                assert await again.exit_code() == 1, again.told
        (refusal,) = [line for line in again.lines if line["state"] == "REFUSED"]
        assert (refusal["id"], refusal["error"]["reason"], refusal["error"]["code"]) == ("i2", "INPUT_CLOSED", 9)
        assert sorted(again.ids) == ["i0", "i1", "i2"]

    async def test_more_items_than_a_batch_may_have_are_refused(self, unisono_batch: Program, tmp_path: Path) -> None:
        """Credit that will never come is not waited for."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(5))
        async with house(settings={"max_items": 3}) as h:
            code, run = await unisono_batch.run("--model", "fake", file, target=h.target)
        assert code == 1, run.told
        assert sorted(run.ids) == [f"i{n}" for n in range(5)]
        assert sorted(run.states) == ["COMPLETED"] * 3 + ["REFUSED"] * 2
        assert refusals(run) == {"i3": "BATCH_FULL", "i4": "BATCH_FULL"}

    @pytest.mark.parametrize(
        ("before", "lines"), [(1, 5), (3, 5), (3, 3)], ids=["one_answered", "all_answered", "nothing_left"]
    )
    async def test_a_full_batch_that_was_cut_is_resumed(
        self, unisono_batch: Program, tmp_path: Path, before: int, lines: int
    ) -> None:
        """Credit that will never come is not waited for, though answers of before the cut are not heard again."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(lines))
        settings = {"max_items": 3, "slots": 4}
        async with house(num_parallel=4, settings=settings) as h, CuttingProxy(h.target) as proxy:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", "-", target=proxy.target) as first:
                await first.say(*prompts(3))
                await h.fake.wait_for(lambda fake: fake.busy_slots == 3, timeout_s=20)
                while answered(h) < before:
                    await h.fake.step()
                await first.until_lines(before)
                proxy.cut()
                assert await first.exit_code() == 3, first.told
            h.fake.release_passes()
            code, rest = await unisono_batch.run(*first.command_to_resume()[:-1], file, target=h.target)
        assert code == (1 if lines > 3 else 0), rest.told
        assert sorted(first.ids + rest.ids) == [f"i{n}" for n in range(lines)]
        assert sorted(first.states + rest.states) == ["COMPLETED"] * 3 + ["REFUSED"] * (lines - 3)
        assert refusals(rest) == {f"i{n}": "BATCH_FULL" for n in range(3, lines)}

    async def test_a_batch_that_somebody_else_cancels_is_no_success(self, unisono_batch: Program) -> None:
        """All that it was given is answered; but there may be lines that it was never given, so that is told."""
        async with house() as h, unisono_batch.started("--model", "fake", "-", target=h.target) as run:
            await run.say(*prompts(2))
            await run.until_lines(2)
            await run.until_told("batch ")
            _ = await h.cancel(run.batch_id)
            assert await run.exit_code() == 1, run.told
        assert run.states == ["COMPLETED"] * 2
        assert "the batch ended before its time: CANCELLED" in run.told

    async def test_an_answer_in_parts_is_put_together(self, unisono_batch: Program, tmp_path: Path) -> None:
        """An answer that is too long for one message is one line all the same."""
        text = "é" * 3_000_000
        file = write_lines(tmp_path / "batch.jsonl", [{"id": "long", "prompt": "long"}, *prompts(1)])
        async with house() as h:
            h.fake.answer("long", Answer(content=(text,)))
            code, run = await unisono_batch.run("--model", "fake", file, target=h.target)
        assert code == 0, run.told
        assert {line["id"]: line["content"] for line in run.lines}["long"] == text

    async def test_a_cut_inside_an_answer_loses_none_of_it(self, unisono_batch: Program, tmp_path: Path) -> None:
        """A connection that is lost between the parts of a long answer is resumed before its first part."""
        text = "é" * 6_000_000
        file = write_lines(tmp_path / "batch.jsonl", [{"id": "long", "prompt": "long"}])
        async with house() as h, CuttingProxy(h.target) as proxy:
            h.fake.answer("long", Answer(content=(text,)))
            # The first part, of nearly 4 MiB, has passed, and not the last.
            proxy.cuts_after = 5_000_000
            code, first = await unisono_batch.run("--model", "fake", file, target=proxy.target)
            assert (code, first.ids) == (3, []), first.told
            code, rest = await unisono_batch.run(*first.command_to_resume(), target=h.target)
        assert code == 0, rest.told
        assert [line["content"] for line in rest.lines] == [text]

    @pytest.mark.parametrize("arguments", [(), ("--after", "5", "-"), ("--nosuch", "-"), ("missing.jsonl",)])
    async def test_wrong_usage_is_told(self, unisono_batch: Program, arguments: tuple[str, ...]) -> None:
        """No file, one that is not there, or an option that is none: exit code 2, before anything is asked."""
        code, run = await unisono_batch.run(*arguments, target="127.0.0.1:1")
        assert code == 2
        assert run.told
        assert not run.lines

    @pytest.mark.parametrize("text", ["", "\n \n", "{\n"], ids=["nothing", "blank", "unreadable"])
    @pytest.mark.parametrize("is_file", [True, False], ids=["file", "standard_input"])
    async def test_without_items_no_batch_is_opened(
        self, unisono_batch: Program, tmp_path: Path, text: str, *, is_file: bool
    ) -> None:
        """That is wrong usage, and told before anything is asked."""
        file = tmp_path / "batch.jsonl"
        file.write_text(text)
        name = str(file) if is_file else "-"
        async with unisono_batch.started(name, target="127.0.0.1:1") as run:
            assert run.process.stdin is not None
            if not is_file:
                run.process.stdin.write(text.encode())
            run.process.stdin.close()
            assert await run.exit_code() == 2, run.told
        assert f"{name} holds no items" in run.told
        assert "completed" not in run.told
        assert ("line 1: not JSON" in run.told) == ("{" in text)

    async def test_ctrl_c_before_the_first_line_ends_it(self, unisono_batch: Program) -> None:
        """There is nothing to cancel."""
        async with unisono_batch.started("-", target="127.0.0.1:1") as run:
            await run.until_told("trace ")
            # It is told before it listens, which takes some programs a moment.
            await asyncio.sleep(0.5)
            run.interrupt()
            assert await run.exit_code() == 130, run.told
        assert "batch " not in run.told
