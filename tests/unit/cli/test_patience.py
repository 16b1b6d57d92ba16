"""How long a lost connection is tried again."""

import grpc
import grpc.aio
import pytest

from tests.unit.cli.fake_server import status
from unisono.edge.cli.patience import EndedEarlyError, Patience, is_lost


def test_pauses_grow_until_the_time_is_over() -> None:
    """They double up to five seconds, scattered; the last try is at the end of the time."""
    now = 100.0
    patience = Patience(60.0, lambda: now)
    pauses: list[float] = []
    while (pause_s := patience.lost()) is not None:
        pauses.append(pause_s)
        now += pause_s
    assert now == pytest.approx(160.0)
    limits = [min(5.0, 0.1 * 2**n) for n in range(len(pauses) - 1)]
    assert all(limit / 2 <= pause_s <= limit for pause_s, limit in zip(pauses, limits, strict=False))
    patience.regained()
    assert 0.05 <= (patience.lost() or 0.0) <= 0.1


def _error(code: grpc.StatusCode, reason: str) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata()
    if reason:
        trailing.add("grpc-status-details-bin", status(reason, "why").SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, "why")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_error(grpc.StatusCode.UNAVAILABLE, ""), True),
        (_error(grpc.StatusCode.INTERNAL, ""), True),
        (_error(grpc.StatusCode.UNKNOWN, ""), True),
        (_error(grpc.StatusCode.CANCELLED, ""), True),
        (EndedEarlyError("it ended"), True),
        (_error(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"), False),
        (_error(grpc.StatusCode.NOT_FOUND, "BATCH_NOT_FOUND"), False),
        (_error(grpc.StatusCode.RESOURCE_EXHAUSTED, ""), False),
        (_error(grpc.StatusCode.UNIMPLEMENTED, ""), False),
    ],
)
def test_what_the_service_says_itself_is_no_lost_connection(
    error: grpc.aio.AioRpcError | EndedEarlyError,
    expected: bool,  # noqa: FBT001
) -> None:
    """Nor is what another try would not change."""
    assert is_lost(error) == expected
