"""The service that a bench starts: what it is told, and what is said where it does not start."""

from __future__ import annotations

import pytest

from unisono.bench.backend import LLAMA_SERVER, OLLAMA, Backend, BenchError
from unisono.bench.service import environment_of, service_process


def backend(kind: str) -> Backend:
    """Somewhere."""
    return Backend(
        url="http://127.0.0.1:9",
        kind=kind,
        version="1",
        models=("m",),
        slots=4,
        headers={"Authorization": "Bearer key"},
    )


def test_it_uses_the_backend_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment names; other settings of the environment hold, and it remembers nothing."""
    for name, value in (
        ("BACKENDS", "a=http://other"),
        ("EMBEDDED", "true"),
        ("OLLAMA_URL", "http://other"),
        ("SLOTS", "3"),
        ("LISTEN", "x:1"),
    ):
        monkeypatch.setenv(f"UNISONO_{name}", value)
    variables = environment_of(backend(LLAMA_SERVER))
    assert variables["UNISONO_LLAMA_SERVER_URL"] == "http://127.0.0.1:9"
    assert (variables["UNISONO_BACKEND_TOKEN"], variables["UNISONO_SLOTS"]) == ("key", "3")
    assert (variables["UNISONO_LISTEN"], variables["UNISONO_STATE_DIR"]) == ("127.0.0.1:0", "none")
    assert not {"UNISONO_BACKENDS", "UNISONO_EMBEDDED", "UNISONO_OLLAMA_URL"} & variables.keys()
    assert environment_of(backend(OLLAMA))["UNISONO_OLLAMA_URL"] == "http://127.0.0.1:9"


async def test_a_service_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last of what it said."""
    monkeypatch.setenv("UNISONO_MAX_ITEMS", "none")
    with pytest.raises(BenchError, match=r"the service did not start:(?s:.)*MAX_ITEMS"):
        async with service_process(backend(OLLAMA)):
            pass
