"""Judges a soak: by the waits of its good clients, beside stock's, and by its memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SETTLED_SECONDS = 300.0  # after which memory may grow no more,
MOST_GROWTH = 100.0  # but for so many MiB
WORSE = 1.5  # how much longer than on stock a good client may wait: the tail of a run is noisy
FLOOR_SECONDS = 0.25  # what no client notices


@dataclass(frozen=True)
class Wait:
    """How long a good client waited for an answer to a question about the policy `kind`.

    It asked at a moment of a monotonic clock.
    """

    kind: str
    asked: float
    seconds: float


def summary(waits: Sequence[Wait]) -> dict[str, float]:
    """Number, median, 99th percentile and the longest of waits, in seconds."""
    seconds = sorted(wait.seconds for wait in waits)
    return {
        "answers": len(seconds),
        "median_seconds": statistics.median(seconds),
        "p99_seconds": seconds[99 * (len(seconds) - 1) // 100],
        "worst_seconds": seconds[-1],
    }


def summaries(waits: Sequence[Wait]) -> dict[str, Any]:
    """`summary` of all waits and by kind, and the longest time in which nobody got an answer."""
    answered = sorted(wait.asked + wait.seconds for wait in waits)
    begin = min(wait.asked for wait in waits)
    gaps = [after - before for before, after in zip([begin, *answered], answered, strict=False)]
    kinds = sorted({wait.kind for wait in waits})
    return {
        **summary(waits),
        "longest_silence_seconds": max(gaps),
        "kinds": {kind: summary([wait for wait in waits if wait.kind == kind]) for kind in kinds},
    }


def worse_than_stock(ours: Mapping[str, float], stock: Mapping[str, float]) -> list[str]:
    """Sentences on what good clients waited for longer than on stock, from `summaries` of both."""
    return [
        f"{key.removesuffix('_seconds').replace('_', ' ')} of good clients' waits: "
        f"{ours[key]:.2f} s, on stock {stock[key]:.2f} s"
        for key in ("median_seconds", "p99_seconds", "worst_seconds", "longest_silence_seconds")
        if ours[key] > max(WORSE * stock[key], stock[key] + FLOOR_SECONDS)
    ]


def growth_once_settled(samples: Sequence[Mapping[str, float]]) -> float | None:
    """MiB that all processes together have gained since a soak's first minutes; None before."""
    later = [sample["uss"] for sample in samples if sample["seconds"] >= SETTLED_SECONDS]
    return max(later) - later[0] if len(later) > 1 else None


def still_grows(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """A sentence if memory goes on growing."""
    grown = growth_once_settled(samples)
    if grown is None or grown <= MOST_GROWTH:
        return []
    return [f"memory grew by {grown:.0f} MiB after the first {SETTLED_SECONDS / 60:.0f} minutes"]
