"""Where a decode step asks, on a device for which each question means waiting for its host.

A question ends the host's run-ahead: until the answer is there, nothing behind it can be launched,
and after the last one only the layers that are left hide the host's work on the next step. So a
step asks at one exit point, the one that has saved most time of late, or at none if that is none.
SpecEE (arXiv 2504.08850) schedules where its predictors run for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOK = 128  # steps, of which one asks at another exit point than the best, at each in turn
MEMORY = 0.98  # what an outcome counts for after each step, when there is a newer one


@dataclass(frozen=True)
class DecodeTimes:
    """What a decode step takes on a device, estimated.

    Attributes:
        layer: seconds to read a layer's weights.
        rows: as many as take that long to be multiplied with them, too.
        question: seconds of the launches of a question and of the wait.
        between: seconds of the host between the layers of two steps.

    """

    layer: float
    rows: int
    question: float
    between: float

    def of_layers(self, count: float, rows: float) -> float:
        """Seconds of `count` layers for so many rows."""
        return count * self.layer * max(1.0, rows / self.rows) if rows else 0.0

    def saved(self, left: int, rows: int, settled: int) -> float:
        """Seconds that a question saves, negative if it loses some.

        With `left` layers behind it, `settled` of `rows` leave.
        """
        without = self.of_layers(left, rows)
        after = self.of_layers(left, rows - settled)
        waits = max(0.0, self.between - after) - max(0.0, self.between - without)
        return without - after - waits - self.question


class DecodeSchedule:
    """Chooses the exit point that a policy's decode steps ask at, by what questions saved."""

    def __init__(self, left: Sequence[int], times: DecodeTimes) -> None:
        """Begin without outcomes; `left` are the layers behind each exit point.

        An exit point is tried as if it saved the most until it was asked.
        """
        self._left, self._times, self._steps = left, times, 0
        self._saved, self._last = np.full(len(left), np.inf), np.zeros(len(left), dtype=np.int64)

    def next(self) -> int | None:
        """The exit point to ask at now, by its place; None for none of them."""
        self._steps += 1
        turn, since = divmod(self._steps, LOOK)
        if turn and not since:
            return (turn - 1) % len(self._left)
        best = int(self._saved.argmax())
        return best if self._saved[best] > 0 else None

    def asked(self, place: int, rows: int, settled: int) -> None:
        """Note that of so many rows, these were settled."""
        saved = self._times.saved(self._left[place], rows, settled)
        before = self._saved[place]
        old = MEMORY ** float(self._steps - self._last[place]) if np.isfinite(before) else 0.0
        self._saved[place] = (old * before if old else 0.0) + (1 - old) * saved
        self._last[place] = self._steps
