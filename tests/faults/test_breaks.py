"""A quick part of `make faults`, but for the kills of the service: cuts, spoilt ways, outages, a full disk."""

from __future__ import annotations

import pytest

from tests.faults import cuts, disk, links, outages
from tests.faults.table import SkippedError


async def test_a_connection_that_is_cut_and_resumed() -> None:
    """At each of 10 positions, exactly the rest comes; nothing runs twice."""
    found = await cuts.run(positions=10, items=6)
    assert set(found.cuts.values()) == {10}
    assert found.results >= 6 * 21


async def test_spoilt_ways() -> None:
    """What is said between every two parts may be delayed, sliced, swallowed, cut and reset."""
    found = await links.run(items=10, cuts=1)
    assert set(found.results) == {(link, manner) for link in links.LINKS for manner in links.MANNERS}
    assert min(found.results.values()) >= 5
    assert {key[1] for key, count in found.cuts.items() if count} == {"swallowed", "cut", "reset"}


@pytest.mark.slow
async def test_a_backend_that_dies_and_comes_back() -> None:
    """What was finished is kept; the rest completes, or ends with BACKEND_UNAVAILABLE where patience is over."""
    patient, hasty = await outages.run(kills=4, away=(0.0, 1.5), patience=(60.0, 0.5), items=40)
    assert patient.kills.total() == hasty.kills.total() == 2
    assert set(patient.results) == {"COMPLETED"}
    assert set(hasty.results) == {"COMPLETED", "BACKEND_UNAVAILABLE"}


async def test_a_disk_that_is_full() -> None:
    """Submits are refused, all can be read, and all goes on when there is room; also after a kill."""
    try:
        found = await disk.run(times=1)
    except SkippedError as skipped:
        pytest.skip(f"no small file system: {skipped}")
    assert (found.refused, found.uploads_refused, found.kills) == (1, 1, 1)
