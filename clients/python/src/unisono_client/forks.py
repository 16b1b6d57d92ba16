"""What a fork leaves behind: gRPC, and a thread with an event loop, work only in the process that began them."""

from __future__ import annotations

import os
from typing import Final

from unisono_client.errors import ClosedError

_FORKED: Final = (
    "this process was forked from one that had used the client, and gRPC does not work in it; start it anew"
    " (multiprocessing.get_context('spawn') or 'forkserver'), or make the first client in the child"
)


class _Process:
    """What is known of this process."""

    def __init__(self) -> None:
        # Whether it, or one that it was forked from, had a connection.
        self.has_connected = False
        self.is_forked = False

    def after_fork(self) -> None:
        """Called in the child."""
        self.is_forked = self.has_connected


_process: Final = _Process()
if hasattr(os, "register_at_fork"):  # where there is a fork
    os.register_at_fork(after_in_child=_process.after_fork)


def is_forked() -> bool:
    """Whether this process was forked from one that had a connection, and can have none."""
    return _process.is_forked


def connecting() -> None:
    """To be called before a connection is made, or used. Raises ClosedError where there can be none."""
    if _process.is_forked:
        raise ClosedError(_FORKED)
    _process.has_connected = True
