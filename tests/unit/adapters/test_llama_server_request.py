"""What is sent to llama.cpp's server for an item, byte for byte, and what is refused because it cannot be done."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from unisono.adapters.llama_server.request import build_request
from unisono.core.errors import InvalidRequestError, RefusedByBackendError
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Format,
    GenerateRequest,
    Item,
    Message,
    Options,
    Role,
    RunnerOptions,
    Think,
    Tool,
    ToolCall,
)

Request = ChatRequest | GenerateRequest | EmbedRequest
HI = (Message(role=Role.USER, content="hi"),)
STREAMED = '"stream":true,"stream_options":{"include_usage":true},"timings_per_token":true,"cache_prompt":true'
CONTEXT = 2048


def built(request: Request, options: Options | None = None, *, slot_context: int = CONTEXT) -> tuple[str, str]:
    """The path and the body, as text."""
    item = Item(item_id="a", index=0, request=request, model="alias", options=options or Options())
    path, body = build_request(item, model="m", slot_context=slot_context)
    assert body.endswith(b"}")
    return path, body.decode()


def parsed(request: Request, options: Options | None = None, *, slot_context: int = CONTEXT) -> dict[str, Any]:
    """The body, read again."""
    body: dict[str, Any] = json.loads(built(request, options, slot_context=slot_context)[1])
    return body


def refused_field(request: Request, options: Options | None = None) -> str:
    """The path of the field for which an item is refused; the message names it too, and says what it is about."""
    with pytest.raises(RefusedByBackendError) as caught:
        built(request, options)
    field = caught.value.metadata["field"]
    assert field in caught.value.message
    assert "llama.cpp server" in caught.value.message
    return field


# -- What is sent ------------------------------------------------------------------------------------------------


def test_the_least_of_each_kind() -> None:
    """What nobody asked for is not sent; a prompt that is not raw is a conversation of one message."""
    chat = f'{{"model":"m","messages":[{{"role":"user","content":"hi"}}],{STREAMED}}}'
    assert built(ChatRequest(messages=HI)) == ("/v1/chat/completions", chat)
    assert built(GenerateRequest(prompt="hi")) == ("/v1/chat/completions", chat)
    assert built(GenerateRequest(prompt="hi", raw=True)) == (
        "/v1/completions",
        f'{{"model":"m","prompt":"hi",{STREAMED}}}',
    )
    assert built(EmbedRequest(input=("a", "b"))) == ("/v1/embeddings", '{"model":"m","input":["a","b"]}')


def test_everything_of_a_chat() -> None:
    """Every field of a chat arrives where the server looks for it; JSON text arrives as it was written."""
    request = ChatRequest(
        messages=(
            Message(role=Role.SYSTEM, content="Be “brief” \U0001f600"),
            Message(role=Role.USER, content="look", images=(b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"RIFFxxxxWEBP")),
            Message(
                role=Role.ASSISTANT,
                thinking="hm",
                tool_calls=(
                    ToolCall(id="c1", name="f", arguments_json='{"z": 1, "a": 1.0}'),
                    ToolCall(name="g"),
                ),
            ),
            Message(role=Role.TOOL, content="7", tool_name="f", tool_call_id="c1"),
        ),
        tools=(
            Tool(name="f", description="does", parameters_json='{"type":"object", "properties":{"z":{}}}'),
            Tool(name="g"),
        ),
        format=Format(json_schema='{"type": "object",\n "b": 1, "a": 2}'),
        think=Think.HIGH,
        top_logprobs=3,
        truncate=False,
        shift=False,
    )
    assert built(request)[1] == (
        '{"model":"m","messages":['
        '{"role":"system","content":"Be “brief” \U0001f600"},'
        '{"role":"user","content":[{"type":"text","text":"look"},'
        '{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0K"}},'
        '{"type":"image_url","image_url":{"url":"data:image/jpeg;base64,/9j/4A=="}},'
        '{"type":"image_url","image_url":{"url":"data:image/webp;base64,UklGRnh4eHhXRUJQ"}}]},'
        '{"role":"assistant","content":"","reasoning_content":"hm","tool_calls":['
        '{"id":"c1","type":"function","function":{"name":"f","arguments":"{\\"z\\": 1, \\"a\\": 1.0}"}},'
        '{"id":"call_1","type":"function","function":{"name":"g","arguments":"{}"}}]},'
        '{"role":"tool","content":"7","name":"f","tool_call_id":"c1"}],'
        '"tools":[{"type":"function","function":{"name":"f",'
        '"parameters":{"type":"object", "properties":{"z":{}}},"description":"does"}},'
        '{"type":"function","function":{"name":"g","parameters":{"type":"object","properties":{}}}}],'
        '"response_format":{"type":"json_schema","json_schema":{"name":"answer",'
        '"schema":{"type": "object",\n "b": 1, "a": 2}}},'
        '"chat_template_kwargs":{"enable_thinking":true},"reasoning_effort":"high",'
        f'"logprobs":true,"top_logprobs":3,{STREAMED}}}'
    )


def test_everything_of_a_prompt() -> None:
    """Every field of generate that the server can do arrives, raw or as a conversation."""
    raw = GenerateRequest(prompt="p", raw=True, format=Format(json_schema='{"type":"object", "x":1}'), top_logprobs=2)
    assert built(raw)[1] == (
        f'{{"model":"m","prompt":"p","logprobs":2,"json_schema":{{"type":"object", "x":1}},{STREAMED}}}'
    )
    told = GenerateRequest(
        prompt="p", system="s", images=(b"GIF89a",), format=Format(), think=Think.OFF, top_logprobs=0
    )
    body = parsed(told)
    assert body["messages"][0] == {"role": "system", "content": "s"}
    assert body["messages"][1]["content"][0] == {"type": "text", "text": "p"}
    assert body["messages"][1]["content"][1]["image_url"]["url"] == "data:image/gif;base64,R0lGODlh"
    assert body["response_format"]["type"] == "json_object"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "reasoning_effort" not in body


@pytest.mark.parametrize("top", [0, 1, 20])
def test_alternatives_of_a_token(top: int) -> None:
    """Asked for 0 alternatives, the server would give no probabilities at all: it is asked for one."""
    chat = parsed(ChatRequest(messages=HI, top_logprobs=top))
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, max(1, top))
    assert parsed(GenerateRequest(prompt="p", raw=True, top_logprobs=top))["logprobs"] == max(1, top)


@pytest.mark.parametrize("think", list(Think))
def test_thinking(think: Think) -> None:
    """On and off go to the template, a level beside it."""
    body = parsed(ChatRequest(messages=HI, think=think))
    assert body["chat_template_kwargs"] == {"enable_thinking": think is not Think.OFF}
    assert body.get("reasoning_effort") == (None if think in (Think.ON, Think.OFF) else think.value)


def test_any_json_is_an_object() -> None:
    """Any JSON is an object, in a chat as in a raw prompt: a bare number is no answer that a caller can use."""
    chat = parsed(ChatRequest(messages=HI, format=Format()))["response_format"]
    assert chat["type"] == "json_object"
    assert parsed(GenerateRequest(prompt="p", raw=True, format=Format()))["json_schema"] == {"type": "object"}


# Every option of an answer: how it is set, the server's name, and what is sent.
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_keep": 5}, {"n_keep": 5}),
    ({"seed": -1}, {"seed": -1}),
    ({"seed": 2**40}, {"seed": 2**40}),
    ({"num_predict": 7}, {"max_tokens": 7}),
    # Ollama's words for "no limit" and "fill the context".
    ({"num_predict": 0}, {"max_tokens": -1}),
    ({"num_predict": -1}, {"max_tokens": -1}),
    ({"num_predict": -2}, {"max_tokens": -1}),
    ({"top_k": 0}, {"top_k": 0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"min_p": 0.0}, {"min_p": 0.0}),
    ({"typical_p": 0.25}, {"typical_p": 0.25}),
    ({"repeat_last_n": 64}, {"repeat_last_n": 64}),
    # Ollama's word for the whole context; the server takes no -1 (error_option_range).
    ({"repeat_last_n": -1}, {"repeat_last_n": CONTEXT}),
    ({"temperature": 0.0}, {"temperature": 0.0}),
    ({"repeat_penalty": 1.5}, {"repeat_penalty": 1.5}),
    ({"presence_penalty": -2.0}, {"presence_penalty": -2.0}),
    ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
    ({"stop": ("a", "\n")}, {"stop": ["a", "\n"]}),
    ({"extra_json": '{"dry_multiplier": 0.80, "mirostat":2}'}, {"dry_multiplier": 0.8, "mirostat": 2}),
    ({"extra_json": "{}"}, {}),
]


@pytest.mark.parametrize(("given", "sent"), OPTIONS)
def test_options(given: dict[str, Any], sent: dict[str, Any]) -> None:
    """Each option goes under the server's own name, at the top of the body, for chats and for raw prompts."""
    for request in (ChatRequest(messages=HI), GenerateRequest(prompt="p", raw=True)):
        plain = parsed(request)
        assert parsed(request, Options(**given)) == plain | sent


