"""What applies to a batch that says nothing about it."""

from __future__ import annotations

from unisono.core.batch import Ack, BadItem, BatchConfig


def test_silence_means_the_documented_defaults() -> None:
    """A batch that says nothing is strict, tries three times, ends with its caller, and has no limits of its own."""
    config = BatchConfig()
    assert config.is_strict
    assert config.max_attempts == 3
    assert not config.detaches
    assert (config.queue_timeout_s, config.item_timeout_s, config.deadline_s, config.keep_alive_s) == (None,) * 4
    assert config.release_size > 0 < config.release_interval_s


def test_refused_items_have_no_place() -> None:
    """What was refused has no index, and what could not be read need not have an id."""
    assert Ack(item_id="a").index is None
    assert BadItem(item_id="", violations=()).violations == ()
