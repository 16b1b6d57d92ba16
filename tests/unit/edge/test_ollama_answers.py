"""Results as Ollama's own answers, and a batch's figures: measured, or absent."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from unisono.core.events import Result
from unisono.core.model import (
    Completion,
    FinishReason,
    ItemState,
    PassMethod,
    RunnerSpec,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)
from unisono.core.passes import PassCount
from unisono.core.report import GroupPlanned, GroupReport, Report
from unisono.edge.rest.batch_api import stats
from unisono.edge.rest.ollama_answers import chat_answer, generate_answer, moment

AT_NS = 1_792_837_012_000_000_007
DONE = Completion(model="m", content="Yes", finish_reason=FinishReason.STOP, finish_reason_raw="stop")
RESULT = Result(item_id="0", index=0, state=ItemState.COMPLETED, completion=DONE)


def written(value: dict[str, object]) -> dict[str, Any]:
    """As it travels."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(value))
    return found


def test_what_was_not_measured_is_absent() -> None:
    """Nothing is told as 0."""
    assert written(chat_answer(RESULT, DONE, AT_NS)) == {
        "model": "m",
        "created_at": "2026-10-24T10:16:52.000000007Z",
        "message": {"role": "assistant", "content": "Yes"},
        "done": True,
        "done_reason": "stop",
    }


def test_durations_are_nanoseconds() -> None:
    """Of those that are known."""
    result = replace(
        RESULT, timings=Timings(total_s=1.5, eval_s=0.25), usage=Usage(prompt_tokens=3, completion_tokens=4)
    )
    found = written(generate_answer(result, DONE, AT_NS))
    assert (found["total_duration"], found["eval_duration"]) == (1_500_000_000, 250_000_000)
    assert "load_duration" not in found
    assert (found["prompt_eval_count"], found["eval_count"], found["response"]) == (3, 4, "Yes")


def test_tools_thoughts_and_probabilities() -> None:
    """Arguments as the model wrote them; halves of surrogate pairs cannot be written at all."""
    done = replace(
        DONE,
        content="\ud83d",
        thinking="Hm",
        finish_reason=FinishReason.TOOL_CALLS,
        finish_reason_raw="",
        tool_calls=(ToolCall(name="look", arguments_json='{"b":1.50,"a":{}}'), ToolCall(id="c1", name="go")),
        logprobs=(
            TokenLogprob(token="\udc00", logprob=-0.5, bytes=b"\xed", top=(TokenLogprob(token="a", logprob=-1),)),
        ),
    )
    raw = msgspec.json.encode(chat_answer(RESULT, done, AT_NS))
    assert b'{"b":1.50,"a":{}}' in raw
    found = json.loads(raw)
    assert found["message"]["content"] == "?" or found["message"]["content"] == "\ufffd"
    assert found["message"]["thinking"] == "Hm"
    assert [call["function"]["index"] for call in found["message"]["tool_calls"]] == [0, 1]
    assert found["message"]["tool_calls"][1]["id"] == "c1"
    assert found["done_reason"] == "stop"
    assert found["logprobs"][0]["bytes"] == [0xED]
    assert found["logprobs"][0]["top_logprobs"] == [{"token": "a", "logprob": -1, "bytes": []}]
    assert generate_answer(RESULT, done, AT_NS)["thinking"] == "Hm"
    assert len(written(generate_answer(RESULT, done, AT_NS))["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("at_ns", "text"), [(0, "1970-01-01T00:00:00.000000000Z"), (10**9 + 5, "1970-01-01T00:00:01.000000005Z")]
)
def test_a_moment_is_exact(at_ns: int, text: str) -> None:
    """To the nanosecond."""
    assert moment(at_ns) == text


def group(number: int, **figures: Any) -> GroupReport:
    """The figures of a group."""
    runner = RunnerSpec(backend="b", model=f"m{number}", digest=f"d{number}")
    usual: dict[str, Any] = {
        "group": GroupPlanned(group=number, runner=runner, item_count=2, is_loaded=True),
        "passes": PassCount(count=1, method=PassMethod.CREATED_AT, imputed_share=0.0, confidence=1.0),
        **dict.fromkeys(("fewest_passes", "first_wave", "duration_s")),
        **dict.fromkeys(("waves", "loads", "load_s", "prompt_tokens", "completion_tokens"), 0),
    }
    return GroupReport(**usual | figures)


def test_figures_of_groups() -> None:
    """The gain is known where each group's is; the context is that of the group that used most."""
    one = group(0, one_at_a_time_s=8.0, duration_s=2.0, context_used=0.25)
    other = group(1, one_at_a_time_s=4.0, duration_s=3.0, context_used=0.5)
    report = Report(batch_id="b", duration_s=4.0, groups=(one,))
    usual = {"batch_size": 3, "processing_time": 4_000_000_000}
    assert stats(report, 3) == usual | {"memory_efficiency": 0.25, "throughput_gain": 4.0}
    both = replace(report, groups=(one, other))
    assert stats(both, 3) == usual | {"memory_efficiency": 0.5, "throughput_gain": 3.0}
    unknown = replace(report, groups=(one, group(1)))
    assert stats(unknown, 3) == usual | {"memory_efficiency": 0.25}
    assert stats(replace(report, groups=()), 3) == usual
