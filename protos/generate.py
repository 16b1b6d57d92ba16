"""Generates Python code from the contract, and holds the contract against its rules.

    generate.py                   write the generated code (`make gen`)
    generate.py --clients         write that of the clients only (`make clients`)
    generate.py --check           fail if the committed code differs from what would be written
    generate.py --lint            hold the contract against the rules in buf.yaml
    generate.py --breaking        fail if the contract breaks callers of the last release
    generate.py --release-image   make today's contract the last release (`make release-image`)

protoc, its plugins and buf come from this interpreter's environment; no registry is asked. The
output depends on nothing but the .proto files and the pinned tools.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import google.rpc
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
RELEASED = PROTOS / "released" / "v1.binpb"

# Where the plugins of protoc and buf were installed: beside this interpreter.
BIN = Path(sys.executable).parent
WELL_KNOWN = Path(grpc_tools.__path__[0]) / "_proto"
# The folder that holds google/rpc/*.proto.
THIRD_PARTY = Path(google.rpc.__path__[0]).parent.parent


@dataclass(frozen=True, kw_only=True)
class Target:
    """One place that receives a copy of the generated code."""

    # The Python package under which generated modules import each other.
    package: str
    # The folder of that package.
    folder: Path
    # What the stubs of services are typed for: "only_async" (grpc.aio), "only_sync", or "" for both.
    # mypy-protobuf 5.1 reads these words; the ones in its README it passes over.
    stubs: str


# Each client carries its own copy under its own name, so that it installs beside the service.
CLIENTS = (
    Target(
        package="unisono_client._generated",
        folder=ROOT / "clients" / "python" / "src" / "unisono_client" / "_generated",
        stubs="only_async",
    ),
)
TARGETS = (
    Target(
        package="unisono._generated",
        folder=ROOT / "service" / "unisono" / "_generated",
        stubs="only_async",
    ),
    *CLIENTS,
)


def main(arguments: list[str] | None = None) -> int:
    """Does what the one option says; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generates code from protos/, or checks protos/.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--clients", action="store_true", help="write the generated code of the clients only")
    action.add_argument("--check", action="store_true", help="compare the committed code with a fresh copy")
    action.add_argument("--lint", action="store_true", help="buf lint")
    action.add_argument("--breaking", action="store_true", help="buf breaking, against the last release")
    action.add_argument("--release-image", action="store_true", help="write the image of the last release")
    options = parser.parse_args(arguments)

    if not list_protos():
        return fail(f"there is no .proto file under {show(PROTOS)}/unisono")
    if options.check:
        return check()
    if options.lint:
        return buf("lint")
    if options.breaking:
        if not RELEASED.exists():
            return fail(f"{show(RELEASED)} is missing, so nothing says what was released: make release-image")
        return buf("breaking", "--against", str(RELEASED))
    if options.release_image:
        RELEASED.parent.mkdir(exist_ok=True)
        return buf("build", "--exclude-source-info", "--output", str(RELEASED))
    for target in CLIENTS if options.clients else TARGETS:
        write(target)
    return 0


def list_protos() -> list[Path]:
    """The contract's files relative to protos/, in a fixed order."""
    return sorted(path.relative_to(PROTOS) for path in PROTOS.glob("unisono/**/*.proto"))


def write(target: Target) -> None:
    """Replaces the generated code of one target."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(target, Path(scratch))
        if target.folder.exists():
            shutil.rmtree(target.folder)
        shutil.copytree(scratch, target.folder)


def check() -> int:
    """Compares each target with a fresh copy; names the files that differ and shows where."""
    found: list[str] = []
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as scratch:
            generate(target, Path(scratch))
            expected, committed = read_tree(Path(scratch)), read_tree(target.folder)
        for name in sorted(expected.keys() | committed.keys()):
            where = show(target.folder / name)
            if name not in committed:
                found.append(f"{where} is missing")
            elif name not in expected:
                found.append(f"{where} comes from no .proto file")
            elif committed[name] != expected[name]:
                lines = difflib.unified_diff(
                    committed[name].splitlines(), expected[name].splitlines(), "committed", "generated", n=0
                )
                found.append("\n    ".join([f"{where} differs", *(line[:160] for line in list(lines)[2:10])]))
    if found:
        return fail("the generated code is not what protos/ says: run `make gen`", *found)
    return 0


def generate(target: Target, folder: Path) -> None:
    """Writes the generated code of one target into an empty folder."""
    protos = list_protos()
    with_service = [path for path in protos if "\nservice " in (PROTOS / path).read_text()]
    run_protoc(protos, f"--python_out={folder}", f"--mypy_out=quiet:{folder}")
    if with_service:
        stubs = ",".join(option for option in ("quiet", target.stubs) if option)
        run_protoc(with_service, f"--grpc_python_out={folder}", f"--mypy_grpc_out={stubs}:{folder}")

    for path in sorted(folder.rglob("*.py*")):
        path.write_text(move_imports(path.read_text(), target.package))
    for package in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}):
        (package / "__init__.py").write_text("")


def run_protoc(protos: list[Path], *outputs: str) -> None:
    """Runs protoc over the given files of protos/; ends the program with protoc's own message if it fails."""
    status = protoc.main(  # type: ignore[no-untyped-call]  # grpc_tools has no annotations
        [
            "protoc",
            *(f"--proto_path={folder}" for folder in (PROTOS, THIRD_PARTY, WELL_KNOWN)),
            *(f"--plugin={name}={BIN / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
            *outputs,
            *(path.as_posix() for path in protos),
        ]
    )
    if status:
        raise SystemExit(status)


def move_imports(code: str, package: str) -> str:
    """Puts our own modules under `package` wherever generated code names them; others stay where they are.

    The file names inside the descriptors stay too: two copies in one process describe the same messages.
    """
    code = re.sub(r"^(from|import) (unisono\.)", rf"\1 {package}.\2", code, flags=re.MULTILINE)
    return re.sub(r"'(unisono\.[\w.]+_pb2)'", rf"'{package}.\1'", code)


def buf(command: str, *arguments: str) -> int:
    """Runs buf where our files and google/rpc lie side by side, under the paths that they have here."""
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch)
        shutil.copy(PROTOS / "buf.yaml", workspace)
        shutil.copytree(PROTOS / "unisono", workspace / "protos" / "unisono")
        for proto in sorted((THIRD_PARTY / "google" / "rpc").glob("*.proto")):
            copy = workspace / "third_party" / "google" / "rpc" / proto.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(proto, copy)
        return subprocess.run(
            [BIN / "buf", command, "protos", *arguments],
            cwd=workspace,
            env=os.environ | {"BUF_CACHE_DIR": str(workspace / ".cache")},
            check=False,
        ).returncode


def read_tree(folder: Path) -> dict[str, str]:
    """Text of each generated file under a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def show(path: Path) -> str:
    """A path as the repository's reader knows it."""
    return path.relative_to(ROOT).as_posix()


def fail(message: str, *details: str) -> int:
    """Says on standard error what is wrong; returns the exit status for it."""
    print("\n".join([f"generate.py: {message}", *(f"  {detail}" for detail in details)]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
