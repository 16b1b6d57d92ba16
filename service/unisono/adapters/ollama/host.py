"""OLLAMA_HOST, and the names that Ollama gives to models."""

from __future__ import annotations

from typing import Final

from unisono.adapters.held import Endpoint, parse_endpoint

PORT: Final = 11434

# What a name leaves out. Source: Ollama 0.32, types/model/name.go, DefaultName.
_DEFAULT_PREFIXES: Final = ("registry.ollama.ai/library/", "registry.ollama.ai/", "library/")
_DEFAULT_TAG: Final = "latest"


def parse_host(text: str) -> Endpoint:
    """Reads what OLLAMA_HOST may hold: "", `host`, `:port`, `host:port`, `0.0.0.0`, `[::1]`, a URL with a prefix.

    Without a scheme the port is 11434; `http://host` means 80 and `https://host` 443, as in Ollama's own client.
    Raises ValueError, also for a port that Ollama would silently replace. Source: Ollama 0.32, envconfig/config.go,
    Host and ConnectableHost.
    """
    if text.strip() == "ollama.com":
        text = "https://ollama.com"
    return parse_endpoint(text, default_port=PORT)


def normalised(name: str) -> str:
    """A model's name in full, for comparing: with its tag, without the default host, in lower case.

    Source: Ollama 0.32, types/model/name.go; server/routes.go, getExistingName (names differ in more than case).
    """
    name = name.strip().lower().removeprefix("https://").removeprefix("http://")
    for prefix in _DEFAULT_PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name if ":" in name.rpartition("/")[2] else f"{name}:{_DEFAULT_TAG}"
