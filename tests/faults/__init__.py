"""The fault rig: the service as a process, broken at every place, and what its callers saw."""
