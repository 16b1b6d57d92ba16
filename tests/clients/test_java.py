"""The Java client: built from its sources, against a service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.behaviour import ClientBehaviour, answered, prompts
from tests.clients.java import built, maven
from tests.clients.programs import CuttingProxy, Program, write_lines
from tests.integration.service import house


@pytest.fixture(scope="session")
def unisono_batch() -> Program:
    """The program."""
    return Program(command=(str(built()),))


class TestJava(ClientBehaviour):
    """It does what all do."""

    async def test_a_full_batch_that_was_cut_is_resumed(self, unisono_batch: Program, tmp_path: Path) -> None:
        """Credit that will never come is not waited for, though results of before the cut are not heard again."""
        file = write_lines(tmp_path / "batch.jsonl", prompts(8))
        settings = {"slots": 2, "max_items": 6}
        async with house(num_parallel=2, settings=settings) as h, CuttingProxy(h.target) as proxy:
            h.fake.hold_passes()
            async with unisono_batch.started("--model", "fake", file, target=proxy.target) as first:
                await h.fake.wait_for(lambda fake: fake.busy_slots == 2, timeout_s=20)
                while answered(h) < 3:
                    await h.fake.step()
                await first.until_lines(answered(h))
                proxy.cut()
                assert await first.exit_code() == 3, first.told
            h.fake.release_passes()
            code, rest = await unisono_batch.run(*first.command_to_resume(), target=h.target)
        assert code == 1, rest.told
        assert sorted(first.ids + rest.ids) == [f"i{n}" for n in range(8)]
        refusals = [line for line in rest.lines if line["state"] == "REFUSED"]
        assert [(line["id"], line["error"]["reason"]) for line in refusals] == [
            ("i6", "BATCH_FULL"),
            ("i7", "BATCH_FULL"),
        ]


def test_its_own_tests_pass() -> None:
    """Those of its arguments, and of reading lines."""
    maven("test")
