"""Go programs, built once for all tests of a run."""

from __future__ import annotations

from pathlib import Path

from tests.clients.programs import CLIENTS, build, fetch, need

GO = CLIENTS / "go"
# No stamp of the repository: it may be owned by another user, which git refuses to look at.
FLAGS = ("-buildvcs=false",)


def built(package: str, folder: Path) -> Path:
    """The program of a package of clients/go; skips the test where Go is missing."""
    need("go", for_what="the Go client")
    fetch("go", "mod", "download", folder=GO, for_what="the Go client")
    program = folder / Path(package).name
    build("go", "build", *FLAGS, "-o", program, package, folder=GO)
    return program
