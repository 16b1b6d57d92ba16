"""Figures of the whole service, for Prometheus.

`series` is the table of what is counted while it happens, `watch` counts it, `standing` reads what is asked at the
moment of a scrape, and `endpoint` serves both.
"""
