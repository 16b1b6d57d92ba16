"""Fixtures of the clients' tests."""

from collections.abc import Iterator

import pytest

from tests.fakes.otlp import OtlpReceiver


@pytest.fixture
def otlp() -> Iterator[OtlpReceiver]:
    """An OTLP/gRPC receiver that listens while the test runs."""
    with OtlpReceiver() as receiver:
        yield receiver
