"""The report tells what is known, in words and aligned, and nothing that is not."""

from google.protobuf import text_format

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.report import Failure, Tally, describe_slots, draw_report

WHOLE = """
batch_id: "b-7" duration { seconds: 8 nanos: 400000000 }
prompt_tokens: 1071 cached_prompt_tokens: 620 completion_tokens: 1234 retries: 2
groups {
  group { backend: "ollama" model: "llama3.2:1b" item_count: 24 slots { count: 8 source: SLOT_SOURCE_LEARNED }
    runner { num_ctx: 4096 use_mmap: false } }
  passes { count: 161 method: PASS_METHOD_CREATED_AT imputed_share: 0.034 confidence: 0.98 }
  fewest_passes: 155 items_per_pass: 7.664 waves: 3 loads: 1 load_duration { seconds: 1 nanos: 250000000 }
  first_wave { item_count: 8 release_spread { nanos: 84000 } first_token_spread { nanos: 12300000 } }
}
groups {
  group { group: 1 backend: "ollama" model: "embed" item_count: 1 loaded: true } waves: 1
  first_wave { item_count: 1 release_spread { } }
}
"""


def test_a_whole_report() -> None:
    """Every figure of a batch and of its groups."""
    tally = Tally(states={"completed": 23, "failed": 1, "expired": 1})
    tally.failures.append(
        Failure(item_id="x", state="failed", reason="MODEL_NOT_FOUND", message="no\x1b[31m such\nmodel")
    )
    assert draw_report(tally, text_format.Parse(WHOLE, event_pb2.Report())) == [
        "Report",
        "  items            23 completed, 1 failed, 1 expired",
        "  time             8.4 s",
        "  tokens           1,234 answered (146.9 a second), 1,071 of prompts (of these, 620 found in a cache)",
        "  retries          2",
        "  batch            b-7",
        "",
        "llama3.2:1b on ollama",
        "  items            24",
        "  slots            8 (learned: items were seen waiting while so many ran)",
        "  loaded with      num_ctx 4096, use_mmap False",
        "  passes           161, counted by when the backend made each token",
        "                   confidence 98%; 3% of the participations concluded, not seen",
        "  fewest possible  155 passes, on so many slots",
        "  items per pass   7.7",
        "  releases         3",
        "  first release    8 requests within 84 µs, their first tokens within 12 ms",
        "  model loaded     once, in 1.2 s",
        "",
        "embed on ollama",
        "  items            1",
        "  slots            not known yet: learned once items have to wait",
        "  passes           none counted",
        "  releases         1",
        "  first release    1 request",
        "  model loaded     already",
        "",
        "Without an answer",
        "  x: failed, MODEL_NOT_FOUND",
        "    no[31m such model",
        "  … and 1 more",
    ]


def test_without_the_services_report() -> None:
    """What the command saw itself, where the service is gone."""
    tally = Tally(unanswered=3, is_cut_short=True, duration_s=2.0)
    tally.add("completed", None, 30)
    assert draw_report(tally, None) == [
        "Report",
        "  items            1 completed",
        "  no result        3 that had been sent",
        "  not sent         the rest of the file",
        "  time             2.0 s",
        "  tokens           30 answered (15.0 a second)",
    ]


def test_what_is_not_known_is_not_made_up() -> None:
    """Passes without known slots have no bound, and a small share is not rounded to nothing."""
    report = text_format.Parse(
        """groups { group { backend: "o" } passes { count: 5 method: PASS_METHOD_ARRIVAL imputed_share: 0.001
        confidence: 1 } loads: 2 load_duration { seconds: 3 } }""",
        event_pb2.Report(),
    )
    drawn = draw_report(Tally(), report)
    assert "the default model on o" in drawn
    assert "  items            none ended" in drawn
    assert "  passes           5, counted by when each token arrived" in drawn
    assert "                   confidence 100%; less than 1% of the participations concluded, not seen" in drawn
    assert "  fewest possible  not known until the slots are" in drawn
    assert "  model loaded     2 times, in 3.0 s" in drawn
    assert not any("items per pass" in line for line in drawn)


def test_a_service_that_counted_nothing_is_not_quoted() -> None:
    """An older one says 0.0 items a pass where all answers were broken off."""
    report = text_format.Parse(
        "groups { passes { count: 5 method: PASS_METHOD_ARRIVAL } items_per_pass: 0 }", event_pb2.Report()
    )
    assert not any("items per pass" in line for line in draw_report(Tally(), report))


def test_only_the_first_failures_are_told() -> None:
    """A file of a thousand mistakes does not fill the screen."""
    tally = Tally()
    for number in range(1000):
        tally.add("failed", Failure(item_id=f"i{number}", state="failed", reason="R", message="m"))
    drawn = draw_report(tally, None)
    assert drawn[-1] == "  … and 990 more"
    assert len(drawn) < 40


def test_what_is_known_of_slots() -> None:
    """A number with where it comes from, or what is known without one."""
    known = event_pb2.SlotCount(count=8, source=event_pb2.SLOT_SOURCE_REMEMBERED, at_least=3)
    assert describe_slots(known) == "8 (remembered, and not confirmed yet)"
    assert describe_slots(event_pb2.SlotCount(at_least=3)).startswith("at least 3: ")
    assert describe_slots(event_pb2.SlotCount(at_least=1)).startswith("not known yet")
