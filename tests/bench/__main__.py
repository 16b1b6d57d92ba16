"""All measurements, one after the other: `python -m tests.bench`."""

import runpy

for name in ("release", "cancel", "overhead"):
    runpy.run_module(f"tests.bench.{name}", run_name="__main__")
    print()
