"""Journals: where the numbered events of batches are kept."""
