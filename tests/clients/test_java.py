"""The Java client: built from its sources, against a service."""

from __future__ import annotations

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.java import built, maven
from tests.clients.programs import Program


@pytest.fixture(scope="session")
def unisono_batch() -> Program:
    """The program."""
    return Program(command=(str(built()),))


class TestJava(ClientBehaviour):
    """It does what all do."""


def test_its_own_tests_pass() -> None:
    """Those of its arguments, and of reading lines."""
    maven("test")