def test_no_option_is_forgotten() -> None:
    """The table above names every option that there is."""
    tested = {name for given, _ in OPTIONS for name in given}
    assert tested == {field.name for field in fields(Options)} - {"runner"}


def test_options_of_an_embedding() -> None:
    """An embedding samples nothing."""
    assert parsed(EmbedRequest(input=("a",)), Options(temperature=0.5, seed=1)) == {"model": "m", "input": ["a"]}


# -- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ChatRequest(messages=HI, truncate=True), "chat.truncate"),
        (ChatRequest(messages=HI, shift=True), "chat.shift"),
        (GenerateRequest(prompt="p", truncate=True), "generate.truncate"),
        (GenerateRequest(prompt="p", shift=True), "generate.shift"),
        (GenerateRequest(prompt="p", suffix="s"), "generate.suffix"),
        (GenerateRequest(prompt="p", template="t"), "generate.template"),
        (GenerateRequest(prompt="p", raw=True, images=(b"GIF89a",)), "generate.images"),
        (GenerateRequest(prompt="p", raw=True, system="s"), "generate.system"),
        (GenerateRequest(prompt="p", raw=True, think=Think.ON), "generate.think"),
        (EmbedRequest(input=("a",), dimensions=8), "embed.dimensions"),
        (EmbedRequest(input=("a",), truncate=True), "embed.truncate"),
    ],
)
def test_what_a_running_server_cannot_do(request_: Request, field: str) -> None:
    """It is refused with the path of its field, before anything is sent, and never silently left out."""
    assert refused_field(request_) == field


