"""The doctor tells what is there, and what to change to share passes."""

# ruff: noqa: E501, ISC004  # a screen as it is shown

import json

import pytest
from google.protobuf import text_format
from typer.testing import CliRunner

from tests.unit.cli.fake_server import Script
from tests.unit.cli.harness import invoke
from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono.edge.cli.doctor import Findings, advise, draw

INFO = """version: "0.1.0" backends { name: "ollama" kind: "ollama" url: "http://127.0.0.1:11434" version: "0.32.15"
  reachable: true in_flight: 3 queued: 1200 }"""
MODELS = """
models { backend: "ollama" name: "llama3.2:1b" family: "llama" parameter_size: "1.2B" quantization: "Q8_0"
  context_length: 131072 capabilities: "completion" capabilities: "tools"
  runners { context_length: 4096 size_bytes: 9 slots { count: 4 source: SLOT_SOURCE_LEARNED } }
  runners { context_length: 8192 size_bytes: 9 slots { count: 1 source: SLOT_SOURCE_LEARNED } } }
models { backend: "ollama" name: "one" family: "llama" capabilities: "completion"
  runners { slots { count: 1 source: SLOT_SOURCE_LEARNED } } }
models { backend: "ollama" name: "new" family: "llama" capabilities: "completion" }
models { backend: "ollama" name: "newer" family: "llama" capabilities: "completion" }
models { backend: "ollama" name: "vectors" family: "bert" capabilities: "embedding" }
models { backend: "ollama" name: "sight" family: "qwen3vlmoe" capabilities: "completion" capabilities: "vision" }
"""


def found(info: str = INFO, models: str = MODELS) -> Findings:
    """What a service told, in text format."""
    return Findings(
        target="127.0.0.1:50051",
        info=text_format.Parse(info, rpc.GetServerInfoResponse()),
        models=text_format.Parse(models, rpc.ListModelsResponse()),
    )


def test_everything_is_told() -> None:
    """The service, its backend, its models with their slots, and the advice for each."""
    findings = found()
    assert draw(findings, advise(findings)) == [
        "Service 0.1.0 at 127.0.0.1:50051",
        "",
        "Backend ollama: ollama 0.32.15, http://127.0.0.1:11434",
        "  reachable, 3 in flight, 1,200 queued",
        "  model        size  quantized  context  can                 loaded  slots",
        "  llama3.2:1b  1.2B  Q8_0       131,072  completion, tools   yes     4 (learned: items were seen waiting"
        " while so many ran)",
        "  one          ?     ?          ?        completion          no      1 (learned: items were seen waiting"
        " while so many ran)",
        *(
            f"  {name:<11}  ?     ?          ?        {can:<18}  no      not known yet: learned once items have to wait"
            for name, can in (
                ("new", "completion"), ("newer", "completion"), ("vectors", "embedding"), ("sight", "completion, vision"),
            )
        ),
        "",
        "To share more passes",
        "  one",
        "    It has one slot, so no passes are shared: start Ollama with OLLAMA_NUM_PARALLEL=8 in its environment (each"
        " slot needs memory for its own context).",
        "  new, newer",
        "    How many slots it has is learned from the first batch that is larger. If it has only one, Ollama's default,"
        " no passes are shared: start Ollama with OLLAMA_NUM_PARALLEL=8 in its environment (each slot needs memory for"
        " its own context).",
        "  vectors",
        "    Ollama gives embedding models one slot, whatever OLLAMA_NUM_PARALLEL says. Put many texts into one item's"
        " `input`: they are computed together.",
        "  sight",
        "    Ollama runs the family qwen3vlmoe one request at a time, whatever OLLAMA_NUM_PARALLEL says. Use a model of"
        " another family, or several backends.",
    ]  # fmt: skip


def test_a_backend_that_is_away() -> None:
    """Why, and what to do about it; this comes first, and fails the command."""
    info = """backends { name: "ollama" kind: "ollama" url: "http://x:1" error { message: "connection refused" } }"""
    findings = found(info, "")
    advice = advise(findings)
    drawn = draw(findings, advice)
    assert "  not reachable: connection refused" in drawn
    assert "To do" in drawn
    assert "ollama serve" in drawn[-1]
    assert advice[0].is_blocking


SEVERAL = """
backends { name: "gpu1" kind: "ollama" url: "http://x:1" reachable: true }
backends { name: "gpu2" kind: "ollama" url: "http://y:1" error { message: "connection refused" } }
backends { name: "cpp" kind: "llama-server" url: "http://z:1" reachable: true }
"""


