"""Every error has a status, with details that programs can rely on and that fit into a call's trailers."""

from __future__ import annotations

from typing import TypeVar

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from unisono.core import errors
from unisono.core.errors import InvalidRequestError, UnisonoError, Violation
from unisono.edge.status import DOMAIN, LEAST_BYTES, TABLE, TRAILER_BYTES, cut, row_of, to_status, utf8

Detail = TypeVar("Detail", bound=Message)

# The codes whose numbers HTTP has words for: no status of ours is a success.
HTTP_ERRORS = range(400, 600)


def children(kind: type[UnisonoError]) -> list[type[UnisonoError]]:
    """What stands below a class in the house's tree; an adapter may have some of its own, which never travel."""
    return [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]


def tree(kind: type[UnisonoError]) -> list[type[UnisonoError]]:
    """A class and all below it."""
    return [kind, *(below for child in children(kind) for below in tree(child))]


EVERY = tree(UnisonoError)
LEAVES = [kind for kind in EVERY if not children(kind)]
PARENTS = [kind for kind in EVERY if children(kind)]


def details(status: status_pb2.Status, kind: type[Detail]) -> list[Detail]:
    """The details of one kind."""
    found = []
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


def only(status: status_pb2.Status, kind: type[Detail]) -> Detail:
    """The one detail of a kind."""
    (detail,) = details(status, kind)
    return detail


def percent_encoded(text: str) -> int:
    """Bytes of a message in the header `grpc-message`."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


# -- The table -------------------------------------------------------------------------------------------------


def test_every_class_has_a_row_and_every_row_a_class() -> None:
    """No error can be raised that the table does not know, and the table knows no more."""
    assert set(TABLE) == {UnisonoError, *LEAVES}


@pytest.mark.parametrize("kind", PARENTS)
def test_what_only_groups_errors_has_no_reason_and_is_a_defect(kind: type[UnisonoError]) -> None:
    """A class that stands above others is never raised; if it were, it would not pass as something else."""
    assert kind.reason == "INTERNAL"
    assert row_of(kind("raised by mistake")) is TABLE[UnisonoError]


def test_reasons_are_unique() -> None:
    """A reason names one class."""
    reasons = [kind.reason for kind in LEAVES]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("kind", LEAVES)
def test_a_status_says_what_its_class_says(kind: type[UnisonoError]) -> None:
    """Code, message and exactly one ErrorInfo; `grpcio-status` takes it as it is."""
    status = to_status(kind("what happened", metadata={"model": "m"}))
    assert status.code == TABLE[kind].code.value[0]
    assert TABLE[kind].http in HTTP_ERRORS
    info = only(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == (kind.reason, DOMAIN, {"model": "m"})
    assert status.message == "what happened"
    assert rpc_status.to_status(status).code is TABLE[kind].code


def test_a_class_made_elsewhere_has_the_row_of_the_nearest_above() -> None:
    """A subclass in an adapter or a test is what its parent is."""

    class Sharper(errors.ModelNotFoundError):
        pass

    assert row_of(Sharper("gone")) is TABLE[errors.ModelNotFoundError]


# -- Details ---------------------------------------------------------------------------------------------------


def test_violations_become_a_bad_request_with_the_prefix() -> None:
    """Each field is named from the request's top."""
    wrong = [Violation(field="item_id", description="is required"), Violation(field="model", description="is long")]
    status = to_status(InvalidRequestError("two fields", violations=wrong), "items[3].")
    found = only(status, error_details_pb2.BadRequest).field_violations
    assert [(one.field, one.description) for one in found] == [
        ("items[3].item_id", "is required"),
        ("items[3].model", "is long"),
    ]


@pytest.mark.parametrize("kind", [kind for kind in LEAVES if TABLE[kind].field])
def test_invalid_argument_names_a_field_also_where_the_backend_named_none(kind: type[UnisonoError]) -> None:
    """The contract promises a BadRequest with every INVALID_ARGUMENT."""
    (one,) = only(to_status(kind("too long"), "items[3]."), error_details_pb2.BadRequest).field_violations
    assert (one.field, one.description) == (f"items[3].{TABLE[kind].field}", "too long")


def test_no_invalid_argument_is_without_a_field() -> None:
    """But for InvalidRequestError, whose violations name them, each row of that code has its own."""
    bare = {kind for kind, row in TABLE.items() if row.code.name == "INVALID_ARGUMENT" and not row.field}
    assert bare == {InvalidRequestError}