@pytest.mark.parametrize("option", [field.name for field in fields(RunnerOptions)])
@pytest.mark.parametrize("request_", [ChatRequest(messages=HI), EmbedRequest(input=("a",))])
def test_options_that_would_load_the_model_otherwise(option: str, request_: Request) -> None:
    """The server keeps what it was started with: each runner option is refused under its own path."""
    value: Any = True if option == "use_mmap" else CONTEXT + 1
    runner = RunnerOptions(**{option: value})
    assert refused_field(request_, Options(runner=runner)) == f"options.runner.{option}"


def test_a_context_that_fits_into_a_slot() -> None:
    """A smaller context than the slot's is satisfied by it; one more token is not, and the message says how many."""
    fits = Options(runner=RunnerOptions(num_ctx=CONTEXT))
    assert parsed(ChatRequest(messages=HI), fits) == parsed(ChatRequest(messages=HI))
    with pytest.raises(RefusedByBackendError, match="2,048 tokens"):
        built(ChatRequest(messages=HI), Options(runner=RunnerOptions(num_ctx=CONTEXT + 1)))
    with pytest.raises(RefusedByBackendError):
        built(ChatRequest(messages=HI), fits, slot_context=0)


@pytest.mark.parametrize(
    "name", ["stream", "stream_options", "timings_per_token", "cache_prompt", "messages", "model", "n", "n_cmpl"]
)
def test_extra_options_cannot_undo_what_the_adapter_needs(name: str) -> None:
    """An extra option that would change how the answer comes, or whose it is, is refused by its path."""
    extra = Options(extra_json=json.dumps({name: 2}))
    assert refused_field(ChatRequest(messages=HI), extra) == f"options.extra_options_json.{name}"


@pytest.mark.parametrize("text", ["{", "[1", "", "nothing"])
def test_json_text_that_is_none(text: str) -> None:
    """Text that should be JSON and is not is the caller's mistake, at its path, and reaches no server."""
    cases: list[tuple[Request, Options | None, str]] = [
        (ChatRequest(messages=HI, format=Format(json_schema=text)), None, "chat.format.json_schema"),
        (
            GenerateRequest(prompt="p", raw=True, format=Format(json_schema=text)),
            None,
            "generate.format.json_schema",
        ),
    ]
    if text:
        cases += [
            (
                ChatRequest(messages=HI, tools=(Tool(name="g"), Tool(name="f", parameters_json=text))),
                None,
                "chat.tools[1].parameters_json",
            ),
            (ChatRequest(messages=HI), Options(extra_json=text), "options.extra_options_json"),
        ]
    for request, options, field in cases:
        with pytest.raises(InvalidRequestError) as caught:
            built(request, options)
        assert [violation.field for violation in caught.value.violations] == [field]


def test_arguments_that_are_no_json() -> None:
    """A tool call in the conversation must carry JSON."""
    call = ToolCall(name="f", arguments_json="{")
    message = Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="g"), call))
    with pytest.raises(InvalidRequestError) as caught:
        built(ChatRequest(messages=(*HI, message)))
    assert [v.field for v in caught.value.violations] == ["chat.messages[1].tool_calls[1].arguments_json"]
