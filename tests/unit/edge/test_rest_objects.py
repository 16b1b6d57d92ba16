"""OpenAI's batch object from a batch of a file, and the kept batch that it became."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from unisono.core.batch import BatchConfig
from unisono.core.durable import StoredBatch, Tally
from unisono.core.events import BatchState
from unisono.core.files import FileBatch, FileBatchState, LineError, StoredFile
from unisono.edge.rest.errors import type_of
from unisono.edge.rest.objects import batch_object, file_object, list_object, status_of

S = 1_000_000_000
OPEN = FileBatch(
    batch_id="batch_1",
    input_file_id="file-1",
    endpoint="/v1/embeddings",
    window="24h",
    expires_ns=100 * S,
    created_ns=10 * S,
    metadata={"job": "night"},
)
RUNNING = StoredBatch(
    batch_id="batch_1",
    config=BatchConfig(),
    fingerprint=b"",
    parent_id="",
    metadata={},
    method="",
    carrier={},
    created_ns=20 * S,
    deadline_ns=None,
    started_ns=25 * S,
    ended_ns=None,
    keep_until_ns=None,
    state=BatchState.RUNNING,
    is_cancelling=False,
    is_input_closed=True,
    tally=Tally(items=9, completed=4, failed=2, prompt_tokens=70, completion_tokens=30),
    restarts=0,
    last_sequence=7,
)
ENDED = replace(RUNNING, state=BatchState.COMPLETED, ended_ns=30 * S)
MOMENTS = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)


def moments(value: dict[str, Any]) -> dict[str, int]:
    """Those that are there."""
    return {name: value[name] for name in MOMENTS if value[name] is not None}


@pytest.mark.parametrize(
    ("batch", "stored", "status", "times"),
    [
        (OPEN, None, "validating", {}),
        (OPEN, RUNNING, "in_progress", {"in_progress_at": 20}),
        (OPEN, ENDED, "finalizing", {"in_progress_at": 20, "finalizing_at": 30}),
        (replace(OPEN, cancelling_ns=22 * S), None, "cancelling", {"cancelling_at": 22}),
        (
            replace(OPEN, cancelling_ns=22 * S),
            RUNNING,
            "cancelling",
            {"in_progress_at": 20, "cancelling_at": 22},
        ),
        # By gRPC, of which nobody told the batch of the file.
        (OPEN, replace(RUNNING, is_cancelling=True), "cancelling", {"in_progress_at": 20}),
        (
            OPEN,
            replace(ENDED, state=BatchState.CANCELLED),
            "cancelling",
            {"in_progress_at": 20, "cancelling_at": 30},
        ),
        (
            replace(OPEN, state=FileBatchState.FAILED, ended_ns=40 * S),
            None,
            "failed",
            {"failed_at": 40},
        ),
        *(
            (
                replace(OPEN, state=state, in_progress_ns=20 * S, finalizing_ns=30 * S, ended_ns=40 * S),
                None,
                state.value,
                {"in_progress_at": 20, "finalizing_at": 30, f"{state.value}_at": 40},
            )
            for state in (FileBatchState.COMPLETED, FileBatchState.EXPIRED)
        ),
        (
            replace(
                OPEN,
                state=FileBatchState.CANCELLED,
                cancelling_ns=22 * S,
                in_progress_ns=20 * S,
                finalizing_ns=30 * S,
                ended_ns=40 * S,
            ),
            None,
            "cancelled",
            {"in_progress_at": 20, "cancelling_at": 22, "cancelled_at": 40},
        ),
    ],
)
def test_how_a_batch_stands(batch: FileBatch, stored: StoredBatch | None, status: str, times: dict[str, int]) -> None:
    """Its status, and the moments that it has come through; the others are null."""
    value = batch_object(batch, stored)
    assert (value["status"], status_of(batch, stored)) == (status, status)
    assert moments(value) == {"created_at": 10, "expires_at": 100} | times


def test_counts_and_tokens() -> None:
    """Of the kept batch while it is there, and of the batch's own end afterwards; zeros before both."""
    empty = batch_object(OPEN, None)
    assert empty["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    running = batch_object(OPEN, RUNNING)
    assert running["request_counts"] == {"total": 9, "completed": 4, "failed": 2}
    over = batch_object(
        replace(OPEN, state=FileBatchState.COMPLETED, ended_ns=1, tally=RUNNING.tally, cached_tokens=40), None
    )
    assert over["request_counts"] == running["request_counts"]
    assert over["usage"] == {
        "input_tokens": 70,
        "input_tokens_details": {"cached_tokens": 40},
        "output_tokens": 30,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 100,
    }


def test_errors_and_metadata() -> None:
    """A list of errors, each with all of its fields; null where there are none."""
    wrong = LineError(code="empty_file", message="The file has no requests.")
    value = batch_object(replace(OPEN, state=FileBatchState.FAILED, ended_ns=1, errors=(wrong,)), None)
    assert value["errors"] == {
        "object": "list",
        "data": [{"code": "empty_file", "message": "The file has no requests.", "param": None, "line": None}],
    }
    assert value["metadata"] == {"job": "night"}
    assert batch_object(replace(OPEN, metadata={}), None)["metadata"] is None
    assert batch_object(OPEN, None)["errors"] is None


def test_a_file_and_a_list() -> None:
    """As OpenAI writes them."""
    file = StoredFile(
        file_id="file-1", purpose="batch", filename="a.jsonl", size_bytes=7, created_ns=S, expires_ns=None
    )
    value = file_object(file)
    assert (value["id"], value["bytes"], value["created_at"], value["expires_at"]) == ("file-1", 7, 1, None)
    listed = list_object([value, value | {"id": "file-2"}], has_more=True)
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("file-1", "file-2", True)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_kinds_of_errors(status: int, kind: str) -> None:
    """By their status."""
    assert type_of(status) == kind
