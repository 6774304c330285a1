"""Undocumented names of prometheus_client that we use, checked against 0.26.0."""

from __future__ import annotations

from bisect import bisect_left

from prometheus_client import Histogram


def observe_many(histogram: Histogram, value: float, count: int) -> None:
    """Observe `value` `count` times, in two updates whatever the count.

    prometheus_client has no documented way to observe several values at once. The two attributes
    written here are also right with several processes (``PROMETHEUS_MULTIPROC_DIR``).
    """
    histogram._sum.inc(value * count)
    histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(count)
