"""Speed-ups over paired rounds, with 95 % intervals, and whether they tell anything.

In a round, all that is compared runs in turn, so a ratio is of two times that lie close together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm, t

from vllm_adainfer.offline.reports.shares import TAIL, Interval

LEAST_ROUNDS = 6  # of fewer rounds all lie on one side of the true median in over 5 % of cases
TELLS = 0.05  # an interval that reaches further to either side, as a share of the ratio, is noise


@dataclass(frozen=True)
class Speedup:
    """The ratio of two times, of which each round has one pair.

    Attributes:
        ratios: that of each round, stock's seconds / ours.

    """

    ratios: tuple[float, ...]

    @classmethod
    def of(cls, stock: Sequence[float], ours: Sequence[float]) -> Speedup:
        """The speed-up over `stock`, given the seconds of both in each round."""
        return cls(tuple(one / other for one, other in zip(stock, ours, strict=True)))

    @cached_property
    def value(self) -> float:
        """The median of the rounds: on a busy host single rounds are far off."""
        return float(np.median(self.ratios))

    @cached_property
    def interval(self) -> Interval | None:
        """The 95 % interval, with rounds drawn anew; None if there are fewer than `LEAST_ROUNDS`.

        Quantiles of draws are too close together if rounds are few. They are taken as much further
        out as Student's interval of so many rounds is wider (Hesterberg 2015).
        """
        count = len(self.ratios)
        if count < LEAST_ROUNDS:
            return None
        outside = norm.cdf((count / (count - 1)) ** 0.5 * t.ppf(TAIL, count - 1))
        found = bootstrap(
            (np.array(self.ratios),),
            np.median,
            confidence_level=1 - 2 * outside,
            method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval
        return float(found.low), float(found.high)

    @classmethod
    def read(cls, report: Mapping[str, Any], name: str) -> Speedup:
        """One among the `entries` of a report; of an older report, its ratio alone."""
        return cls(tuple(report.get(f"{name}_rounds", [report[name]])))

    def entries(self, name: str) -> dict[str, Any]:
        """Those of a report: the ratio as `name`, its interval as ``_95``, and the rounds."""
        return {name: self.value, f"{name}_95": self.interval, f"{name}_rounds": [*self.ratios]}

    def times(self, factor: float) -> Speedup:
        """The ratio of all rounds, times `factor`."""
        return Speedup(tuple(factor * one for one in self.ratios))

    @property
    def reach(self) -> float | None:
        """How far the interval reaches to either side, as a share of the ratio."""
        return self.interval and (self.interval[1] - self.interval[0]) / 2 / self.value

    @property
    def least(self) -> float:
        """The lower end of the interval; without one, nothing is too little."""
        return 0.0 if self.interval is None else self.interval[0]

    @property
    def most(self) -> float:
        """The upper end of the interval; without one, nothing is too much."""
        return math.inf if self.interval is None else self.interval[1]

    @property
    def around(self) -> str:
        """The interval, such as ``(1.58 to 1.73)``; of few rounds, their range."""
        if self.interval is not None:
            return f"({self.interval[0]:.2f} to {self.interval[1]:.2f})"
        few, least, most = len(self.ratios), min(self.ratios), max(self.ratios)
        return f"({few} rounds: {least:.2f} to {most:.2f})" if few > 1 else ""

    @property
    def text(self) -> str:
        """Such as ``1.66x (1.58 to 1.73)``."""
        return f"{self.value:.2f}x {self.around}".strip()

    @property
    def bold(self) -> str:
        """The text with its ratio in bold, in Markdown."""
        return f"**{self.value:.2f}x** {self.around}".strip()


def doubt(*measured: Speedup) -> str | None:
    """Why the speed-ups tell too little; None if they tell enough."""
    reaches = [one.reach for one in measured if one.reach is not None]
    if len(reaches) < len(measured):
        return f"Fewer than {LEAST_ROUNDS} rounds have no 95 % interval: run more of them."
    if max(reaches) <= TELLS:
        return None
    return (
        f"This host is too noisy to tell: an interval reaches ±{max(reaches):.2f} of its ratio, "
        f"more than ±{TELLS:.2f}. Run more rounds, with nothing else on its cores."
    )
