"""Confidence intervals of a rate of disagreement that may be read after every answer.

One-token answers are independent. Their interval is the beta-binomial mixture confidence sequence
for a Bernoulli rate
(Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences"). With k disagreements among n answers it contains the rates p
for which

    Beta(a + k, b + n - k) / Beta(a, b)  <  p^k (1 - p)^(n - k) / alpha.

At the true rate, the left side over p^k (1 - p)^(n - k) is a martingale. So by Ville's inequality
the interval ever misses the true rate with probability at most alpha, however often it is read.
That is the interval of one rate: while the rate changes, it promises nothing.

Tokens of one text, and answers about one text, are not independent, but groups of them are. There
a gambler bets on whole groups, as in Waudby-Smith and Ramdas 2020 (arXiv 2010.09686). Let n be the
answers of a group that were compared and d those that differ, both as shares of the most that count
per group. A group multiplies the capital held against "the rate is at most p" by

    1 + stake (d - p n) / p,   and that against "at least p" by   1 + stake (p n - d) / (1 - p).

Neither factor is negative, and at the rate p each has mean 1. So by Ville's inequality the capital
ever reaches 2 / alpha with probability at most alpha / 2. Capital is held against each rate of a
grid, as the mean over several stakes; the interval lies between the rejected rates.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln, logsumexp, xlog1py

from vllm_adainfer.arrays import Floats

# (a, b) of the mixture. Any is valid; this one gives narrow intervals at rates of a few percent.
PRIOR = (1.0, 10.0)
STAKES = np.array([0.5, 0.25, 0.12, 0.06, 0.03, 0.015])
RATES = np.geomspace(1e-4, 0.98, 120)  # the grid, to which a watch adds its epsilons


@lru_cache
def confidence_interval(disagreed: int, checked: int, alpha: float) -> tuple[float, float]:
    """The time-uniform confidence interval of the rate of disagreement, within [0, 1].

    `alpha` is the probability with which it may ever miss the true rate.
    """
    a, b = PRIOR
    agreed = checked - disagreed
    evidence = betaln(a + disagreed, b + agreed) - betaln(a, b) + math.log(alpha)
    return _lower_end(disagreed, agreed, evidence), 1 - _lower_end(agreed, disagreed, evidence)


def _lower_end(hits: int, misses: int, evidence: float) -> float:
    """The rate p below hits / (hits + misses) whose log-likelihood is `evidence`; 0 without hits.

    Solved in log p: ``hits * log p`` bounds the log-likelihood from above, which gives the bracket.
    """
    if hits == 0:
        return 0.0

    def excess(log_p: float) -> float:
        return float(hits * log_p + xlog1py(misses, -math.exp(log_p)) - evidence)

    best = math.log(hits / (hits + misses))
    return math.exp(brentq(excess, evidence / hits - 1, best))


class Capital:
    """The gambler's capital against each rate, where groups count; see the module docstring."""

    def __init__(self, rates: Floats) -> None:
        """`rates` [rates] ascend, between 0 and 1."""
        self._rates = rates
        # [2, rates, stakes], first against "at most", then against "at least" each rate.
        self._log_capital = np.zeros((2, len(rates), len(STAKES)))

    def bet(self, disagreed: float, checked: float) -> None:
        """Bet on a group; both numbers are shares of the most answers that count."""
        lead = disagreed - self._rates * checked
        odds = np.stack([lead / self._rates, -lead / (1 - self._rates)])
        self._log_capital += np.log1p(odds[:, :, None] * STAKES)

    def interval(self, alpha: float) -> tuple[float, float]:
        """The highest rate rejected as too low, and the lowest rejected as too high."""
        held = logsumexp(self._log_capital, axis=2) - math.log(len(STAKES))
        too_low, too_high = held >= math.log(2 / alpha)
        low, high = self._rates[too_low], self._rates[too_high]
        return float(low.max(initial=0.0)), float(high.min(initial=1.0))
