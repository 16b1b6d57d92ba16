"""Batches to try the service with; data, not code."""