def test_one_of_several_that_is_away() -> None:
    """It is told first and must be done, but what the others have is answered."""
    models = 'models { backend: "gpu1" name: "m" } models { backend: "cpp" name: "m" }'
    findings = found(SEVERAL, models)
    advice = advise(findings)
    assert (advice[0].subject, advice[0].is_blocking) == ("gpu2", False)
    assert "UNISONO_BACKENDS" in advice[0].text
    assert [each.subject for each in advice[1:]] == ["m on gpu1", "m on cpp"]
    drawn = draw(findings, advice)
    assert "To do" in drawn
    assert [line for line in drawn if line.startswith("Backend")] == [
        "Backend gpu1: ollama, http://x:1",
        "Backend gpu2: ollama, http://y:1",
        "Backend cpp: llama-server, http://z:1",
    ]


def test_several_of_which_none_can_answer() -> None:
    """Then it fails the command, whatever keeps each of them."""
    advice = advise(found(SEVERAL, ""))
    assert [each.is_blocking for each in advice] == [True, True, True]


@pytest.mark.parametrize(("kind", "remedy"), [("ollama", "ollama pull"), ("llama-server", "It has no models.")])
def test_no_models(kind: str, remedy: str) -> None:
    """A model must be pulled first."""
    findings = found(f'backends {{ name: "b" kind: "{kind}" reachable: true }}', "")
    (advice,) = advise(findings)
    assert remedy in advice.text
    assert "  no models" in draw(findings, [advice])


@pytest.mark.parametrize(
    ("kind", "remedy"), [("llama-server", "--parallel 8"), ("embedded", "8 slots"), ("other", "more slots")]
)
def test_other_backends_have_their_own_remedy(kind: str, remedy: str) -> None:
    """What is said of Ollama is not said of others."""
    info = f'backends {{ name: "b" kind: "{kind}" reachable: true }}'
    one = 'models { backend: "b" name: "m" runners { slots { count: 1 source: SLOT_SOURCE_TOLD } } }'
    (advice,) = advise(found(info, one))
    assert remedy in advice.text
    (advice,) = advise(found(info, 'models { backend: "b" name: "m" capabilities: "embedding" }'))
    assert "OLLAMA" not in advice.text


def test_the_settings_may_be_why_there_is_one_slot() -> None:
    """Then the backend is not to blame."""
    one = 'models { backend: "ollama" name: "m" runners { slots { count: 1 source: SLOT_SOURCE_CONFIGURED } } }'
    (advice,) = advise(found(INFO, one))
    assert "UNISONO_SLOTS is 1" in advice.text
    assert "OLLAMA_NUM_PARALLEL" not in advice.text


def test_slots_that_were_seen_need_no_advice() -> None:
    """That there are at least so many is known; their number is still to be learned."""
    info = 'backends { name: "b" kind: "ollama" reachable: true }'
    runners = "runners { slots { at_least: 1 } } runners { slots { at_least: 8 } }"
    findings = found(info, f'models {{ backend: "b" name: "m" {runners} }}')
    assert advise(findings) == []
    assert "8" in draw(findings, [])[5]


def test_nothing_to_change() -> None:
    """Said so."""
    info = 'backends { name: "b" kind: "embedded" reachable: true }'
    findings = found(
        info, 'models { backend: "b" name: "m" runners { slots { count: 8 source: SLOT_SOURCE_TOLD } } }'
    )
    assert draw(findings, advise(findings))[-1] == "Nothing to change: every model has several slots."
    assert advise(found("", ""))[0].text == "No backend is configured."


def test_the_command_asks_a_service(runner: CliRunner) -> None:
    """It starts one, prints on standard output, and says on standard error what it did."""
    script = Script(info=found().info, models=found().models)
    result, _ = invoke(runner, ["doctor"], script)
    assert result.exit_code == 0
    assert "Backend ollama: ollama 0.32.15" in result.stdout
    assert "started a service for this command, using a stand-in" in result.stderr

    result, _ = invoke(runner, ["doctor", "--json"], script)
    value = json.loads(result.stdout)
    assert value["server"]["backends"][0]["version"] == "0.32.15"
    assert value["models"]["models"][0]["runners"][0]["slots"] == {"count": 4, "source": "SLOT_SOURCE_LEARNED"}
    assert value["advice"][0]["blocking"] is False


def test_the_command_fails_where_nothing_can_be_answered(runner: CliRunner) -> None:
    """So that a script can ask."""
    result, _ = invoke(runner, ["doctor"], Script())
    assert result.exit_code == 1
    assert "No backend is configured." in result.stdout
