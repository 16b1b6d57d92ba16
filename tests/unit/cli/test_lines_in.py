"""Lines of a batch file become items, or say which line and field is wrong."""

# ruff: noqa: E501, ISC004  # tables of lines and what is said of them

import base64
import json
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.batchfile.line import Form
from unisono.edge.cli.lines_in import BadLine, GoodLine, LineReader
from unisono.edge.cli.source import Line

PICTURE = base64.b64encode(b"\x89PNG picture").decode()


def read(*lines: object) -> list[GoodLine | BadLine]:
    """Reads lines; those that are no bytes are written as JSON."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(LineReader().read(Line(number=number, text=text) for number, text in enumerate(texts, 1)))


def item(line: object) -> item_pb2.Item:
    """The one item of a line that must be good."""
    (found,) = read(line)
    assert isinstance(found, GoodLine), found
    return found.item


def refusal(line: object) -> str:
    """What is said of a line that must be bad."""
    (found,) = read(line)
    assert isinstance(found, BadLine), found
    return found.message


def openai(url: str = "/v1/chat/completions", **body: object) -> dict[str, object]:
    """An OpenAI batch line."""
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


def chat(**more: object) -> dict[str, object]:
    """A plain line with one message."""
    return {"messages": [{"role": "user", "content": "hi"}], **more}


def message(**fields: object) -> dict[str, object]:
    """A plain line whose one message has these fields."""
    return {"messages": [fields]}


# -- What is understood ----------------------------------------------------------------------------------------

GOLDEN = [
    ({"prompt": "hi"}, 'item_id: "line-1" generate { prompt: "hi" }'),
    ({"id": "x", "prompt": "hi"}, 'item_id: "x" generate { prompt: "hi" }'),
    ({"item_id": "x", "prompt": "hi", "model": "m"}, 'item_id: "x" model: "m" generate { prompt: "hi" }'),
    ({"custom_id": "x", "prompt": ["hi"]}, 'item_id: "x" generate { prompt: "hi" }'),
    ({"id": 17, "prompt": "hi", "system": None}, 'item_id: "17" generate { prompt: "hi" }'),
    (
        {"prompt": "p", "suffix": "s", "system": "y", "template": "t", "raw": True, "truncate": False, "shift": True},
        'item_id: "line-1" generate { prompt: "p" suffix: "s" system: "y" template: "t" raw: true'
        " truncate: false shift: true }",
    ),
    (
        {"prompt": "p", "images": [PICTURE], "format": "json", "think": "high"},
        'item_id: "line-1" generate { prompt: "p" images: "\\211PNG picture" format { json: true } think: THINK_HIGH }',
    ),
    ({"prompt": "p", "format": ""}, 'item_id: "line-1" generate { prompt: "p" }'),
    (chat(), 'item_id: "line-1" chat { messages { role: ROLE_USER content: "hi" } }'),
    (
        chat(system="be kind"),
        'item_id: "line-1" chat { messages { role: ROLE_SYSTEM content: "be kind" }'
        ' messages { role: ROLE_USER content: "hi" } }',
    ),
    (
        chat(think=False, format={"type": "object", "b": 1, "a": 1.50}),
        'item_id: "line-1" chat { messages { role: ROLE_USER content: "hi" } think: THINK_OFF'
        ' format { json_schema: \'{"type":"object","b":1,"a":1.5}\' } }',
    ),
    (
        {"input": "one", "dimensions": 3, "truncate": True, "encoding_format": "float"},
        'item_id: "line-1" embed { input: "one" dimensions: 3 truncate: true }',
    ),
    ({"input": ["one", "two"]}, 'item_id: "line-1" embed { input: "one" input: "two" }'),
    (
        chat(
            options={
                "num_keep": 1,
                "seed": -2,
                "num_predict": -1,
                "top_k": 3,
                "top_p": 0.5,
                "min_p": 0,
                "typical_p": 1,
                "repeat_last_n": 4,
                "temperature": 0,
                "repeat_penalty": 1.5,
                "presence_penalty": -1,
                "frequency_penalty": 2,
                "stop": ["a", "b"],
                "num_ctx": 512,
                "num_batch": 64,
                "num_gpu": -1,
                "main_gpu": 0,
                "use_mmap": False,
                "num_thread": 2,
                "draft_num_predict": 0,
            },
            extra_options={"mirostat": 1},
        ),
        'item_id: "line-1" chat { messages { role: ROLE_USER content: "hi" } } options { num_keep: 1 seed: -2'
        " num_predict: -1 top_k: 3 top_p: 0.5 min_p: 0 typical_p: 1 repeat_last_n: 4 temperature: 0"
        ' repeat_penalty: 1.5 presence_penalty: -1 frequency_penalty: 2 stop: "a" stop: "b"'
        " runner { num_ctx: 512 num_batch: 64 num_gpu: -1 main_gpu: 0 use_mmap: false num_thread: 2"
        " draft_num_predict: 0 } extra_options_json: '{\"mirostat\":1}' }",
    ),
    (
        openai(
            model="m",
            messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}],
            max_tokens=9,
            temperature=0.5,
            top_p=0.25,
            seed=7,
            stop="end",
            presence_penalty=1,
            frequency_penalty=-1,
            n=1,
            stream=False,
            logprobs=True,
            top_logprobs=2,
            reasoning_effort="low",
        ),
        'item_id: "a" model: "m" chat { messages { role: ROLE_SYSTEM content: "be kind" }'
        ' messages { role: ROLE_USER content: "hi" } think: THINK_LOW logprobs { top: 2 } }'
        ' options { num_predict: 9 temperature: 0.5 top_p: 0.25 seed: 7 stop: "end" presence_penalty: 1'
        " frequency_penalty: -1 }",
    ),
    (
        openai(messages=[{"role": "user", "content": "hi"}], max_completion_tokens=9, options={"top_k": 1}),
        'item_id: "a" chat { messages { role: ROLE_USER content: "hi" } } options { num_predict: 9 top_k: 1 }',
    ),
    (
        openai(
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "what is"},
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{PICTURE}", "detail": "low"},
                        },
                        {"type": "text", "text": "this?"},
                    ],
                }
            ],
            response_format={"type": "json_object"},
        ),
        'item_id: "a" chat { messages { role: ROLE_USER content: "what is\\nthis?" images: "\\211PNG picture" }'
        " format { json: true } }",
    ),
    (
        openai(
            messages=[{"role": "user", "content": "hi"}],
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"z": 1}, "strict": True}},
            tools=[
                {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": {}}}}
            ],
        ),
        'item_id: "a" chat { messages { role: ROLE_USER content: "hi" }'
        ' tools { name: "f" description: "d" parameters_json: \'{"z":1,"a":{}}\' }'
        " format { json_schema: '{\"z\":1}' } }",
    ),
    (
        openai(messages=[{"role": "user", "content": "hi"}], response_format={"type": "text"}),
        'item_id: "a" chat { messages { role: ROLE_USER content: "hi" } }',
    ),
    (
        openai(
            messages=[
                {"role": "user", "content": "weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "reasoning": "hm",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1.0}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "sunny"},
            ]
        ),
        'item_id: "a" chat { messages { role: ROLE_USER content: "weather?" } messages { role: ROLE_ASSISTANT'
        ' thinking: "hm" tool_calls { id: "c1" name: "f" arguments_json: \'{"b": 1.0}\' } }'
        ' messages { role: ROLE_TOOL content: "sunny" tool_name: "f" tool_call_id: "c1" } }',
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "look", "images": [PICTURE]},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1}}}],
                },
                {"role": "tool", "tool_name": "f", "content": "sunny"},
            ]
        },
        'item_id: "line-1" chat { messages { role: ROLE_USER content: "look" images: "\\211PNG picture" }'
        ' messages { role: ROLE_ASSISTANT tool_calls { name: "f" arguments_json: \'{"b":1}\' } }'
        ' messages { role: ROLE_TOOL content: "sunny" tool_name: "f" } }',
    ),
    (
        openai("/v1/completions", prompt="once", max_tokens=4, logprobs=3),
        'item_id: "a" generate { prompt: "once" logprobs { top: 3 } } options { num_predict: 4 }',
    ),
    (
        openai("/v1/responses", input="hi", instructions="be kind", max_output_tokens=4),
        'item_id: "a" chat { messages { role: ROLE_SYSTEM content: "be kind" }'
        ' messages { role: ROLE_USER content: "hi" } } options { num_predict: 4 }',
    ),
    (openai("/v1/embeddings", input=["x"], model="e"), 'item_id: "a" model: "e" embed { input: "x" }'),
]


@pytest.mark.parametrize(("line", "expected"), GOLDEN)
def test_each_form_is_read(line: object, expected: str) -> None:
    """OpenAI's fields and Ollama's mean what they say."""
    assert item(line) == text_format.Parse(expected, item_pb2.Item())


def test_whether_functions_may_be_called() -> None:
    """As OpenAI says it: any, or none."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert item(chat(tools=tools, tool_choice="auto", parallel_tool_calls=True)) == item(chat(tools=tools))
    assert item(chat(tools=tools, tool_choice="none")) == item(chat())
    assert item(chat(parallel_tool_calls=False)) == item(chat())


