"""How a group was scheduled is told in words, and what is not known is left out."""

from google.protobuf import text_format

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.schedule import draw_schedule, explain_runner, explain_slots


def group(text: str) -> event_pb2.GroupReport:
    """A group's report in text format."""
    return text_format.Parse(text, event_pb2.GroupReport())


def test_everything_that_is_known() -> None:
    """Gain, unused slot time, the cache, families, costs, context, deaths."""
    report = group(
        """
        group { slots { count: 8 source: SLOT_SOURCE_LEARNED } } duration { seconds: 10 } prompt_tokens: 1071
        cached_prompt_tokens: 620 one_at_a_time { seconds: 42 } gain: 4.2
        idle { reason: IDLE_REASON_REFILL slot_time { seconds: 2 } }
        idle { reason: IDLE_REASON_NO_ITEMS slot_time { seconds: 18 } }
        idle { reason: IDLE_REASON_WINDOW slot_time { nanos: 1000000 } }
        costs { pass { nanos: 20000000 } token { nanos: 1000000 } prompt_token { nanos: 500000 } passes_measured: 77 }
        families { prefix_tokens: 620 item_count: 16 computed: 2 }
        families { prefix_tokens: 90 item_count: 4 computed: 1 }
        families { prefix_tokens: 80 item_count: 3 computed: 1 }
        families { prefix_tokens: 70 item_count: 2 computed: 1 }
        context_used: 0.625 runner_deaths: 2
        """
    )
    assert draw_schedule(report) == [
        ("gain", "4.2 times as fast as one at a time (which would have taken about 42.0 s)"),
        ("slot time", "75% used of 1 min 20 s, all slots together; unused:"),
        ("", "18.0 s, no item waited"),
        ("", "2.0 s, between an item and its successor"),
        ("prompt cache", "620 of 1,071 prompt tokens were found there (58%)"),
        ("begin alike", "16 items, in about 620 tokens, computed 2 times"),
        ("", "4 items, in about 90 tokens, computed once"),
        ("", "3 items, in about 80 tokens, computed once"),
        ("", "… and 1 more family"),
        ("costs", "a pass 20 ms, and 1.0 ms for each token in it; a prompt token 500 µs (77 passes measured)"),
        ("context used", "62% of all slots' at most"),
        ("runner ended", "2 times while it answered; its items were run again, the suspects apart"),
    ]


def test_nothing_is_made_up() -> None:
    """Of a group of which nothing is known."""
    assert draw_schedule(event_pb2.GroupReport()) == []
    assert explain_runner(event_pb2.GroupPlanned()) == []
    assert explain_slots(event_pb2.SlotCount()) == []
    assert draw_schedule(group("idle { reason: IDLE_REASON_REFILL slot_time { } } runner_deaths: 1")) == [
        ("runner ended", "once while it answered; its items were run again, the suspects apart")
    ]


def test_without_a_known_number_of_slots_there_is_no_share() -> None:
    """Only the spans; and a reason that this program does not know is not hidden."""
    report = group(
        """duration { seconds: 10 } idle { reason: 99 slot_time { seconds: 3 } }
        idle { reason: IDLE_REASON_NOT_READY slot_time { seconds: 1 } } costs { pass { nanos: 1 } token { } }"""
    )
    assert draw_schedule(report) == [
        ("slot time", "unused: 3.0 s, for a reason that is not known here"),
        ("", "1.0 s, the runner was not ready, or it was another's turn"),
        ("costs", "a pass 1 ns, and 0 s for each token in it (0 passes measured)"),
    ]


def test_every_reason_has_words() -> None:
    """All that a service of this version may give."""
    for name, number in event_pb2.IdleReason.items():
        (told,) = draw_schedule(group(f"idle {{ reason: {number} slot_time {{ seconds: 1 }} }}"))
        assert ("not known here" in told[1]) is (name == "IDLE_REASON_UNSPECIFIED")


def test_how_a_runner_came_to_be_as_it_is() -> None:
    """Why it has one slot, what it was left, why its context is what it is, and what it takes."""
    planned = text_format.Parse(
        """slots { count: 1 reason: "OLLAMA_NUM_PARALLEL is 1, its default" remedy: "raise it" }
        context_reason: "4,096 tokens: the most that an item asks for"
        memory { weights_bytes: 2147483648 kv_cache_bytes: 335544320 context_length: 4096 slots: 8
        measured_bytes: 2684354560 }""",
        event_pb2.GroupPlanned(),
    )
    assert explain_slots(planned.slots) == [("", "OLLAMA_NUM_PARALLEL is 1, its default: raise it")]
    assert explain_runner(planned) == [
        ("context", "4,096 tokens: the most that an item asks for"),
        (
            "memory",
            "about 2.3 GiB: 2.0 GiB of weights, 320 MiB for 8 slots of 4,096 tokens; the backend says 2.5 GiB",
        ),
    ]
    fewer = text_format.Parse(
        "slots { count: 8 limit: 3 } memory { weights_bytes: 2048 kv_cache_bytes: 5 slots: 1 context_length: 16 }",
        event_pb2.GroupPlanned(),
    )
    assert explain_slots(fewer.slots) == [("", "3 used at the end: others used it too, or it was short of memory")]
    assert explain_runner(fewer) == [("memory", "about 2.0 KiB: 2.0 KiB of weights, 5 bytes for 1 slot of 16 tokens")]
