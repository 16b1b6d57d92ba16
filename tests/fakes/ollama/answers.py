"""What the stand-in's models say: a tokenizer and deterministic answers.

All of it is invented for the tests. A token is a word with the white space before it. Unless an `Answer` was
given for the prompt, rules in the prompt's text decide (the last of a kind counts):

| rule                    | what it does                                                               |
|-------------------------|----------------------------------------------------------------------------|
| `[[tokens=37]]`         | 37 tokens, then the model ends by itself (`stop`)                          |
| `[[say=TEXT]]`          | says TEXT, then ends by itself                                             |
| `[[think=TEXT]]`        | a thinking model thinks TEXT first                                         |
| `[[tool=NAME {json}]]`  | calls a tool, where the request offers tools (may stand several times)     |
| `[[repeat=WORD]]`       | says WORD without end (real Ollama cuts after 30 equal tokens, without done) |
| `[[crash]]`, `[[crash=5]]` | the runner dies before the first, or after five tokens                  |

Without a rule an answer is a sequence of words that follows from the prompt and the seed: `num_predict` long
where the request sets it, otherwise 5 to 20 tokens and an end by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from tests.fakes.ollama.wire import dumps

_TOKEN = re.compile(r"\s*\S+|\s+\Z")
_RULE = re.compile(r"\[\[(tokens|say|think|tool|repeat|crash)(?:=(.*?))?\]\]", re.DOTALL)
_WORDS = [
    "the",
    "sea",
    "holds",
    "one",
    "quiet",
    "light",
    "above",
    "an",
    "old",
    "stone",
    "bridge",
    "while",
    "many",
    "small",
    "birds",
    "turn",
    "slowly",
    "over",
    "green",
    "water",
    "and",
    "people",
    "walk",
    "home",
    "along",
    "narrow",
    "streets",
    "with",
    "bread",
    "under",
    "their",
    "arms",
    "as",
    "evening",
    "comes",
    "near",
]

# Ollama bounds an open-ended answer by ten contexts (llm/llama_server.go, boundedNumPredict()).
_CONTEXTS_OF_ANSWER = 10
_NATURAL_MIN, _NATURAL_SPAN = 5, 16

MARK, THINKING, CONTENT, TOOL, TOOL_END = "m", "t", "c", "f", "F"


def tokenize(text: str) -> list[str]:
    """The tokens of a text; joined they are the text again."""
    return _TOKEN.findall(text)


def token_id(token: str) -> int:
    """A number for a token, as `context` of /api/generate holds them."""
    return crc32(token.encode()) % 49_152


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model shall say to a certain prompt; a tuple gives the tokens themselves."""

    content: str | tuple[str, ...] = ""
    thinking: str | tuple[str, ...] = ""
    tool_calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # (name, arguments)
    tool_tokens: int | None = None  # how many tokens each tool call costs; default: its words
    ends: bool = True  # False: goes on with words until num_predict
    crash_after: int | None = None  # the runner dies after so many tokens


@dataclass(slots=True)
class Script:
    """An answer laid out token by token."""

    tokens: list[str]
    kinds: str  # one letter for each token: MARK, THINKING, CONTENT, TOOL or TOOL_END
    stops: bool  # True: one more pass for the end token, done_reason "stop"; False: "length"
    tool_calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    crash_after: int | None = None


def words_of(seed: int, count: int) -> list[str]:
    """`count` words that follow from a number."""
    words: list[str] = []
    state = seed & 0x7FFFFFFF
    size = len(_WORDS)
    for place in range(count):
        state = (state * 1_103_515_245 + 12_345) & 0x7FFFFFFF
        word = _WORDS[(state >> 12) % size]
        words.append(f" {word}" if place else word.capitalize())
    return words


