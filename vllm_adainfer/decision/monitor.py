"""Disagreement in service: a confidence interval that may be looked at after every answer.

The interval is the beta-binomial mixture confidence sequence for a Bernoulli rate (Robbins 1970;
Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence
sequences"). With k disagreements among n answers it holds the rates p for which

    Beta(a + k, b + n - k) / Beta(a, b)  <  p^k (1 - p)^(n - k) / alpha.

At the true rate the ratio of the two sides is a martingale, so by Ville's inequality the interval
ever misses that rate with a chance of at most alpha, however often it is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

# (a, b) of the mixture. Any is valid; this one is narrow at rates of a few in a hundred.
PRIOR = (1.0, 10.0)


def confidence_interval(disagreed: int, checked: int, alpha: float) -> tuple[float, float]:
    """Rates that `disagreed` of `checked` leave possible, at every moment at once.

    Args:
        disagreed: k, how many of the answers differed.
        checked: n, how many were compared so far.
        alpha: chance that the interval ever misses the true rate.

    Returns:
        the lower and the upper end, in [0, 1].

    """
    a, b = PRIOR
    agreed = checked - disagreed
    evidence = betaln(a + disagreed, b + agreed) - betaln(a, b) + math.log(alpha)
    return _lower_end(disagreed, agreed, evidence), 1 - _lower_end(agreed, disagreed, evidence)


def _lower_end(hits: int, misses: int, evidence: float) -> float:
    """The rate p below hits / (hits + misses) whose log-likelihood is `evidence`; 0 without hits.

    Solved in log p, where ``hits * log p`` is above the log-likelihood and gives the bracket.
    """
    if hits == 0:
        return 0.0

    def excess(log_p: float) -> float:
        return float(hits * log_p + xlog1py(misses, -math.exp(log_p)) - evidence)

    best = math.log(hits / (hits + misses))
    return math.exp(brentq(excess, evidence / hits - 1, best))


class DisagreementMonitor:
    """Counts shadow answers for each row of the epsilon table, and says which bound is broken.

    A level is tightened when its interval lies above its epsilon. Counting goes on, but no level
    is loosened again: whoever serves has to look and to calibrate anew. The other levels stay as
    they are, stricter and looser ones alike: each has a bound and a reading of its own.

    Attributes:
        alpha: chance, for each level, that its interval ever misses the true rate.
        epsilons: fp64 [levels], the bounds, in the order of the epsilon table.
        tightened: bool [levels], whose requests must run to full depth.

    """

    def __init__(self, epsilons: Sequence[float], alpha: float) -> None:
        """`epsilons` are the bounds of the levels, in the order of the epsilon table."""
        self.alpha = alpha
        self.tightened: npt.NDArray[np.bool_] = np.zeros(len(epsilons), dtype=np.bool_)
        self.epsilons = np.array(epsilons, dtype=np.float64)
        self._checked = np.zeros(len(epsilons), dtype=np.int64)
        self._disagreed = np.zeros(len(epsilons), dtype=np.int64)

    def observe(
        self, levels: npt.NDArray[np.int64], disagreed: npt.NDArray[np.bool_]
    ) -> list[float]:
        """Count answers that have been compared with full depth.

        Args:
            levels: [answers], the row of the epsilon table each was decided with.
            disagreed: [answers].

        Returns:
            the epsilons of the levels that this has tightened.

        """
        np.add.at(self._checked, levels, 1)
        np.add.at(self._disagreed, levels, disagreed)
        broken = self._above_epsilon() & ~self.tightened
        self.tightened |= broken
        return [float(epsilon) for epsilon in self.epsilons[broken]]

    def _above_epsilon(self) -> npt.NDArray[np.bool_]:
        """Where the lower end exceeds epsilon, without solving for it."""
        (a, b), k, n, p = PRIOR, self._disagreed, self._checked, self.epsilons
        excluded = (
            betaln(a + k, b + n - k) - betaln(a, b) + math.log(self.alpha)
            >= xlogy(k, p) + xlog1py(n - k, -p)
        )  # fmt: skip
        return np.asarray(excluded & (k > n * p))

    def counts(self) -> list[tuple[float, int, int, bool]]:
        """Of each level: epsilon, answers checked, those that disagreed, whether it is tight."""
        columns = self.epsilons, self._checked, self._disagreed, self.tightened
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def as_dict(self) -> dict[float, dict[str, Any]]:
        """By epsilon: ``checked``, ``disagreed``, ``rate``, ``low``, ``high``, ``tightened``.

        Without answers the rate is 0 and the interval [0, 1].
        """
        return {float(epsilon): self._reading(level) for level, epsilon in enumerate(self.epsilons)}

    def _reading(self, level: int) -> dict[str, Any]:
        checked, disagreed = int(self._checked[level]), int(self._disagreed[level])
        low, high = confidence_interval(disagreed, checked, self.alpha)
        return {
            "checked": checked,
            "disagreed": disagreed,
            "rate": disagreed / max(checked, 1),
            "low": low,
            "high": high,
            "tightened": bool(self.tightened[level]),
        }
