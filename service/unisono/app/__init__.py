"""The doing part: asyncio, driven by the decisions of `core/`; the world is behind `ports.py`."""
