"""What the journal must show on any machine, however busy: generous bounds that only wrong code misses."""

from __future__ import annotations

from pathlib import Path

from tests.bench import journal


async def test_results_go_in_and_come_out(tmp_path: Path) -> None:
    """Six thousand: some thousand a second, pages soon, and memory that does not grow with what was written."""
    found = await journal.measure(tmp_path, items=6_000, ahead=500)
    assert found.results_a_second > 1_000
    assert found.first_page_ms < 200
    assert found.middle_page_ms < 200
    assert found.grown_by_results_mib < 32
