"""What is sent to Ollama for an item, byte for byte."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from unisono.adapters.ollama.request import build_load, build_request
from unisono.core.errors import InvalidRequestError
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
    RunnerSpec,
    Think,
    Tool,
    ToolCall,
)

RUNNER = RunnerSpec(backend="here", model="m:1", digest="d")
HI = (Message(role=Role.USER, content="hi"),)


def body_of(
    request: ChatRequest | GenerateRequest | EmbedRequest,
    options: Options | None = None,
    runner: RunnerSpec = RUNNER,
) -> str:
    """The body as text."""
    item = Item(item_id="a", index=0, request=request, model="alias", options=options or Options())
    _, body = build_request(item, runner)
    assert body.endswith(b"}")
    assert "keep_alive" not in json.loads(body)
    return body.decode()


def test_the_least_of_each_kind() -> None:
    """What nobody asked for is not sent; the runner's name stands for its aliases; nothing is cut silently."""
    assert body_of(ChatRequest(messages=HI)) == (
        '{"model":"m:1","messages":[{"role":"user","content":"hi"}],"stream":true,"truncate":false}'
    )
    assert body_of(GenerateRequest(prompt="once")) == (
        '{"model":"m:1","prompt":"once","stream":true,"truncate":false}'
    )
    assert body_of(EmbedRequest(input=("a", "b"))) == '{"model":"m:1","input":["a","b"],"truncate":false}'


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (ChatRequest(messages=HI), "/api/chat"),
        (GenerateRequest(prompt="p"), "/api/generate"),
        (EmbedRequest(input=("a",)), "/api/embed"),
    ],
)
def test_the_path_of_each_kind(request_: Any, path: str) -> None:
    """Each kind has its own path."""
    assert build_request(Item(item_id="a", index=0, request=request_), RUNNER)[0] == path


def test_everything_of_a_chat() -> None:
    """Every field of a chat arrives where Ollama looks for it; JSON text arrives as it was written."""
    request = ChatRequest(
        messages=(
            Message(role=Role.SYSTEM, content="Be \u201cbrief\u201d \U0001f600"),
            Message(role=Role.USER, content="look", images=(b"hi", b"\x00\xff")),
            Message(
                role=Role.ASSISTANT,
                thinking="hm",
                tool_calls=(
                    ToolCall(id="c1", name="f", arguments_json='{"z": 1, "a": 1.0, "big": 12345678901234567890}'),
                    ToolCall(name="g"),
                ),
            ),
            Message(role=Role.TOOL, content="7", tool_name="f", tool_call_id="c1"),
        ),
        tools=(
            Tool(name="f", description="does", parameters_json='{"type":"object", "properties":{"z":{},"a":{}}}'),
            Tool(name="g"),
        ),
        format=Format(json_schema='{"type": "object",\n "b": 1, "a": 2}'),
        think=Think.HIGH,
        top_logprobs=3,
        truncate=True,
        shift=False,
    )
    assert body_of(request) == (
        '{"model":"m:1","messages":['
        '{"role":"system","content":"Be \u201cbrief\u201d \U0001f600"},'
        '{"role":"user","content":"look","images":["aGk=","AP8="]},'
        '{"role":"assistant","content":"","thinking":"hm","tool_calls":['
        '{"id":"c1","function":{"index":0,"name":"f","arguments":{"z": 1, "a": 1.0, "big": 12345678901234567890}}},'
        '{"function":{"index":1,"name":"g","arguments":{}}}]},'
        '{"role":"tool","content":"7","tool_name":"f","tool_call_id":"c1"}],'
        '"tools":[{"type":"function","function":{"name":"f","description":"does",'
        '"parameters":{"type":"object", "properties":{"z":{},"a":{}}}}},'
        '{"type":"function","function":{"name":"g","parameters":{"type":"object","properties":{}}}}],'
        '"format":{"type": "object",\n "b": 1, "a": 2},"think":"high","logprobs":true,"top_logprobs":3,'
        '"shift":false,"stream":true,"truncate":true}'
    )


def test_everything_of_a_prompt() -> None:
    """Every field of generate arrives where Ollama looks for it."""
    request = GenerateRequest(
        prompt="def f(",
        suffix="return 1",
        system="code",
        template="{{ .Prompt }}",
        raw=True,
        images=(b"hi",),
        format=Format(),
        think=Think.OFF,
        top_logprobs=0,
        shift=True,
    )
    assert body_of(request) == (
        '{"model":"m:1","prompt":"def f(","suffix":"return 1","system":"code","template":"{{ .Prompt }}","raw":true,'
        '"images":["aGk="],"format":"json","think":false,"logprobs":true,"top_logprobs":0,"shift":true,'
        '"stream":true,"truncate":false}'
    )


def test_everything_of_an_embedding() -> None:
    """Every field of embed arrives where Ollama looks for it; a stream or a shift it does not know."""
    runner = RunnerSpec(backend="here", model="m:1", digest="d", shift=True, is_embedding=True)
    assert body_of(EmbedRequest(input=("a",), dimensions=0, truncate=True), runner=runner) == (
        '{"model":"m:1","input":["a"],"dimensions":0,"truncate":true}'
    )


@pytest.mark.parametrize(
    ("think", "sent"), [(Think.OFF, False), (Think.ON, True), (Think.LOW, "low"), (Think.MAX, "max"), (None, ...)]
)
def test_thinking(think: Think | None, sent: object) -> None:
    """Off and on are booleans, degrees are words, and nothing is nothing."""
    assert json.loads(body_of(ChatRequest(messages=HI, think=think))).get("think", ...) == sent


