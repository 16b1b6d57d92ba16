"""Settings from the environment."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from unisono.config import Settings


@pytest.mark.parametrize("name", ["UNISONO_MEMORY_FACTOR", "OLLAMA_BATCH_MEMORY_FACTOR"])
def test_the_memory_factor_has_two_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ours goes first; the field's own name serves programs, and is no variable."""
    assert Settings().memory_factor == 1.0
    monkeypatch.setenv(name, "0.5")
    assert Settings().memory_factor == 0.5
    assert Settings(memory_factor=0.25).memory_factor == 0.25
    monkeypatch.setenv("UNISONO_MEMORY_FACTOR", "0.75")
    assert Settings().memory_factor == 0.75


def test_a_variable_without_our_prefix_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """MEMORY_FACTOR may be anybody's."""
    monkeypatch.setenv("MEMORY_FACTOR", "0.5")
    assert Settings().memory_factor == 1.0


@pytest.mark.parametrize("value", ["0", "-1", "1.01", "nan", "half"])
def test_a_memory_factor_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """It is a share: above 0, up to 1."""
    monkeypatch.setenv("UNISONO_MEMORY_FACTOR", value)
    with pytest.raises(ValidationError):
        Settings()


def test_the_memory_limit_is_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset, it is not known."""
    assert Settings().memory_limit is None
    monkeypatch.setenv("UNISONO_MEMORY_LIMIT", "20GiB")
    assert Settings().memory_limit == 20 * 1024**3
    monkeypatch.setenv("UNISONO_MEMORY_LIMIT", "0")
    with pytest.raises(ValidationError):
        Settings()
