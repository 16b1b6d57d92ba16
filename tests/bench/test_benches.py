"""What the benches must show on any machine, however busy: generous bounds that only wrong code misses."""

import json
import subprocess
import sys

from tests.bench import cancel, release


async def test_a_held_release_beats_a_warm_pool_twentyfold() -> None:
    """64 requests that are held and released arrive at least 20 times closer together than through a warm pool."""
    for attempt in range(2):
        rows = {row.way: row for row in await release.measure(sizes=[64], rounds=3)}
        if rows[release.WARM].median_ms >= 20 * rows[release.HELD].median_ms:
            return
        assert attempt == 0, release.table(list(rows.values()))


async def test_aborted_calls_are_closed_soon() -> None:
    """Half of the connections are closed within a second, each within ten; the bench says how soon in truth."""
    for row in await cancel.measure(size=16, rounds=3):
        assert row.count == (3 if row.state == cancel.BATCH else 48)
        assert row.median_ms < 1000
        assert row.slowest_ms < 10_000


def test_the_programs_print_json() -> None:
    """`--json` gives a document with the machine, and nothing else on standard output."""
    for module, more in (("release", ["--sizes", "2"]), ("cancel", ["--size", "2"])):
        done = subprocess.run(
            [sys.executable, "-m", f"tests.bench.{module}", "--json", "--rounds", "1", *more],
            capture_output=True,
            check=True,
            timeout=60,
        )
        found = json.loads(done.stdout)
        assert found["machine"]["cores"] >= 1
        assert found["rows"]
