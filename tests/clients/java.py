"""The Java program, built once for all tests of a run."""

from __future__ import annotations

from pathlib import Path

from tests.clients.programs import CLIENTS, build, fetch, need

JAVA = CLIENTS / "java"
MAVEN = ("mvn", "--batch-mode", "--no-transfer-progress", "--quiet")


def built() -> Path:
    """The program of clients/java; skips the test where Java or Maven is missing."""
    # A runtime without a compiler is found in many places.
    need("java", "javac", "mvn", for_what="the Java client")
    fetch(*MAVEN, "dependency:go-offline", folder=JAVA, for_what="the Java client")
    build(*MAVEN, "package", "-DskipTests", folder=JAVA)
    return JAVA / "unisono-batch"
