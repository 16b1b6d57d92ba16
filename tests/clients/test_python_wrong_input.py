"""What cannot be sent is refused by the name of its field, with what is right; Ollama's own objects are taken."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from unisono_client import Message, RefusedError
from unisono_client import items as typed
from unisono_client._generated.unisono.v1 import item_pb2
from unisono_client.config import config_of, deltas_of, options_of
from unisono_client.items import to_message

# What is wrong here on purpose, a type checker would tell as well.
Chat, Embed, Generate = cast("Any", typed.Chat), cast("Any", typed.Embed), cast("Any", typed.Generate)
WRONG_MESSAGE = cast("Any", Message)
# Arguments of an item, the field that is named, and what is said to be right.
WRONG_ITEMS: list[tuple[Any, str, str]] = [
    (5, "items[3]", "give str, Chat, Generate or Embed"),
    (Chat(5), "items[3].messages", "give a list of messages"),
    (Chat({"role": "user"}), "items[3].messages", "give a list of messages"),
    (Chat(["x"]), "items[3].messages[0]", "give a Message"),
    (Chat([{"content": "x"}]), "items[3].messages[0].role", "system, user"),
    (Chat([{"role": "user", "contents": "x"}]), "items[3].messages[0].contents", "'content' is"),
    (Chat([WRONG_MESSAGE("user", 5)]), "items[3].messages[0].content", "give a str"),
    (Chat([{"role": "user", "images": ["a.png"]}]), "items[3].messages[0].images[0]", "read_bytes"),
    (Chat([{"role": "user", "images": "a.png"}]), "items[3].messages[0].images", "a list of pictures"),
    (Generate("x", images=["a.png"]), "items[3].images[0]", "read_bytes"),
    (Generate(5), "items[3].prompt", "give a str"),
    (Embed([5]), "items[3].input", "each a str"),
    (Chat("x", item_id=5), "items[3].item_id", "give a str"),
    (Chat("x", model=5), "items[3].model", "give a str"),
    (Chat("x", system=5), "items[3].system", "give a str"),
    (Chat("x", n=True), "items[3].n", "whole number"),
    (Chat("x", logprobs=True), "items[3].logprobs", "0 to 20"),
    (Chat("x", think="much"), "items[3].think", "'high'"),
    (Chat("x", tools=[print]), "items[3].tools[0]", "JSON schema"),
    (Chat("x", format=Message), "items[3].format", "model_json_schema"),
    (Chat("x", options=[1]), "items[3].options", "give a mapping"),
    (Chat("x", options={"tempreature": 0}), "items[3].options.tempreature", "'temperature' is"),
    (Chat("x", options={"temperature": "0"}), "items[3].options.temperature", "give a number"),
    (Chat("x", options={"mirostat": 1}), "items[3].options.mirostat", "extra_options,"),
]
WRONG_CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"keep_alive": "10m"}, "config.keep_alive", "a number of seconds"),
    ({"queue_timeout": True}, "config.queue_timeout", "a number of seconds"),
    ({"item_timeout": float("nan")}, "config.item_timeout", "no span"),
    ({"detach_grace": "1h", "on_disconnect": "DETACH"}, "config.detach_grace", "a number of seconds"),
    ({"release": {"interval": "1s"}}, "config.release.interval", "a number of seconds"),
    ({"release": 5}, "config.release", "give a mapping"),
    ({"model": 5}, "config.model", "give a str"),
    ({"max_concurrency": "4"}, "config.max_concurrency", "a whole number"),
    ({"priority": "URGENT"}, "config.priority", "LOW, NORMAL, HIGH"),
    ({"on_disconnect": "GO"}, "config.on_disconnect", "CANCEL, DETACH"),
    ({"co_scheduling": "REQUIRED"}, "config.co_scheduling", "client.stub.RunBatch"),
]


@pytest.mark.parametrize(("asked", "field", "hint"), WRONG_ITEMS)
def test_a_wrong_item(asked: Any, field: str, hint: str) -> None:
    """The field is named, and what it should be."""
    with pytest.raises(RefusedError) as caught:
        _ = to_message(asked, 3)
    (at,) = caught.value.fields
    assert at.field == field
    assert hint in at.description
    assert caught.value.reason == "INVALID_REQUEST"


@pytest.mark.parametrize(("config", "field", "hint"), WRONG_CONFIGS)
def test_a_wrong_config(config: Any, field: str, hint: str) -> None:
    """So is what applies to a batch."""
    with pytest.raises(RefusedError) as caught:
        _ = config_of(config, shared=(), request_id="r", least_grace_s=1)
    (at,) = caught.value.fields
    assert at.field == field
    assert hint in at.description


def test_deltas() -> None:
    """So are settings of deltas."""
    with pytest.raises(RefusedError, match=r"deltas\.flush_interval: is 'fast'"):
        _ = deltas_of(cast("Any", {"flush_interval": "fast"}))
    assert deltas_of({"flush_interval": timedelta(seconds=1)}).flush_interval.seconds == 1


def test_extra_options_are_under_the_name_that_is_documented() -> None:
    """What the contract does not name goes through, and its name in errors is the one that callers give."""
    made = options_of({"extra_options": {"mirostat": 1}, "num_ctx": 512, "stop": "end"})
    assert made is not None
    assert (made.extra_options_json, made.runner.num_ctx, list(made.stop)) == ('{"mirostat": 1}', 512, ["end"])
    with pytest.raises(RefusedError) as caught:
        _ = options_of(cast("Any", {"extra_options_json": "{}"}))
    assert "extra_options" in caught.value.fields[0].description
    assert "extra_options_json" not in caught.value.fields[0].description


def test_objects_of_ollamas_client() -> None:
    """Messages, pictures, options and tools as that client has them."""
    ollama = pytest.importorskip("ollama", reason="Ollama's own client is not installed")
    picture = ollama.Image(value=b"PNG")
    said = ollama.Message(role="user", content="x", images=[picture])
    call = ollama.Message.ToolCall(function=ollama.Message.ToolCall.Function(name="f", arguments={"a": 1}))
    tool = ollama.Tool(function=ollama.Tool.Function(name="f", description="does"))
    options = ollama.Options(temperature=0, num_ctx=512)
    talk = [said, ollama.Message(role="assistant", tool_calls=[call])]
    made = to_message(Chat(talk, tools=[tool], options=options), 0)
    assert list(made.chat.messages[0].images) == [b"PNG"]
    assert made.chat.messages[1].tool_calls[0] == item_pb2.ToolCall(name="f", arguments_json='{"a": 1}')
    assert made.chat.tools[0].name == "f"
    assert made.options.runner.num_ctx == 512
    with pytest.raises(RefusedError, match="read_bytes"):
        _ = to_message(Chat([WRONG_MESSAGE("user", images=[SimpleNamespace(value="a.png")])]), 0)
