"""Measured shares with 95 % intervals, and whether they are compatible with a bound.

For independent prompts this is the interval of Clopper and Pearson. The tokens of one text are not
independent, nor are prompts of one group: there it is computed for the effective number of rows
(Korn and Graubard 1998), estimated from the variance between groups, which is approximate if there
are few. `scipy.stats.binomtest` has only the first, and only for whole numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import beta, t

from vllm_adainfer.arrays import AnyArray, Floats, Ints

TAIL = 0.025  # beyond each end of an interval
Interval = tuple[float, float]


@dataclass(frozen=True)
class Share:
    """The share of rows that are hits, counted by unit: a prompt, or a text of several tokens.

    Attributes:
        hits: [units], the number of hits in each unit; negative where a hit may count as -1.
        rows: [units], the number of rows in each unit.
        groups: [units], the group of each unit; groups are independent.

    """

    hits: Floats
    rows: Floats
    groups: Ints

    @classmethod
    def of(cls, hits: AnyArray, groups: Ints) -> Share:
        """The share of single rows that are hits."""
        return cls(hits.astype(np.float64), np.ones(len(hits)), groups)

    @property
    def value(self) -> float:
        """The share."""
        return float(self.hits.sum() / self.rows.sum())

    @property
    def effective_rows(self) -> float:
        """The number of independent rows with the same variance; without variance, of groups."""
        _, rows, variance = self._by_group()
        if (rows == 1).all() or not variance:
            return float(len(rows))
        most = float(rows.sum())
        found = self.value * (1 - self.value) / variance
        found *= (t.ppf(TAIL, most - 1) / t.ppf(TAIL, len(rows) - 1)) ** 2
        return float(min(found, most))

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the share."""
        return clopper_pearson(self.value * self.effective_rows, self.effective_rows)

    @property
    def signed_interval(self) -> Interval:
        """Student's 95 % interval, for hits that may count as -1; within -1 and 1."""
        _, rows, variance = self._by_group()
        if len(rows) < 2:
            return -1.0, 1.0
        reach = float(-t.ppf(TAIL, len(rows) - 1) * variance**0.5)
        return max(-1.0, self.value - reach), min(1.0, self.value + reach)

    def _by_group(self) -> tuple[Floats, Floats, float]:
        """Hits [groups], rows [groups], and the variance of the ratio of their sums."""
        _, place = np.unique(self.groups, return_inverse=True)
        hits: Floats = np.bincount(place, weights=self.hits).astype(np.float64)
        rows: Floats = np.bincount(place, weights=self.rows).astype(np.float64)
        count = len(rows)
        squares = float(((hits - self.value * rows) ** 2).sum()) / float(rows.sum()) ** 2
        return hits, rows, count / (count - 1) * squares if count > 1 else 0.0


def clopper_pearson(hits: float, rows: float) -> Interval:
    """The 95 % interval of a share, after `hits` of `rows` independent rows; need not be whole."""
    low = beta.ppf(TAIL, hits, rows - hits + 1) if hits > 0 else 0.0
    high = beta.ppf(1 - TAIL, hits + 1, rows - hits) if hits < rows else 1.0
    return float(low), float(high)


def of_rounds(rounds: Sequence[Share]) -> tuple[float, Interval]:
    """The median over rounds of the same prompts, and its interval, which is that of one round."""
    value = statistics.median(one.value for one in rounds)
    middle = statistics.median_low(one.value for one in rounds)
    rows = next(one for one in rounds if one.value == middle).effective_rows
    return value, clopper_pearson(value * rows, rows)


def verdict(value: float, interval: Interval, epsilon: float) -> str:
    """Whether a measured share is within the bound, compatible with it, or above it."""
    bound = f"the bound of {epsilon:.1%}"
    if value <= epsilon:
        return f"within {bound}"
    return f"compatible with {bound}" if interval[0] <= epsilon else f"above {bound}"


def spelled(value: float, interval: Interval, digits: int = 1) -> str:
    """A share and its interval, such as ``2.3% (0.9 to 4.9%)``."""
    low, high = interval
    return f"{value:.{digits}%} ({100 * low:.{digits}f} to {high:.{digits}%})"


def share_in(row: Mapping[str, Any], name: str) -> str:
    """The share `name` in a row of a report, with its interval; see `spelled`."""
    return spelled(row[name], row[f"{name}_95"])
