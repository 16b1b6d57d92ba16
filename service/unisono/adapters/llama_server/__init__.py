"""llama.cpp's own server: its OpenAI-compatible API, and `/props`, `/slots`, `/metrics`."""

from unisono.adapters.llama_server.client import LlamaServerBackend, LlamaServerCall

__all__ = ["LlamaServerBackend", "LlamaServerCall"]