def write_script(
    prompt: str,
    *,
    answer: Answer | None,
    num_predict: int,
    num_ctx: int,
    seed: int,
    stop: Sequence[str],
    thinks: bool,
    tools: bool,
    json_format: Mapping[str, Any] | str | None,
) -> Script:
    """Lay out the answer to a prompt.

    `num_predict` of 0 or less is no limit: a real server, asked for 0 tokens, writes until the end.
    """
    limit = _CONTEXTS_OF_ANSWER * num_ctx
    if 0 < num_predict < limit:
        limit = num_predict
    number = crc32(prompt.encode()) ^ max(seed, 0)
    natural = _NATURAL_MIN + number % _NATURAL_SPAN
    if answer is None:
        answer = _by_rules(prompt, natural if num_predict <= 0 else None, number, json_format)

    tokens: list[str] = []
    kinds = ""
    if thinks:
        thinking = answer.thinking or tuple(words_of(number + 1, 3))
        thoughts = list(thinking) if isinstance(thinking, tuple) else tokenize(thinking)
        # The opening and closing tags are tokens that the server's parser swallows (seen on a real server:
        # six tokens of thinking and the end make an eval_count of 8).
        tokens += ["<think>", *thoughts]
        kinds += MARK + THINKING * len(thoughts)
        if answer.content or answer.tool_calls or not answer.ends:
            tokens.append("</think>")
            kinds += MARK
    if tools and answer.tool_calls:
        for name, arguments in answer.tool_calls:
            call = tokenize(f"<tool_call> {dumps({'name': name, 'arguments': arguments})} </tool_call>")
            if answer.tool_tokens is not None:
                call = (call + [""] * answer.tool_tokens)[: answer.tool_tokens]
            tokens += call
            kinds += TOOL * (len(call) - 1) + TOOL_END
    content = list(answer.content) if isinstance(answer.content, tuple) else tokenize(answer.content)
    tokens += content
    stops = answer.ends
    if not stops and len(tokens) < limit:
        tokens += words_of(number, limit - len(tokens))
    kinds += CONTENT * (len(tokens) - len(kinds))
    if stop:
        tokens, kinds, stops = _cut_at_stop(tokens, kinds, stop, stops=stops)
    if len(tokens) >= limit:
        # The limit is met with the last token itself: no pass for an end token follows.
        tokens, kinds, stops = tokens[:limit], kinds[:limit], False
    return Script(tokens, kinds, stops, answer.tool_calls if tools else (), answer.crash_after)


def _by_rules(prompt: str, natural: int | None, number: int, json_format: Mapping[str, Any] | str | None) -> Answer:
    rules: dict[str, str | None] = {}
    calls: list[tuple[str, Mapping[str, Any]]] = []
    if "[[" in prompt:
        for kind, value in _RULE.findall(prompt):
            rules[kind] = value
            if kind == "tool":
                name, _, arguments = value.partition(" ")
                calls.append((name, json.loads(arguments or "{}")))
    thinking = rules.get("think") or ""
    crash_after = int(rules["crash"] or 0) if "crash" in rules else None
    content: str | tuple[str, ...] = ""
    ends = True
    if calls:
        pass
    elif "say" in rules:
        content = rules["say"] or ""
    elif "repeat" in rules:
        content = tuple([" " + (rules["repeat"] or "again")] * 4096)
    elif json_format is not None:
        content = dumps(_instance(json_format, number))
    elif "tokens" in rules:
        content = tuple(words_of(number, int(rules["tokens"] or 0)))
    elif natural is not None:
        content = tuple(words_of(number, natural))
    else:
        ends = False
    return Answer(content=content, thinking=thinking, tool_calls=tuple(calls), ends=ends, crash_after=crash_after)


def _cut_at_stop(tokens: list[str], kinds: str, stop: Sequence[str], *, stops: bool) -> tuple[list[str], str, bool]:
    """Cut before the first stop string; the token that completes it takes the place of the end token."""
    text = "".join(tokens)
    places = [place for place in (text.find(word) for word in stop if word) if place >= 0]
    if not places:
        return tokens, kinds, stops
    left, kept = min(places), []
    for token in tokens:
        if left <= 0:
            break
        kept.append(token[:left])
        left -= len(token)
    return kept, kinds[: len(kept)], True


def _instance(schema: Mapping[str, Any] | str, number: int) -> Any:
    """A small value that fits a JSON schema (or any object, for "json")."""
    if isinstance(schema, str):
        return {"answer": " ".join(word.strip() for word in words_of(number, 3))}
    if "enum" in schema:
        return schema["enum"][number % len(schema["enum"])]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            return {name: _instance(part, number) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [_instance(schema.get("items", {}), number)] * max(1, int(schema.get("minItems", 1)))
        case "integer":
            return number % 100
        case "number":
            return (number % 1000) / 10
        case "boolean":
            return bool(number % 2)
        case "null":
            return None
        case _:
            return words_of(number, 1)[0]