@pytest.mark.parametrize(
    ("error", "delay_s"),
    [
        pytest.param(errors.LimitExceededError("full", retry_after_s=5.25), 5.25, id="said"),
        pytest.param(errors.ShuttingDownError("going"), 1.0, id="by default"),
        pytest.param(errors.BackendBusyError("busy", retry_after_s=0.0), 0.0, id="at once"),
        pytest.param(errors.BackendBusyError("busy", retry_after_s=1e300), 3600.0, id="bounded"),
        pytest.param(errors.BackendBusyError("busy", retry_after_s=float("nan")), None, id="no number"),
        pytest.param(errors.BackendBusyError("busy"), None, id="not known"),
        pytest.param(errors.DuplicateItemError("twice"), None, id="waiting does not help"),
    ],
)
def test_retry_info_stands_where_waiting_helps(error: UnisonoError, delay_s: float | None) -> None:
    """With the time that was said, or a second where a request of ours may be sent again."""
    found = [one.retry_delay.ToNanoseconds() / 1e9 for one in details(to_status(error), error_details_pb2.RetryInfo)]
    assert found == ([] if delay_s is None else [delay_s])


# -- Sizes -----------------------------------------------------------------------------------------------------

texts = st.text(max_size=30) | st.builds(
    lambda text, n: text * n, st.text(min_size=1, max_size=4), st.integers(1, 5000)
)


@given(
    message=texts,
    metadata=st.dictionaries(texts.filter(lambda name: len(name) < 200), texts, max_size=6).map(
        lambda made: {utf8(name): value for name, value in made.items()}
    ),
    wrong=st.lists(st.builds(Violation, field=texts.map(utf8), description=texts), max_size=40),
    retry_after_s=st.none() | st.floats(),
    limit=st.integers(LEAST_BYTES, TRAILER_BYTES),
)
def test_a_status_never_exceeds_its_room(
    message: str, metadata: dict[str, str], wrong: list[Violation], retry_after_s: float | None, limit: int
) -> None:
    """Whatever an error holds, its status fits, has its ErrorInfo, and names at least the first field."""
    error = InvalidRequestError(message, metadata=metadata, violations=wrong, retry_after_s=retry_after_s)
    status = to_status(error, "items[49999].", max_bytes=limit)
    assert status.ByteSize() <= limit
    assert only(status, error_details_pb2.ErrorInfo).reason == "INVALID_REQUEST"
    bad = details(status, error_details_pb2.BadRequest)
    assert bool(bad) == bool(wrong)
    if bad:
        listed = len(bad[0].field_violations)
        assert listed >= 1
        assert (listed < len(wrong)) == status.message.endswith(f" (only the first {listed} listed)")


@pytest.mark.parametrize("letter", ["x", "ß", "語", "%", "\n"])
def test_the_largest_status_fits_into_default_trailers(letter: str) -> None:
    """8 KiB hold the details in base64, the message once more, and 512 bytes of whatever else goes there."""
    wrong = [Violation(field=f"items[{i}].item_id", description=letter * 5000) for i in range(100)]
    metadata = {f"name{i}": letter * 5000 for i in range(50)}
    status = to_status(InvalidRequestError(letter * 50_000, metadata=metadata, violations=wrong))
    wire = 4 * -(-status.ByteSize() // 3) + percent_encoded(status.message)
    assert wire <= 8192 - 512


def test_what_was_cut_says_so() -> None:
    """The message ends with a mark, and the count of fields that are listed."""
    wrong = [Violation(field=f"f{i}", description="x" * 300) for i in range(100)]
    status = to_status(InvalidRequestError("m" * 5000, violations=wrong))
    listed = len(only(status, error_details_pb2.BadRequest).field_violations)
    assert 5 <= listed < 100
    assert status.message.endswith(f"… (cut) (only the first {listed} listed)")


def test_what_fits_is_not_touched() -> None:
    """No mark, no note."""
    status = to_status(InvalidRequestError("short", violations=[Violation(field="f", description="d" * 400)]))
    assert status.message == "short"
    assert only(status, error_details_pb2.BadRequest).field_violations[0].description == "d" * 400


@given(st.text(st.characters()), st.integers(20, 60))
def test_cut_keeps_to_its_bytes_and_to_whole_characters(text: str, limit: int) -> None:
    """A cut text is a beginning of the whole one, and the mark."""
    kept = cut(text, limit)
    assert len(kept.encode()) <= limit
    assert kept == utf8(text) or utf8(text).startswith(kept.removesuffix("… (cut)"))


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("plain", "plain"),
        ("größer 語 😀", "größer 語 😀"),
        ("half \ud83d", "half \ufffd"),
        ("\ude00 half", "\ufffd half"),
        ("\ud83d\ude00 joined", "😀 joined"),
    ],
)
def test_half_characters_become_whole_or_are_replaced(text: str, whole: str) -> None:
    """A message can hold what is left."""
    assert utf8(text) == whole
    assert to_status(InvalidRequestError(text)).message == whole
