"""The table of llama.cpp's failures: each refusal, each message and each status is the error that it means."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.adapters import llama_wire
from unisono.adapters.llama_server.failures import LONGEST_MESSAGE, failure
from unisono.core.errors import (
    BackendBusyError,
    BackendFailedError,
    BackendUnavailableError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    NotAuthorizedError,
    PromptTooLongError,
    RefusedByBackendError,
    UnisonoError,
)

RECORDED: dict[str, type[UnisonoError]] = {
    "error_context": PromptTooLongError,
    "error_embedding_empty": RefusedByBackendError,
    "error_embedding_length": PromptTooLongError,
    "error_embeddings": ModelLacksCapabilityError,
    "error_image": ModelLacksCapabilityError,
    "error_infill": ModelLacksCapabilityError,
    "error_json": RefusedByBackendError,
    "error_key": NotAuthorizedError,
    "error_loading": BackendBusyError,
    "error_option_range": RefusedByBackendError,
    "error_path": RefusedByBackendError,
    "error_schema": RefusedByBackendError,
    "error_two_assistants": RefusedByBackendError,
    "error_type": RefusedByBackendError,
}


@pytest.mark.parametrize("name", sorted(llama_wire.REFUSALS))
def test_recorded_refusals(name: str) -> None:
    """Each is known for what it is, whatever its status, and keeps the server's words."""
    body = llama_wire.body(name)
    error = failure(llama_wire.REFUSALS[name], body, backend="here", model="m")
    assert type(error) is RECORDED[name]
    said = json.loads(body)["error"]["message"]
    assert error.message == f"backend here: {said.strip()}"
    assert error.metadata["backend"] == "here"
    assert error.metadata["model"] == "m"
    assert error.metadata["http_status"] == str(llama_wire.REFUSALS[name])


def test_no_recording_is_forgotten() -> None:
    """Every recorded refusal is in the table above."""
    recorded = {path.stem for path in llama_wire.FOLDER.glob("error_*.json")}
    assert recorded == set(RECORDED) == set(llama_wire.REFUSALS)


def test_a_prompt_that_is_too_long_tells_by_how_much() -> None:
    """The tokens of the prompt and of the context come with the error, as the server counted them."""
    error = failure(400, llama_wire.body("error_context"), backend="here", model="m")
    assert (error.metadata["n_prompt_tokens"], error.metadata["n_ctx"]) == ("3031", "2048")


def test_a_refusal_inside_a_stream() -> None:
    """Inside a 200 there is no status to tell."""
    error = failure(200, b"error: " + llama_wire.body("error_schema"), backend="here", model="m")
    assert type(error) is RefusedByBackendError
    assert "http_status" not in error.metadata


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, RefusedByBackendError),
        (400, RefusedByBackendError),
        (401, NotAuthorizedError),
        (403, NotAuthorizedError),
        (404, RefusedByBackendError),
        (408, BackendBusyError),
        (413, RefusedByBackendError),
        (429, BackendBusyError),
        (500, BackendFailedError),
        (501, ModelLacksCapabilityError),
        (502, BackendUnavailableError),
        (503, BackendBusyError),
        (504, BackendUnavailableError),
        (200, BackendFailedError),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html><h1>Nope</h1></html>", b'{"error":"nope"}', b'{"error":null}', b"[]"])
def test_statuses_without_a_known_message(status: int, kind: type[UnisonoError], body: bytes) -> None:
    """Where the words tell nothing, the status decides; a caller's mistake is never worth a retry."""
    assert type(failure(status, body, backend="here", model="m")) is kind


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("model 'x' not found", ModelNotFoundError),
        ("audio input is not supported - hint: if this is unexpected", ModelLacksCapabilityError),
        ("Failed to initialize samplers: failed to parse grammar", RefusedByBackendError),
        ("[json.exception.type_error.302] type must be number, but is string", RefusedByBackendError),
        ("Compute error.", BackendFailedError),
    ],
)
def test_messages_from_the_source(message: str, kind: type[UnisonoError]) -> None:
    """Messages that were read in llama.cpp's source, with the type that says the least."""
    body = json.dumps({"error": {"code": 500, "message": message, "type": "server_error"}}).encode()
    assert type(failure(500, body, backend="here", model="m")) is kind


def test_messages_are_short() -> None:
    """One line, cut where it is long: a server's dump is not passed on."""
    body = json.dumps({"error": {"message": "x" * 9_000 + "\nsecret"}}).encode()
    error = failure(500, body, backend="here", model="m")
    assert len(error.message) <= LONGEST_MESSAGE + len("backend here: ")
    assert "secret" not in error.message


@given(st.sampled_from([200, 302, 400, 404, 500, 503, 599]), st.binary(max_size=100))
def test_any_body(status: int, body: bytes) -> None:
    """Whatever a server or a proxy says, it is an error of this house that names the backend."""
    error = failure(status, body, backend="here", model="m")
    assert error.message.startswith("backend here: ")
