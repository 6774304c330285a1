"""Disagreement in service: a confidence interval that may be looked at after every answer.

Answers of one token each are independent. Their interval is the beta-binomial mixture confidence
sequence for a Bernoulli rate (Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences"). With k disagreements among n
answers it holds the rates p for which

    Beta(a + k, b + n - k) / Beta(a, b)  <  p^k (1 - p)^(n - k) / alpha.

At the true rate the ratio of the two sides is a martingale, so by Ville's inequality the interval
ever misses that rate with a chance of at most alpha, however often it is looked at. Tokens of one
text are not independent: `vllm_adainfer.policy.text_monitor` watches those.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Risk = Literal["disagreement", "accuracy"]

# (a, b) of the mixture. Any is valid; this one is narrow at rates of a few in a hundred.
PRIOR = (1.0, 10.0)


@dataclass(frozen=True)
class Reading:
    """What shadow requests at one epsilon have shown.

    Attributes:
        epsilon: the bound.
        checked: answers compared with full depth.
        disagreed: those that differed.
        low: lower end of the interval of the rate.
        high: its upper end; the interval is [0, 1] without answers.
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
        """Share of answers that differed, 0 without answers."""
        return self.disagreed / max(self.checked, 1)

    def as_dict(self) -> dict[str, Any]:
        """All but `epsilon`, and ``rate``."""
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


class Monitor(ABC):
    """Counts for each row of a policy's epsilon table, and says which bound is broken.

    A level is tightened when its interval lies above its epsilon, if epsilon bounds disagreement.
    Accuracy lost is at most the disagreement, but may be less, and the right answers are not known
    in service: such a bound is confirmed while the interval lies below it, and never tightened.
    Counting goes on, but no level is loosened again: whoever serves has to look and to calibrate
    anew. The other levels stay as they are, stricter and looser ones alike: each has a bound and a
    reading of its own.

    Attributes:
        alpha: chance, for each level, that its interval ever misses the true rate.
        epsilons: fp64 [levels], the bounds, in the order of the epsilon table.
        tightened: bool [levels], whose requests must run to full depth.

    """

    def __init__(
        self, epsilons: Sequence[float], alpha: float, risk: Risk = "disagreement"
    ) -> None:
        """`epsilons` are the bounds of the levels, in the order of the epsilon table, on `risk`."""
        self.alpha = alpha
        self.epsilons = np.array(epsilons, dtype=np.float64)
        self.tightened: Bools = np.zeros(len(epsilons), dtype=np.bool_)
        self._closes = risk == "disagreement"
        self._checked, self._disagreed = [0] * len(epsilons), [0] * len(epsilons)
        self._exceeded = [False] * len(epsilons)

    @abstractmethod
    def observe(self, request_ids: Sequence[str], levels: Ints, disagreed: Bools) -> list[Reading]:
        """Count answers that have been compared with full depth.

        Args:
            request_ids: [answers], whose each is.
            levels: [answers], the row of the epsilon table each was decided with.
            disagreed: [answers].

        Returns:
            of the levels whose interval now lies above their epsilon, and did not before.

        """

    @abstractmethod
    def ended(self, request_id: str) -> list[Reading]:
        """A request, of this policy or not, has no more answers; returns as `observe` does."""

    @abstractmethod
    def _interval(self, level: int) -> tuple[float, float]:
        """Rates that are possible, at every moment at once."""

    @abstractmethod
    def _exceeds(self, level: int) -> bool:
        """Whether that interval lies above the level's epsilon."""

    def readings(self) -> list[Reading]:
        """Of each level."""
        return [self._reading(level) for level in range(len(self.epsilons))]

    def as_dict(self) -> dict[float, dict[str, Any]]:
        """By epsilon, see `Reading.as_dict`."""
        return {one.epsilon: one.as_dict() for one in self.readings()}

    def _reading(self, level: int) -> Reading:
        return Reading(
            float(self.epsilons[level]),
            self._checked[level],
            self._disagreed[level],
            *self._interval(level),
            bool(self.tightened[level]),
        )

    def _count(self, level: int, checked: int, disagreed: int) -> list[Reading]:
        """Count so many answers of a level; its reading if that shows it above its epsilon."""
        self._checked[level] += checked
        self._disagreed[level] += disagreed
        if self._exceeded[level] or not self._exceeds(level):
            return []
        self._exceeded[level] = True
        self.tightened[level] = self._closes
        return [self._reading(level)]


class AnswerMonitor(Monitor):
    """Watches answers of one token."""

    def observe(self, request_ids: Sequence[str], levels: Ints, disagreed: Bools) -> list[Reading]:
        """See `Monitor.observe`."""
        found = []
        for level in np.unique(levels).tolist():
            here = disagreed[levels == level]
            found += self._count(level, len(here), int(np.count_nonzero(here)))
        return found

    def ended(self, request_id: str) -> list[Reading]:
        """See `Monitor.ended`: each answer was a request."""
        return []

    def _interval(self, level: int) -> tuple[float, float]:
        return confidence_interval(self._disagreed[level], self._checked[level], self.alpha)

    def _exceeds(self, level: int) -> bool:
        """Whether the lower end exceeds epsilon, without solving for it."""
        (a, b), p = PRIOR, float(self.epsilons[level])
        k, n = self._disagreed[level], self._checked[level]
        mixture = betaln(a + k, b + n - k) - betaln(a, b)
        at_epsilon = xlogy(k, p) + xlog1py(n - k, -p)
        return k > n * p and bool(mixture + math.log(self.alpha) >= at_epsilon)
