"""Unisono: batches of conversations, released together to Ollama, streamed back one by one."""

__version__ = "0.1.0"