@pytest.mark.parametrize(("effort", "think"), [("minimal", "low"), ("xhigh", "max"), ("none", False)])
def test_levels_of_thinking_that_only_openai_has(effort: str, think: object) -> None:
    """The nearest that an Ollama has, as it chooses itself."""
    assert item(chat(reasoning_effort=effort)) == item(chat(think=think))


def test_null_says_nothing() -> None:
    """A null is as good as absent, also under a name that is not known."""
    assert item({**chat(), "think": None, "service_tier": None}) == item(chat())


def test_what_a_response_was_asked_for_is_kept() -> None:
    """Since it stands in the answer again; no other line's."""
    lines = (
        openai("/v1/responses", input="hi", user="u"),
        openai(messages=[{"role": "user", "content": "hi"}]) | {"custom_id": "b"},
        openai("/v1/responses"),
    )
    settings = [found.origin.settings for found in read(*lines)]
    assert settings == [{"user": "u"}, None, None]


def test_forms_and_places_are_kept() -> None:
    """Each line's result can be written in the line's own form; blank lines count as lines, not as items."""
    found = read({"prompt": "a"}, b"", openai(messages=[{"role": "user", "content": "x"}]), b" \t", {"input": "x"})
    assert [(each.origin.item_id, each.origin.position, each.origin.line, each.origin.form) for each in found] == [
        ("line-1", 0, 1, Form.PLAIN),
        ("a", 1, 3, Form.CHAT),
        ("line-5", 2, 5, Form.PLAIN),
    ]


