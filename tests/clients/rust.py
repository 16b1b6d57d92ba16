"""The Rust program, built once for all tests of a run."""

from __future__ import annotations

from pathlib import Path

from tests.clients.programs import CLIENTS, build, fetch, need

RUST = CLIENTS / "rust"
FOR_WHAT = "the Rust client"
_TARGET = RUST / "target"


def cargo(*words: str) -> None:
    """Runs cargo, which must succeed; skips the test where it, or what it has to fetch, cannot be had."""
    need("cargo", for_what=FOR_WHAT)
    fetch("cargo", "fetch", "--quiet", folder=RUST, for_what=FOR_WHAT)
    # Wherever the environment has builds put: the program is looked for here.
    build("cargo", *words, folder=RUST, env={"CARGO_TARGET_DIR": str(_TARGET)})


def built() -> Path:
    """The program of clients/rust."""
    cargo("build", "--quiet")
    return _TARGET / "debug" / "unisono-batch"
