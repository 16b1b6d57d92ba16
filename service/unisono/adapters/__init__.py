"""The outside world, one folder for each part of it: every class here implements a port of `app/ports.py`."""