def test_an_unreadable_line_is_answered_as_the_line_before() -> None:
    """In a file of OpenAI lines, what cannot be read fails in their form too."""
    found = read(openai("/v1/embeddings", input="x"), b"{", {"prompt": "x"}, b"{")
    assert [each.origin.form for each in found] == [Form.EMBEDDINGS, Form.EMBEDDINGS, Form.PLAIN, Form.PLAIN]


# -- What is refused -------------------------------------------------------------------------------------------

ROLES = "system, developer, user, assistant, tool"
REFUSED: list[tuple[Any, str]] = [
    # No JSON, or no object
    (b"{", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    (b'{"prompt": NaN}', "not JSON: NaN is no JSON number"),
    (b"\xff{}", "not UTF-8 (byte 1 of the line)"),
    (b"[" * 100_000, "not readable: nested too deeply"),
    (b"1" * 5000, "not readable: a number has too many digits"),
    ([], "must be a JSON object, not a list"),
    (7, "must be a JSON object, not a whole number"),
    (None, "must be a JSON object, not null"),
    # What a line is
    ({}, "has none of prompt, messages, input, and no body with a url"),
    ({"prompt": "x", "input": "y"}, "input: stands beside prompt; a line is one of them"),
    ({"prompt": "x", "unknown": 1}, "unknown: not known here"),
    ({"prompt": "x", "modell": "m"}, "modell: not known here; did you mean model?"),
    ({"prompt": "x", "max_token": 5}, "max_token: not known here; did you mean max_tokens?"),
    ({"prompt": "x", "tools": []}, "tools: not known here"),
    ({"input": "x", "temperature": 0}, "temperature: not known here"),
    ({"prompt": "x", "keep_alive": "5m"}, "keep_alive: belongs to the whole batch, not to a line"),
    # Ids
    ({"prompt": "x", "id": ""}, "id: is empty; leave it out to have the line's number for an id"),
    ({"prompt": "x", "id": 1.5}, "id: must be text, not a number"),
    ({"prompt": "x", "id": True}, "id: must be text, not a truth value"),
    ({"prompt": "x", "id": "a\nb"}, "id: must not hold control characters"),
    (b'{"prompt": "x", "id": "\\ud800"}', "id: must not hold control characters"),
    ({"prompt": "x", "id": "é" * 129}, "id: is longer than 256 bytes"),
    ({"prompt": "x", "id": "a", "custom_id": "b"}, "id: says again what custom_id says; write one of them"),
    # OpenAI's frame
    ({**openai(), "method": "GET"}, 'method: must be POST, not "GET"'),
    ({"custom_id": "a", "method": "POST", "body": {}}, "url: is missing; it must be one of /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses"),
    ({**openai(), "url": "/v1/images"}, 'url: must be one of /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, not "/v1/images"'),
    ({"custom_id": "a", "url": "/v1/completions"}, "body: is missing"),
    ({**openai(), "body": "x"}, "body: must be an object, not text"),
    ({**openai(messages=[]), "extra": 1}, "extra: not known here"),
    (openai(prompt="x"), "body.messages: is missing"),
    (openai(messages=[]), "body.messages: must hold at least one message"),
    (openai(messages=[{"role": "user", "content": "x"}], system="y"), "body.system: not known here"),
    (openai(messages=[{"role": "user", "content": "x"}], n=2), "body.n: must be 1: a line gives one answer"),
    (openai(messages=[{"role": "user", "content": "x"}], stream=True), "body.stream: must be false: a line gives its answer whole"),
    (openai(messages=[{"role": "user", "content": "x"}], voice="me"), "body.voice: not known here"),
    (openai("/v1/completions", prompt=["a", "b"]), "body.prompt: holds 2 prompts; write a line for each"),
    (openai("/v1/completions", prompt=""), "body.prompt: is empty"),
    (openai("/v1/embeddings", input=[]), "body.input: must hold at least one text"),
    (openai("/v1/embeddings", input=[[1, 2]]), "body.input[0]: must be text, not a list"),
    (openai("/v1/embeddings", input="x", encoding_format="base64"), "body.encoding_format: must be float"),
    # Messages
    (openai(messages=[{"role": "boss", "content": "x"}]), f'body.messages[0].role: must be one of {ROLES}, not "boss"'),
    (message(content="x"), f"messages[0].role: is missing; it must be one of {ROLES}"),
    (message(role=7, content="x"), "messages[0].role: must be text, not a whole number"),
    ({"messages": "hi"}, "messages: must be a list, not text"),
    ({"messages": ["hi"]}, "messages[0]: must be an object, not text"),
    (message(role="user"), "messages[0].content: is missing"),
    (message(role="user", content=7), "messages[0].content: must be text or a list of parts, not a whole number"),
    (message(role="user", content="x", name="me"), "messages[0].name: not known here"),
    (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "messages[0].content: holds half of a surrogate pair, which is not Unicode text"),
    (message(role="user", content=[{"type": "audio"}]), 'messages[0].content[0].type: must be text or image_url, not "audio"'),
    (message(role="user", content=[{"text": "x"}]), "messages[0].content[0].type: is missing; it must be text or image_url"),
    (message(role="user", content=[{"type": "text"}]), "messages[0].content[0].text: is missing"),
    (message(role="user", content=[{"type": "image_url"}]), "messages[0].content[0].image_url.url: is missing"),
    (
        message(role="user", content=[{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]),
        "messages[0].content[0].image_url.url: must be a data: URL (data:image/png;base64,…);"
        " pictures are not fetched from elsewhere",
    ),
    (
        message(role="user", content=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}]),
        "messages[0].content[0].image_url.url: is not base64",
    ),
    (message(role="user", content="x", images=["?"]), "messages[0].images[0]: is not base64"),
    (message(role="user", content="x", images=["é"]), "messages[0].images[0]: is not base64"),
    (message(role="user", content="x", images=[""]), "messages[0].images[0]: is empty; it must be the base64 text of a picture file"),
    (chat(images=[PICTURE]), "images: belongs inside the message that shows the pictures"),
    (message(role="assistant", tool_calls=[{}]), "messages[0].tool_calls[0].function.name: is missing"),
    (message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "messages[0].tool_calls[0].function.arguments: not JSON: Expecting property name enclosed in double quotes (column 2)"),
    (message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "[]"}}]), "messages[0].tool_calls[0].function.arguments: must be an object, not a list"),
    (message(role="assistant", tool_calls=[{"type": "x", "function": {"name": "f"}}]), 'messages[0].tool_calls[0].type: must be function, not "x"'),
    # Tools, formats, thinking, log probabilities
    (chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name: is missing"),
    (chat(tools=[{"type": "retrieval"}]), 'tools[0].type: must be function, not "retrieval"'),
    (chat(tools=[{"function": {"name": "f", "parameters": []}}]), "tools[0].function.parameters: must be a JSON schema, an object, not a list"),
    (chat(tools=[{"function": {"name": "f", "strict": True}}]), "tools[0].function.strict: must be false: arguments are not held to their schema"),
    (chat(format="yaml"), 'format: must be "json" or a JSON schema, not "yaml"'),
    (chat(response_format={"type": "xml"}), 'response_format.type: must be text, json_object or json_schema, not "xml"'),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema: must be a JSON schema, an object"),
    (chat(format="json", response_format={"type": "text"}), "response_format: says again what format says; write one of them"),
    (chat(think="a lot"), 'think: must be true, false, low, medium, high or max, not "a lot"'),
    (chat(think=1), "think: must be true, false, low, medium, high or max, not 1"),
    (chat(reasoning_effort="some"), 'reasoning_effort: must be one of none, minimal, low, medium, high, xhigh, max, not "some"'),
    (
        chat(tools=[{"function": {"name": "f"}}], tool_choice="required"),
        'tool_choice: must be auto or none, not "required": a model cannot be made to call',
    ),
    (
        chat(tools=[{"function": {"name": "f"}}], tool_choice={"type": "function", "function": {"name": "f"}}),
        "tool_choice: must be auto or none, not an object: a model cannot be made to call",
    ),
    (
        chat(tools=[{"function": {"name": "f"}}], parallel_tool_calls=False),
        "parallel_tool_calls: must be true: a model calls as many functions as it likes",
    ),
    (chat(think=True, reasoning_effort="low"), "reasoning_effort: says again what think says; write one of them"),
    (chat(top_logprobs=2), "top_logprobs: needs logprobs: true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs: must be from 0 to 20, not 21"),
    (chat(logprobs="yes"), 'logprobs: must be true, false, or a number from 0 to 20, not "yes"'),
    (chat(logprobs=2, top_logprobs=1), "top_logprobs: says again what the number in logprobs says; write one of them"),
    # Options
    (chat(options=[]), "options: must be an object, not a list"),
    (chat(options={"temprature": 0}), "options.temprature: not known here; did you mean temperature?"),
    (chat(options={"mirostat": 1}), "options.mirostat: not known here"),
    (chat(options={"temperature": "hot"}), 'options.temperature: must be a number, not "hot"'),
    (chat(options={"temperature": 1e39}), "options.temperature: is too large: 1e+39"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature: is too large: Infinity"),
    (chat(options={"num_predict": 2**31}), "options.num_predict: must be from -2,147,483,648 to 2,147,483,647, not 2147483648"),
    (chat(options={"num_ctx": -1}), "options.num_ctx: must be from 0 to 4,294,967,295, not -1"),
    (chat(options={"num_ctx": 1.5}), "options.num_ctx: must be a whole number, not 1.5"),
    (chat(options={"use_mmap": 1}), "options.use_mmap: must be true or false, not 1"),
    (chat(options={"stop": 7}), "options.stop: must be text or a list of texts, not a whole number"),
    (chat(max_tokens=5, options={"num_predict": 5}), "max_tokens: says again what is said elsewhere (num_predict); write one of them"),
    (chat(max_tokens=5, max_completion_tokens=5), "max_completion_tokens: says again what is said elsewhere (num_predict); write one of them"),
    (chat(stop="a", options={"stop": "b"}), "stop: says again what is said elsewhere (stop); write one of them"),
    (chat(extra_options=7), "extra_options: must be an object, not a whole number"),
    (chat(truncate="no"), 'truncate: must be true or false, not "no"'),
    ({"input": "x", "dimensions": 0}, "dimensions: must be from 1 to 65,536, not 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "problem"), REFUSED, ids=[f"{number}: {problem[:50]}" for number, (_, problem) in enumerate(REFUSED)]
)
def test_each_refusal_names_line_and_field(line: object, problem: str) -> None:
    """A wrong field is told with its line and its path."""
    assert refusal(line) == f"line 1: {problem}"


def test_a_line_that_is_too_long_is_refused() -> None:
    """It is told like any other mistake."""
    (found,) = LineReader().read([Line(number=3, text=None)])
    assert isinstance(found, BadLine)
    assert found.message == "line 3: is longer than 33,488,896 bytes"


def test_an_id_is_taken_once() -> None:
    """The second line of an id fails, under its line's number, and says where the first is."""
    first, second, third = read(
        {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}, openai("/v1/completions", prompt="z")
    )
    assert isinstance(first, GoodLine)
    assert isinstance(second, BadLine)
    assert second.origin.item_id == "line-2"
    assert second.message == 'line 2: id: "a" is the id of line 1 already'
    assert isinstance(third, BadLine)
    assert third.message == 'line 3: custom_id: "a" is the id of line 1 already'


def test_a_given_id_may_not_take_the_place_of_a_number() -> None:
    """A line without an id whose name another line has is refused, not given a second result of that name."""
    _, second = read({"id": "line-2", "prompt": "x"}, {"prompt": "y"})
    assert isinstance(second, BadLine)
    assert second.message == "line 2: has no id, and 'line-2' is the id of line 1 already"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["custom_id", "id", "method", "url", "body", "messages", "prompt", "input", "model", "options", "tools", "format",
     "response_format", "think", "images", "logprobs", "top_logprobs", "n", "stop", "max_tokens", "role", "content",
     "type", "image_url", "function", "name", "arguments", "tool_calls", "seed", "temperature", "extra_options"]
)  # fmt: skip
VALUES = st.sampled_from(
    ["POST", "/v1/chat/completions", "/v1/embeddings", "user", "function", "json_schema", "text"]
)
LIKELY = st.recursive(
    JSON | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=20,
)


@given(
    st.binary()
    | LIKELY.map(lambda value: json.dumps(value).encode())
    | st.text().map(lambda text: text.encode(errors="surrogatepass"))
)
def test_no_line_is_a_defect(line: bytes) -> None:
    """Whatever stands in a line, it becomes an item that can be sent, or is refused with its number."""
    for found in read(line):
        if isinstance(found, GoodLine):
            assert item_pb2.Item.FromString(found.item.SerializeToString()) is not None
        else:
            assert found.message.startswith("line 1: ")
            found.message.encode()


@given(st.dictionaries(NAMES, LIKELY, max_size=6))
def test_no_chat_is_a_defect(more: dict[str, object]) -> None:
    """The same, deeper inside a chat."""
    (found,) = read(json.dumps({**more, "messages": [more, {"role": "user", "content": "x", **more}]}).encode())
    assert isinstance(found, GoodLine | BadLine)


def test_fields_that_keep_openais_books_are_passed_over() -> None:
    """A genuine line may say who asks, or what to store: that changes no answer, so it costs the line nothing."""
    (plain,) = read(openai(messages=[{"role": "user", "content": "x"}]))
    (kept,) = read(openai(messages=[{"role": "user", "content": "x"}], user="me", metadata={"a": "b"}, store=True))
    assert isinstance(plain, GoodLine)
    assert isinstance(kept, GoodLine)
    assert kept.item == plain.item
