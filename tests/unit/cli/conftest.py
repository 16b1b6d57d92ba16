"""What the tests of the command line share."""

import pytest
from typer.testing import CliRunner


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Runs commands; no service is running anywhere, and nothing of this terminal shows."""
    # A port that nobody can listen on.
    monkeypatch.setenv("UNISONO_SERVER", "127.0.0.1:1")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    return CliRunner()
