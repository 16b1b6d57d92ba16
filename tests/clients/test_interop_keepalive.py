"""gRPC's keep-alive pings: the case that takes its time, which it does beside all others."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.clients.interop import PING_FOR_S, PINGS
from tests.clients.programs import BUILD_LIMIT_S


@pytest.mark.slow
def test_pings_at_the_permitted_rate_cost_nothing(pinging: subprocess.Popen[str]) -> None:
    """A quiet caller that asks every ten seconds keeps its connection; one that asks every second is sent away."""
    out, err = pinging.communicate(timeout=PING_FOR_S + BUILD_LIMIT_S)
    assert pinging.returncode == 0, err
    seen = json.loads(out)
    for name in seen.keys() - {"nervous"}:
        assert seen[name]["pings"] >= PINGS, seen
        assert seen[name]["goaways"] == 0, seen
        assert seen[name]["connections"] == 1, seen
    assert "patient" in seen
    assert seen["nervous"]["goaways"] > 0, seen
