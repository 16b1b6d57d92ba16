"""The TypeScript client, built once for all tests of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.clients.programs import CLIENTS, ROOT, build, fetch, need

TYPESCRIPT = CLIENTS / "typescript"
FOR_WHAT = "the TypeScript client"


def built(folder: Path) -> Path:
    """A copy of clients/typescript with what it needs, compiled; skips the test where Node.js is missing.

    The copy leaves no packages behind, takes none that are there already, and stands where the original does beside
    the contract and the example.
    """
    need("node", "npm", for_what=FOR_WHAT)
    copy = folder / "clients" / "typescript"
    _ = shutil.copytree(TYPESCRIPT, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    for neighbour in ("protos", "service"):
        (folder / neighbour).symlink_to(ROOT / neighbour)
    # `npm ci` takes exactly what the lock file says, and refuses one that does not fit package.json.
    fetch("npm", "ci", "--prefer-offline", "--no-audit", "--no-fund", folder=copy, for_what=FOR_WHAT)
    build("npm", "run", "build", folder=copy)
    return copy