def test_all_options() -> None:
    """Every option is sent, zeros too; those of the runner come from the runner and not from the item."""
    options = Options(
        num_keep=0,
        seed=0,
        num_predict=-1,
        top_k=0,
        top_p=0.0,
        min_p=0.05,
        typical_p=1.0,
        repeat_last_n=64,
        temperature=0.0,
        repeat_penalty=1.1,
        presence_penalty=0.0,
        frequency_penalty=0.5,
        stop=("\n", "END"),
        runner=RunnerOptions(num_ctx=1, num_gpu=9),
    )
    runner = RunnerSpec(
        backend="here",
        model="m:1",
        digest="d",
        shift=False,
        options=RunnerOptions(
            num_ctx=4096,
            num_batch=512,
            num_gpu=0,
            main_gpu=0,
            use_mmap=False,
            num_thread=8,
            draft_num_predict=0,
        ),
    )
    text = body_of(ChatRequest(messages=HI, shift=True), options, runner)
    assert text == (
        '{"model":"m:1","messages":[{"role":"user","content":"hi"}],"shift":false,"stream":true,"truncate":false,'
        '"options":{"num_keep":0,"seed":0,"num_predict":-1,"top_k":0,"top_p":0.0,"min_p":0.05,"typical_p":1.0,'
        '"repeat_last_n":64,"temperature":0.0,"repeat_penalty":1.1,"presence_penalty":0.0,"frequency_penalty":0.5,'
        '"stop":["\\n","END"],"num_ctx":4096,"num_batch":512,"num_gpu":0,"main_gpu":0,"use_mmap":false,'
        '"num_thread":8,"draft_num_predict":0}}'
    )
    named = {f.name for f in fields(Options)} - {"runner", "extra_json"} | {f.name for f in fields(RunnerOptions)}
    assert set(json.loads(text)["options"]) == named


@pytest.mark.parametrize("num_ctx", [None, 2048, 8192])
@pytest.mark.parametrize(
    "request_", [ChatRequest(messages=HI), GenerateRequest(prompt="p"), EmbedRequest(input=("a",))]
)
def test_every_item_of_a_group_asks_for_the_groups_context(
    request_: ChatRequest | GenerateRequest | EmbedRequest, num_ctx: int | None
) -> None:
    """Whatever an item asks for itself: one that differs would load the model anew, and so would one without."""
    runner = RunnerSpec(backend="here", model="m:1", digest="d", options=RunnerOptions(num_ctx=4096))
    options = Options(runner=RunnerOptions(num_ctx=num_ctx))
    assert json.loads(body_of(request_, options, runner))["options"] == {"num_ctx": 4096}
    # The backend's default is asked for by silence, also where an item asks for as much.
    assert "options" not in json.loads(body_of(request_, options, RUNNER))


def test_extra_options_pass_as_written() -> None:
    """Options that only Ollama knows arrive byte for byte; on a name given twice the typed value wins."""
    options = Options(temperature=0.5, extra_json='{"mirostat": 2, "big": 1e400, "temperature": 1, "num_ctx": 7}')
    runner = RunnerSpec(backend="here", model="m:1", digest="d", options=RunnerOptions(num_ctx=2048))
    text = body_of(GenerateRequest(prompt="p"), options, runner)
    assert text.endswith('"options":{"mirostat":2,"big":1e400,"temperature":0.5,"num_ctx":2048}}')


@pytest.mark.parametrize(
    ("request_", "options", "field"),
    [
        (ChatRequest(messages=HI, format=Format(json_schema="{")), Options(), "chat.format.json_schema"),
        (GenerateRequest(prompt="p", format=Format(json_schema="{} {}")), Options(), "generate.format.json_schema"),
        (
            ChatRequest(messages=HI, tools=(Tool(name="f", parameters_json="nope"),)),
            Options(),
            "chat.tools[0].parameters_json",
        ),
        (
            ChatRequest(
                messages=(
                    *HI,
                    Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="f", arguments_json='{"a":}'),)),
                )
            ),
            Options(),
            "chat.messages[1].tool_calls[0].arguments_json",
        ),
        (ChatRequest(messages=HI), Options(extra_json="[1]"), "options.extra_options_json"),
        (ChatRequest(messages=HI), Options(extra_json='{"a"'), "options.extra_options_json"),
    ],
)
def test_text_that_is_no_json_is_not_sent(request_: Any, options: Options, field: str) -> None:
    """What must be JSON and is none cannot break out of its place: it is refused, with the field's path."""
    with pytest.raises(InvalidRequestError) as caught:
        body_of(request_, options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_loading_and_unloading() -> None:
    """A load is an empty chat, or an empty embedding, with the runner's options and the only keep_alive."""
    runner = RunnerSpec(
        backend="here", model="m:1", digest="d", shift=False, options=RunnerOptions(num_ctx=8, use_mmap=True)
    )
    assert build_load(runner, keep_alive_s=300, as_embedding=False) == (
        "/api/chat",
        (
            b'{"model":"m:1","keep_alive":300,"messages":[],"stream":false,"shift":false,'
            b'"options":{"num_ctx":8,"use_mmap":true}}'
        ),
    )
    assert build_load(RUNNER, keep_alive_s=0.5, as_embedding=True) == (
        "/api/embed",
        b'{"model":"m:1","keep_alive":0.5}',
    )
    assert build_load(RUNNER, keep_alive_s=0, as_embedding=False)[1] == (
        b'{"model":"m:1","keep_alive":0,"messages":[],"stream":false}'
    )
