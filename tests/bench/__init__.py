"""Measurements: each module is a program (`python -m tests.bench.release`) that prints a table, or JSON."""
