"""The embedded engine: llama.cpp's own server with a small model, in a child process of this service."""

from unisono.adapters.embedded.backend import EmbeddedBackend, EmbeddedCall

__all__ = ["EmbeddedBackend", "EmbeddedCall"]
