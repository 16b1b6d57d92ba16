"""The Java client: built from its sources, against a service."""

from __future__ import annotations

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.java import JAVA, MAVEN, built
from tests.clients.programs import Program, build


@pytest.fixture(scope="session")
def unisono_batch() -> Program:
    """The program."""
    return Program(command=(str(built()),))


class TestJava(ClientBehaviour):
    """It does what all do."""


@pytest.mark.usefixtures("unisono_batch")
def test_its_own_tests_pass() -> None:
    """Those of reading lines."""
    build(*MAVEN, "test", folder=JAVA)
