"""OpenTelemetry: one trace for each batch. The only place in the house that knows it.

- `setup.py`: the standard `OTEL_*` variables → a tracer provider, or nothing.
- `export.py`: how spans leave the process, and what happens while nobody takes them.
- `trace.py`: what happens to a batch → its span tree.
- `spans.py`: what that tree is made of while it grows.
- `groups.py`: backends, groups and batches → the attributes of their spans.
- `items.py`: an item → the attributes of its span, by the GenAI conventions.
- `content.py`: prompts and answers, for those who turn their capture on.
- `conventions.py`: the names of attributes.
"""
