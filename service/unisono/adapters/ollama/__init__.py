"""Ollama over its own HTTP API: `/api/chat`, `/api/generate`, `/api/embed`, and what tells of models and runners."""

from unisono.adapters.ollama.client import OllamaBackend
from unisono.adapters.ollama.host import parse_host

__all__ = ["OllamaBackend", "parse_host"]
