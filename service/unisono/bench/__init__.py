"""Measuring: the same work through Unisono and as a client does it by itself, in interleaved repeats of one run."""
