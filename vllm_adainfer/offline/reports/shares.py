"""Measured shares with their 95 % intervals, and whether a bound is compatible with them.

Independent prompts have the interval of Clopper and Pearson. The tokens of a text and the prompts
that came together are not independent: there it is taken for the effective number of rows (Korn and
Graubard 1998), which the variance between groups tells; with few groups that is approximate.
`scipy.stats.binomtest` has the first alone, for whole numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, t

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.bound import FloatArray

TAIL = 0.025  # beyond each end of an interval
Interval = tuple[float, float]


@dataclass(frozen=True)
class Share:
    """What share of some rows is hit, counted over units: prompts, or texts of several tokens.

    Attributes:
        hits: [units], rows that are hit, or their sum if a hit may count as -1.
        rows: [units], of these rows.
        groups: [units], the group of each unit; groups are independent.

    """

    hits: FloatArray
    rows: FloatArray
    groups: Ints

    @property
    def value(self) -> float:
        """The share."""
        return float(self.hits.sum() / self.rows.sum())

    @property
    def effective_rows(self) -> float:
        """How many independent rows tell as much; as many as groups where no variance shows."""
        _, rows, variance = self._by_group()
        if (rows == 1).all() or not variance:
            return float(len(rows))
        most = float(rows.sum())
        found = self.value * (1 - self.value) / variance
        found *= (t.ppf(TAIL, most - 1) / t.ppf(TAIL, len(rows) - 1)) ** 2
        return float(min(found, most))

    @property
    def interval(self) -> Interval:
        """Of the share, at 95 %."""
        return clopper_pearson(self.value * self.effective_rows, self.effective_rows)

    @property
    def signed_interval(self) -> Interval:
        """Student's, for hits that may count as -1; between -1 and 1."""
        _, rows, variance = self._by_group()
        if len(rows) < 2:
            return -1.0, 1.0
        reach = float(-t.ppf(TAIL, len(rows) - 1) * variance**0.5)
        return max(-1.0, self.value - reach), min(1.0, self.value + reach)

    def _by_group(self) -> tuple[FloatArray, FloatArray, float]:
        """Hits and rows [groups], and the variance of the share: that of a ratio of their sums."""
        _, place = np.unique(self.groups, return_inverse=True)
        hits: FloatArray = np.bincount(place, weights=self.hits).astype(np.float64)
        rows: FloatArray = np.bincount(place, weights=self.rows).astype(np.float64)
        count = len(rows)
        squares = float(((hits - self.value * rows) ** 2).sum()) / float(rows.sum()) ** 2
        return hits, rows, count / (count - 1) * squares if count > 1 else 0.0


def clopper_pearson(hits: float, rows: float) -> Interval:
    """The 95 % interval of a share of which `hits` of `rows` independent rows were seen."""
    low = beta.ppf(TAIL, hits, rows - hits + 1) if hits > 0 else 0.0
    high = beta.ppf(1 - TAIL, hits + 1, rows - hits) if hits < rows else 1.0
    return float(low), float(high)


def of_rounds(rounds: Sequence[Share]) -> tuple[float, Interval]:
    """The median over the rounds, each of the same prompts, and its interval."""
    value = statistics.median(one.value for one in rounds)
    middle = statistics.median_low(one.value for one in rounds)
    rows = next(one for one in rounds if one.value == middle).effective_rows
    return value, clopper_pearson(value * rows, rows)


def verdict(value: float, interval: Interval, epsilon: float) -> str:
    """What a measured share says of the bound, in words."""
    bound = f"the bound of {epsilon:.1%}"
    if value <= epsilon:
        return f"within {bound}"
    return f"compatible with {bound}" if interval[0] <= epsilon else f"above {bound}"


def spelled(value: float, interval: Interval, digits: int = 1) -> str:
    """Such as ``2.3% (0.9 to 4.9%)``."""
    low, high = interval
    return f"{value:.{digits}%} ({100 * low:.{digits}f} to {high:.{digits}%})"
