"""Disagreement in service: a confidence interval that may be read after every answer.

Answers of one token each are independent. Their interval is the beta-binomial mixture confidence
sequence for a Bernoulli rate (Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences"). With k disagreements among n
answers it contains the rates p for which

    Beta(a + k, b + n - k) / Beta(a, b)  <  p^k (1 - p)^(n - k) / alpha.

At the true rate, the left side over p^k (1 - p)^(n - k) is a martingale. So by Ville's inequality
the chance that the interval ever misses the true rate is at most alpha, however often it is read.
Tokens of one text are not independent: `vllm_adainfer.monitoring.text_monitor` watches those.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy
from typing_extensions import override

from vllm_adainfer.artifact.kinds import Risk

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# (a, b) of the mixture. Any is valid; this one gives narrow intervals at rates of a few percent.
PRIOR = (1.0, 10.0)


@dataclass(frozen=True)
class Reading:
    """What shadow requests at one epsilon have shown.

    Attributes:
        epsilon: the bound.
        checked: number of answers compared with full depth.
        disagreed: number of those that differed.
        low: lower end of the confidence interval of the rate.
        high: its upper end; without answers the interval is [0, 1].
        tightened: whether requests at this epsilon must run to full depth.

    """

    epsilon: float
    checked: int
    disagreed: int
    low: float
    high: float
    tightened: bool

    @property
    def rate(self) -> float:
        """Share of answers that differed; 0 without answers."""
        return self.disagreed / max(self.checked, 1)

    def as_dict(self) -> dict[str, Any]:
        """All fields except `epsilon`, plus ``rate``."""
        return {
            "checked": self.checked,
            "disagreed": self.disagreed,
            "rate": self.rate,
            "low": self.low,
            "high": self.high,
            "tightened": self.tightened,
        }


@lru_cache
def confidence_interval(disagreed: int, checked: int, alpha: float) -> tuple[float, float]:
    """The time-uniform confidence interval of the rate of disagreement.

    Args:
        disagreed: k, the number of answers that differed.
        checked: n, the number of answers compared so far.
        alpha: upper bound on the chance that the interval ever misses the true rate.

    Returns:
        the lower and the upper end, in [0, 1].

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


class Monitor(ABC):
    """Counts disagreement for each level of a policy's epsilon table, and reports broken bounds.

    If epsilon bounds disagreement (or the share of answers whose probabilities move too far, which
    then count as disagreeing), a level is tightened once its interval lies above its epsilon.
    If epsilon bounds the accuracy lost, no level is tightened: accuracy lost is at most the
    disagreement but may be less, and service does not know the right answers. Such a bound is
    confirmed while the interval lies below it.

    A tightened level goes on counting but is never loosened again: the operator must investigate
    and recalibrate. Other levels, stricter or looser, are unaffected: each has its own bound and
    its own reading.

    Attributes:
        alpha: for each level, upper bound on the chance that its interval ever misses the true
            rate.
        epsilons: fp64 [levels], the bounds, in the order of the epsilon table.
        tightened: bool [levels], True where requests must run to full depth.
        risk: what the bounds are on.

    """

    def __init__(
        self, epsilons: Sequence[float], alpha: float, risk: Risk = "disagreement"
    ) -> None:
        """`epsilons` bound `risk` at each level, in the order of the epsilon table."""
        self.alpha = alpha
        self.epsilons = np.array(epsilons, dtype=np.float64)
        self.tightened: Bools = np.zeros(len(epsilons), dtype=np.bool_)
        self.risk = risk
        self._checked, self._disagreed = [0] * len(epsilons), [0] * len(epsilons)
        self._exceeded = [False] * len(epsilons)

    @abstractmethod
    def observe(self, request_ids: Sequence[str], levels: Ints, disagreed: Bools) -> list[Reading]:
        """Count answers that have been compared with full depth.

        Args:
            request_ids: [answers], the request of each.
            levels: [answers], the level each was decided at.
            disagreed: [answers], True where the answer differs from full depth.

        Returns:
            readings of the levels whose interval has just moved above their epsilon.

        """

    @abstractmethod
    def ended(self, request_id: str) -> list[Reading]:
        """Note that a request, of this policy or not, has ended; returns what `observe` does."""

    @abstractmethod
    def _interval(self, level: int) -> tuple[float, float]:
        """The time-uniform confidence interval of a level's rate."""

    @abstractmethod
    def _exceeds(self, level: int) -> bool:
        """Whether the level's interval lies above its epsilon."""

    def levels_of(self, tags: Ints) -> Ints:
        """[tags], the level of each; a policy may have the levels for each of several questions."""
        levels: Ints = tags % len(self.epsilons)
        return levels

    def of_tags(self, num_tags: int) -> Bools:
        """bool [num_tags], `tightened` by the policy's tags."""
        return self.tightened[self.levels_of(np.arange(num_tags))]

    def readings(self) -> list[Reading]:
        """The reading of each level."""
        return [self._reading(level) for level in range(len(self.epsilons))]

    def as_dict(self) -> dict[float, dict[str, Any]]:
        """`Reading.as_dict` of each level, by epsilon."""
        return {reading.epsilon: reading.as_dict() for reading in self.readings()}

    def _reading(self, level: int) -> Reading:
        return Reading(
            float(self.epsilons[level]),
            self._checked[level],
            self._disagreed[level],
            *self._interval(level),
            bool(self.tightened[level]),
        )

    def _count(self, level: int, checked: int, disagreed: int) -> list[Reading]:
        """Add answers to a level; returns its reading if it has just exceeded its epsilon."""
        self._checked[level] += checked
        self._disagreed[level] += disagreed
        if self._exceeded[level] or not self._exceeds(level):
            return []
        self._exceeded[level] = True
        self.tightened[level] = self.risk != "accuracy"
        return [self._reading(level)]


class AnswerMonitor(Monitor):
    """Watches answers of one token, each its own request."""

    @override
    def observe(self, request_ids: Sequence[str], levels: Ints, disagreed: Bools) -> list[Reading]:
        found = []
        for level in np.unique(levels).tolist():
            here = disagreed[levels == level]
            found += self._count(level, len(here), int(np.count_nonzero(here)))
        return found

    @override
    def ended(self, request_id: str) -> list[Reading]:
        return []

    @override
    def _interval(self, level: int) -> tuple[float, float]:
        return confidence_interval(self._disagreed[level], self._checked[level], self.alpha)

    @override
    def _exceeds(self, level: int) -> bool:
        """Compare the lower end with epsilon without solving for it."""
        (a, b), p = PRIOR, float(self.epsilons[level])
        k, n = self._disagreed[level], self._checked[level]
        mixture = betaln(a + k, b + n - k) - betaln(a, b)
        at_epsilon = xlogy(k, p) + xlog1py(n - k, -p)
        return k > n * p and bool(mixture + math.log(self.alpha) >= at_epsilon)
