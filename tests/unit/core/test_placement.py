"""Which backend answers a model that several have."""

from __future__ import annotations

from collections.abc import Mapping

from unisono.core.model import ModelInfo
from unisono.core.placement import BackendState, place

IDLE = BackendState()


def model(backend: str, digest: str = "d", name: str = "m") -> ModelInfo:
    """A model on a backend."""
    return ModelInfo(backend=backend, name=name, digest=digest)


def where(
    names: Mapping[str, str], *, counts: Mapping[str, int] | None = None, **states: BackendState
) -> dict[str, str]:
    """The backend for each name; `names` says which have it ("xy": x and y) and the name is its digest."""
    candidates = {name: [model(backend, name, name) for backend in backends] for name, backends in names.items()}
    chosen = place(candidates, counts or {}, states)
    return {name: chosen[name].backend for name in names}


def test_the_only_one() -> None:
    """However busy it is."""
    assert where({"m": "x"}, x=BackendState(busy=100), y=IDLE) == {"m": "x"}


def test_where_it_is_loaded_or_at_work() -> None:
    """A load costs more than a wait for a slot."""
    assert where({"m": "xy"}, x=IDLE, y=BackendState(busy=8, ready={"m": 4})) == {"m": "y"}
    assert where({"m": "xy"}, x=BackendState(busy=1), y=BackendState(busy=9, ready={"m": 4})) == {"m": "y"}


def test_an_idle_one_rather_than_a_long_queue() -> None:
    """Once more items wait there than have slots; whatever makes them wait."""
    assert where({"m": "xy"}, x=IDLE, y=BackendState(busy=9, ready={"m": 4})) == {"m": "x"}
    assert where({"m": "xy"}, x=BackendState(busy=40), y=BackendState(busy=80, ready={"m": 4})) == {"m": "x"}
    assert where({"m": "xy"}, x=BackendState(busy=73), y=BackendState(busy=80, ready={"m": 4})) == {"m": "y"}
    loaded = {"a": 4, "b": 4}
    assert where({"a": "xy", "b": "xy"}, counts={"a": 40}, x=BackendState(ready=loaded), y=IDLE) == {
        "a": "x",
        "b": "y",
    }


def test_the_least_busy_of_equals() -> None:
    """Both have it in memory, or neither."""
    for ready in ({}, {"m": 4}):
        busy, calm = BackendState(busy=2, ready=ready), BackendState(busy=1, ready=ready)
        assert where({"m": "xy"}, x=busy, y=calm) == {"m": "y"}


def test_the_first_in_the_configuration() -> None:
    """Where nothing speaks for another."""
    assert where({"m": "yx"}, x=IDLE, y=IDLE) == {"m": "y"}


def test_models_of_one_decision_make_room_for_each_other() -> None:
    """What is placed counts, by its items, and who has no choice goes first."""
    assert where({"a": "xy", "b": "xy", "c": "xy"}, counts={"a": 10, "b": 1, "c": 1}, x=IDLE, y=IDLE) == {
        "a": "x",
        "b": "y",
        "c": "y",
    }
    assert where({"a": "xy", "b": "x"}, counts={"b": 1}, x=IDLE, y=IDLE) == {"a": "y", "b": "x"}


def test_two_names_of_one_model_stay_together() -> None:
    """Its items share passes only on one backend, also where the other has become the calmer one."""
    candidates = {name: [model("x", "same", name), model("y", "same", name)] for name in ("one", "other")}
    chosen = place(candidates, {"one": 5, "other": 5}, {"x": IDLE, "y": IDLE})
    assert {found.backend for found in chosen.values()} == {"x"}
