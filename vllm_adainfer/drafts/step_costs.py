"""What a step costs and what one more row in it costs, as measured while serving."""

from __future__ import annotations

KEPT = 0.98  # how much of what was measured before counts after one more step
LEAST_SPREAD = 4.0  # variance of the number of rows below which nothing can be told apart
FEWEST, MOST = 4.0, 512.0


class StepCosts:
    """A line through seconds over rows, by least squares over the latest steps."""

    def __init__(self, rows_per_step: float) -> None:
        """`rows_per_step`: how many rows cost as much as an empty step, until it is measured."""
        self.rows_per_step = rows_per_step
        self._sums = [0.0] * 5  # of 1, rows, seconds, rows squared, rows times seconds

    def add(self, rows: int, seconds: float) -> None:
        """Note a step of so many `rows`."""
        new = 1.0, rows, seconds, rows * rows, rows * seconds
        self._sums = [KEPT * old + one for old, one in zip(self._sums, new, strict=True)]
        count, x, y, xx, xy = self._sums
        spread = xx / count - (x / count) ** 2
        if spread < LEAST_SPREAD:
            return
        row = (xy / count - x * y / count**2) / spread
        step = y / count - row * x / count
        if row > 0:
            self.rows_per_step = min(MOST, max(FEWEST, step / row))

    def least_share(self, running: int) -> float:
        """How likely a drafted token must be kept to be worth its row, with so many `running`.

        A token that is kept spares its request's share of a step; one that is refused costs a row.
        """
        return running / (running + self.rows_per_step)
