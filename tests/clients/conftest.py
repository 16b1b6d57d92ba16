"""What the tests of all client programs share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.clients.programs import BUILD_LIMIT_S, ROOT, HttpCollector
from tests.engine import skip_without_engine
from tests.fakes.otlp import OtlpReceiver
from unisono.bootstrap import running
from unisono.config import Settings

_HERE = Path(__file__).parent
# Its callers wait for most of a minute: they do so from the first test of this folder on, and it is the last.
_PINGS = _HERE / "test_interop_keepalive.py"


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line("markers", "clients: builds and runs client programs of other languages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what lies in this folder, and gives it time: whichever comes first has to wait for the build.

    What is in Python needs none.
    """
    items.sort(key=lambda item: item.path == _PINGS)
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.clients)
            if not item.path.name.startswith("test_python"):
                item.add_marker(pytest.mark.timeout(BUILD_LIMIT_S))


@pytest.fixture(scope="session", autouse=True)
def pinging(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str] | None]:
    """The callers of test_interop_keepalive, at work while other tests are; None where nobody waits for them."""
    if all(item.path != _PINGS for item in request.session.items):
        yield None
        return
    command = (sys.executable, "-m", "tests.clients.keepalive")
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def otlp() -> Iterator[OtlpReceiver]:
    """A collector for the service: OTLP over gRPC."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def http_collector() -> Iterator[HttpCollector]:
    """A collector for a program: OTLP over HTTP."""
    with HttpCollector() as collector:
        yield collector


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def embedded_target() -> AsyncGenerator[str, None]:
    """Where a service on an embedded engine of its own listens: one for the tests of all languages.

    It runs in the session's event loop, and so must the tests that use it.
    """
    skip_without_engine()
    async with running(Settings(listen="127.0.0.1:0", embedded=True, drain=0.0, state_dir="none")) as service:
        yield service.target
