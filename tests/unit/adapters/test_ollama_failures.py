"""The table of Ollama's failures: each message, of whatever status, is the error that it means."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.adapters.ollama.failures import LONGEST_MESSAGE, failure
from unisono.core.errors import (
    BackendBusyError,
    BackendFailedError,
    BackendUnavailableError,
    LoadFailedError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    NotAuthorizedError,
    OutOfMemoryError,
    PromptTooLongError,
    RefusedByBackendError,
    RunnerDiedError,
    UnisonoError,
)

# Read from the source of Ollama 0.32.15, beside what was recorded (test_ollama_wire.py).
MESSAGES: list[tuple[int, str, type[UnisonoError]]] = [
    (400, "the input length exceeds the context length", PromptTooLongError),
    (400, "input after truncation exceeds maximum context length", PromptTooLongError),
    (
        400,
        (
            "the prompt is longer than the context length currently available to the model; shorten the prompt,"
            " adjust the context length in settings, or use a model with a longer context length"
        ),
        PromptTooLongError,
    ),
    (404, 'model "x" not found, try pulling it first', ModelNotFoundError),
    (400, '"x" does not support generate', ModelLacksCapabilityError),
    (400, "registry.ollama.ai/library/x:latest does not support insert", ModelLacksCapabilityError),
    (400, "registry.ollama.ai/library/x:latest does not support completion", ModelLacksCapabilityError),
    (400, "this model only supports one image while more than one image requested", ModelLacksCapabilityError),
    (400, "image generation models are not currently supported", ModelLacksCapabilityError),
    (500, "no slots available after 10 retries", BackendBusyError),
    (503, "Loading model", BackendBusyError),
    (500, 'option "stop" must be of an array of strings', RefusedByBackendError),
    (500, 'option "use_mmap" must be of type boolean', RefusedByBackendError),
    (
        400,
        'invalid think value: "very" (must be "high", "medium", "low", "max", true, or false)',
        RefusedByBackendError,
    ),
    (400, "top_logprobs must be between 0 and 20", RefusedByBackendError),
    (400, "raw mode does not support template, system, or context", RefusedByBackendError),
    (400, "model is required", RefusedByBackendError),
    (500, "template: :1: unexpected unclosed action in command", RefusedByBackendError),
    (400, "Failed to initialize samplers: failed to parse grammar", RefusedByBackendError),
    (400, "json: cannot unmarshal string into Go struct field ChatRequest.messages", RefusedByBackendError),
    (400, "this server cannot run this remote model", RefusedByBackendError),
    (403, "remote inference is unavailable", NotAuthorizedError),
    (401, "unauthorized", NotAuthorizedError),
    (500, "model requires more system memory (9.1 GiB) than is available (3.2 GiB)", LoadFailedError),
    (500, "llama-server reported out-of-memory during startup: cudaMalloc failed: out of memory", LoadFailedError),
    (500, "unable to load full model on GPU", LoadFailedError),
    (500, "CUDA error: out of memory", OutOfMemoryError),
    (200, "compute failed: ggml: failed to allocate buffer", OutOfMemoryError),
    (500, "llama-server process has terminated: exit status 1: error loading model: bad tensor", LoadFailedError),
    (500, "timed out waiting for llama-server to start - ", LoadFailedError),
    (500, "error starting llama-server: fork/exec: no such file", LoadFailedError),
    (500, "llama-server binary not found (checked: /usr/lib/ollama)", LoadFailedError),
    (
        500,
        (
            "bad magic: this model may be incompatible with your version of Ollama. If you previously pulled this"
            " model, try updating it by running `ollama pull x`"
        ),
        LoadFailedError,
    ),
    (200, "an error was encountered while running the model: CUDA error: illegal access", RunnerDiedError),
    (
        500,
        (
            "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error,"
            " check ollama server logs for details"
        ),
        RunnerDiedError,
    ),
    (500, "llama-server process no longer running: exit status 2 GGML_ASSERT", RunnerDiedError),
    (500, "server not responding", RunnerDiedError),
    (500, "connection refused", RunnerDiedError),
    (500, "unexpected server status: llm server error", RunnerDiedError),
    (500, 'health resp: Get "http://127.0.0.1:40001/health": EOF', RunnerDiedError),
    (400, 'do embedding request: Post "http://127.0.0.1:40001/v1/embeddings": EOF', RunnerDiedError),
    (200, "error reading llama-server response: unexpected EOF", RunnerDiedError),
    (500, 'Post "http://127.0.0.1:40001/tokenize": EOF', RunnerDiedError),
    (400, "embedding contains NaN or Inf values", BackendFailedError),
    (
        200,
        'llama-server returned invalid tool call arguments for "f": unexpected end of JSON input',
        BackendFailedError,
    ),
    (499, "request canceled", BackendFailedError),
    (500, "something nobody has heard of", BackendFailedError),
    (200, "something nobody has heard of", BackendFailedError),
    (400, "something nobody has heard of", RefusedByBackendError),
    (413, "request entity too large", RefusedByBackendError),
    (301, "", RefusedByBackendError),
    (429, "slow down", BackendBusyError),
    (503, "account unavailable", BackendUnavailableError),
    (502, "connection refused", BackendUnavailableError),
    (504, "", BackendUnavailableError),
    (501, "", ModelLacksCapabilityError),
]


@pytest.mark.parametrize(("status", "message", "kind"), MESSAGES)
def test_messages(status: int, message: str, kind: type[UnisonoError]) -> None:
    """A message is understood as Ollama's JSON, as OpenAI's, as llama.cpp's inside Ollama's, and as bare text."""
    nested = json.dumps({"error": {"code": status, "message": message, "type": "server_error"}})
    for body in (json.dumps({"error": message}), nested, json.dumps({"error": nested}), message):
        error = failure(status, body.encode(), backend="here", model="x")
        assert type(error) is kind, body
        assert error.metadata["backend"] == "here"
        assert error.message.startswith("backend here")


@pytest.mark.parametrize(
    "message", ["something nobody has heard of", "llama-server process no longer running: exit status 1 "]
)
def test_an_unknown_failure_of_a_load_is_a_failed_load(message: str) -> None:
    """What goes wrong while a model is being loaded is a failed load; what is known to be else stays so."""
    body = json.dumps({"error": message}).encode()
    assert type(failure(500, body, backend="here", model="x", is_loading=True)) is LoadFailedError
    missing = json.dumps({"error": "model 'x' not found"}).encode()
    assert type(failure(404, missing, backend="here", model="x", is_loading=True)) is ModelNotFoundError


def test_the_last_words_of_a_runner_are_not_believed() -> None:
    """What a dead runner said before, to other requests too, is no reason to blame this one, and is not passed on.

    Seen with Ollama 0.32.15: the runner was killed, and the message held two errors of requests long answered.
    """
    message = (
        "an error was encountered while running the model: error: task id = 9, error: request (4010 tokens) exceeds"
        " the available context size (2048 tokens), try increasing it\nerror: at 2(8): failed to compile JSON schema"
    )
    error = failure(500, json.dumps({"error": message}).encode(), backend="here", model="x")
    assert type(error) is RunnerDiedError
    assert error.message == "backend here: an error was encountered while running the model"
    inner = json.dumps({"error": {"message": "bad sampler", "code": 400}})
    appended = json.dumps({"error": f"{inner}\ncudaMalloc failed: out of memory"})
    refused = failure(400, appended.encode(), backend="here", model="x")
    assert type(refused) is RefusedByBackendError
    assert refused.message == "backend here: bad sampler"


def test_a_proxys_page_is_not_taken_for_ollama() -> None:
    """An HTML page of a proxy is an unavailable backend; its text is cut."""
    page = b"<html><body><h1>502 Bad Gateway</h1>" + b"nginx " * 1000 + b"</body></html>"
    error = failure(502, page, backend="here", model="x", retry_after_s=3.0)
    assert type(error) is BackendUnavailableError
    assert len(error.message) < LONGEST_MESSAGE + 100
    assert error.retry_after_s == 3.0


def test_numbers_of_a_long_prompt_in_another_wording() -> None:
    """The native chat passes llama.cpp's error on as Go prints it; the numbers are found there too."""
    message = (
        "llama-server chat error: map[code:400 message:request (3010 tokens) exceeds the available context size"
        " (512 tokens), try increasing it n_ctx:512 n_prompt_tokens:3010 type:exceed_context_size_error]"
    )
    error = failure(200, json.dumps({"error": message}).encode(), backend="here", model="x")
    assert type(error) is PromptTooLongError
    assert {error.metadata["n_ctx"], error.metadata["n_prompt_tokens"]} == {"512", "3010"}


def test_a_name_that_cannot_be_one_is_not_recommended() -> None:
    """Nobody is told to pull a model whose name no model can have."""
    error = failure(400, b'{"error":"invalid model name"}', backend="here", model="bad name!!")
    assert type(error) is ModelNotFoundError
    assert "pull" not in error.message


@given(st.integers(200, 599), st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_anything_is_some_failure(status: int, body: bytes) -> None:
    """No status and no body, readable or not, is beyond the table."""
    assert isinstance(failure(status, body, backend="here", model="x"), UnisonoError)
    assert isinstance(failure(status, b'{"error":' + body + b"}", backend="here", model="x"), UnisonoError)
