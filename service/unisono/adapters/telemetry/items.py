"""An item → the name and attributes of its span, by the GenAI conventions. No text of prompt or answer in them.

Source: https://github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai/gen-ai-spans.md. One span covers an
item with all its attempts, as these conventions ask of requests that are retried on their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from unisono.adapters.telemetry import content
from unisono.adapters.telemetry import conventions as names
from unisono.core.errors import UnisonoError
from unisono.core.model import ChatRequest, EmbedRequest, FinishReason, GenerateRequest, ItemState

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

    from unisono.core.events import Result
    from unisono.core.model import Completion, Item, Options

Attributes = dict[str, "AttributeValue"]


def tidy(value: float) -> float:
    """A measured figure with the digits that mean something: six."""
    return float(f"{value:.6g}")


def operation(item: Item) -> str:
    """What the item asks for, in the word of the conventions."""
    request = item.request
    match request:
        case ChatRequest():
            return names.CHAT
        case GenerateRequest():
            return names.TEXT_COMPLETION
        case EmbedRequest():
            return names.EMBEDDINGS
        case _:
            assert_never(request)


def request_attributes(item: Item, *, capture_content: bool) -> Attributes:
    """What is known of an item when it is sent: which it is, and what it asks of the model."""
    attributes: Attributes = {
        names.ITEM_ID: content.encodable(item.item_id),
        names.INDEX: item.index,
    }
    request = item.request
    if isinstance(request, EmbedRequest):
        if request.dimensions is not None:
            attributes[names.EMBEDDINGS_DIMENSION_COUNT] = request.dimensions
    else:
        attributes[names.REQUEST_STREAM] = True
        attributes[names.OUTPUT_TYPE] = "text" if request.format is None else "json"
        _add_options(attributes, item.options)
    if capture_content:
        attributes[names.INPUT_MESSAGES] = content.input_messages(item)
        instructions = content.system_instructions(item)
        if instructions is not None:
            attributes[names.SYSTEM_INSTRUCTIONS] = instructions
    return attributes


def _add_options(attributes: Attributes, options: Options) -> None:
    for name, value in (
        (names.REQUEST_TEMPERATURE, options.temperature),
        (names.REQUEST_TOP_P, options.top_p),
        (names.REQUEST_TOP_K, options.top_k),
        (names.REQUEST_SEED, options.seed),
        (names.REQUEST_FREQUENCY_PENALTY, options.frequency_penalty),
        (names.REQUEST_PRESENCE_PENALTY, options.presence_penalty),
    ):
        if value is not None:
            attributes[name] = value
    # Below zero Ollama means "without end", which is no number of tokens.
    if options.num_predict is not None and options.num_predict >= 0:
        attributes[names.REQUEST_MAX_TOKENS] = options.num_predict
    # Stop texts are the caller's settings, not the conversation; the conventions list them with the options.
    if options.stop:
        attributes[names.REQUEST_STOP_SEQUENCES] = tuple(content.encodable(text) for text in options.stop)


def result_attributes(result: Result, *, capture_content: bool) -> Attributes:
    """What is known of an item when it has ended."""
    attributes: Attributes = {
        names.STATE: result.state.value,
        names.ATTEMPTS: result.attempts,
        names.PASSES: result.passes,
        names.SHARED_WITH: result.shared_with,
    }
    if result.disturbed:
        attributes[names.DISTURBED] = result.disturbed
    if result.bundle_size > 1:
        attributes[names.BUNDLE_SIZE] = result.bundle_size
    if result.completion is not None:
        _add_completion(attributes, result.completion, capture_content=capture_content)
    if result.usage is not None:
        attributes[names.USAGE_INPUT_TOKENS] = result.usage.prompt_tokens
        attributes[names.USAGE_OUTPUT_TOKENS] = result.usage.completion_tokens
        if result.usage.cached_prompt_tokens is not None:
            attributes[names.USAGE_CACHE_READ_INPUT_TOKENS] = result.usage.cached_prompt_tokens
    if result.waited_s is not None:
        attributes[names.QUEUED_S] = tidy(result.waited_s)
    if result.timings is not None:
        for name, value in (
            (names.SLOT_WAIT_S, result.timings.slot_wait_s),
            (names.RESPONSE_TIME_TO_FIRST_CHUNK, result.timings.first_token_s),
        ):
            if value is not None:
                attributes[name] = tidy(value)
    reason = failure_of(result)
    if reason is not None:
        attributes[names.ERROR_TYPE] = reason
        if capture_content and result.error is not None:
            attributes[names.ERROR_MESSAGE] = content.encodable(result.error.message)
    return attributes


def _add_completion(attributes: Attributes, completion: Completion, *, capture_content: bool) -> None:
    if completion.model:
        attributes[names.RESPONSE_MODEL] = content.encodable(completion.model)
    # An embedding has no reason to finish.
    if completion.finish_reason is FinishReason.UNKNOWN and completion.finish_reason_raw:
        attributes[names.RESPONSE_FINISH_REASONS] = (content.encodable(completion.finish_reason_raw),)
    elif completion.finish_reason not in {FinishReason.UNKNOWN, FinishReason.EMBEDDED}:
        attributes[names.RESPONSE_FINISH_REASONS] = (completion.finish_reason.value,)
    if capture_content:
        attributes[names.OUTPUT_MESSAGES] = content.output_messages(completion)


def failure_of(result: Result) -> str | None:
    """The reason for which an item has no answer; None where it has one.

    Only ever a reason of core/errors.py: an error's message can quote the backend, and the backend the prompt.
    """
    if result.error is not None:
        return result.error.reason
    return None if result.state is ItemState.COMPLETED else UnisonoError.reason
