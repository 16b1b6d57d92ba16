"""The Java program, built once for all tests of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.clients.programs import CLIENTS, build, need

JAVA = CLIENTS / "java"
# What Maven says where it cannot reach what it needs; what is reached and is not there is a mistake in pom.xml.
UNREACHABLE = re.compile(r"(Could not transfer|Cannot access|Unknown host).*")


def maven(*goals: str) -> None:
    """Runs Maven, which must succeed; skips the test where it, or what it has to fetch, cannot be had."""
    # A runtime without a compiler is found in many places.
    need("java", "javac", "mvn", for_what="the Java client")
    # For a program that lives for seconds, the second compiler costs more than it gains: twice the time in all.
    options = f"{os.environ.get('MAVEN_OPTS', '')} -XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    command = ("mvn", "--batch-mode", "--no-transfer-progress", "--quiet", *goals)
    try:
        build(*command, folder=JAVA, env={"MAVEN_OPTS": options})
    except AssertionError as error:
        # It fetches while it builds, each thing when it needs it.
        if found := UNREACHABLE.search(str(error)):
            pytest.skip(f"the Java client needs packages that could not be fetched: {found[0][:300]}")
        raise


def built() -> Path:
    """The program of clients/java."""
    maven("package", "-DskipTests")
    return JAVA / "unisono-batch"
