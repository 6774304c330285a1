"""Monitors of shadow requests: how often early answers differ from full depth, level by level.

What closes a level is evidence that its bound does not hold now, see
`vllm_adainfer.monitoring.evidence`. What is shown is the rate since start, with a confidence
interval that may be read after every answer, and the latest counts.

One-token answers are independent. Their interval is the beta-binomial mixture confidence sequence
for a Bernoulli rate
(Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences"). With k disagreements among n answers it contains the rates p
for which

    Beta(a + k, b + n - k) / Beta(a, b)  <  p^k (1 - p)^(n - k) / alpha.

At the true rate, the left side over p^k (1 - p)^(n - k) is a martingale. So by Ville's inequality
the interval ever misses the true rate with probability at most alpha, however often it is read.
That is the interval of one rate: while the rate changes, it promises nothing. Tokens of one text,
and answers about one text, are not independent; `vllm_adainfer.monitoring.group_monitor` is for
those.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.artifact.kinds import Risk
from vllm_adainfer.monitoring.evidence import Evidence

# (a, b) of the mixture. Any is valid; this one gives narrow intervals at rates of a few percent.
PRIOR = (1.0, 10.0)
LATEST = 100  # units (answers, or groups of them) whose counts are shown beside those since start


@dataclass(frozen=True)
class MonitorStatus:
    """What the shadow requests at one level have shown so far.

    Attributes:
        epsilon: the level's bound.
        checked: number of answers compared with full depth.
        disagreed: number of those that differed.
        low: lower end of the confidence interval of the rate.
        high: upper end of the interval, which is [0, 1] before the first answer.
        latest_checked: those of the answers that are in the latest `LATEST` units.
        latest_disagreed: number of these that differed.
        tightened: whether requests at this level must run to full depth.

    """

    epsilon: float
    checked: int
    disagreed: int
    low: float
    high: float
    latest_checked: int
    latest_disagreed: int
    tightened: bool

    @property
    def rate(self) -> float:
        """Share of answers that differed; 0 before the first answer."""
        return self.disagreed / max(self.checked, 1)

    def as_dict(self) -> dict[str, Any]:
        """All fields except `epsilon`, plus ``rate``."""
        fields = {**asdict(self), "rate": self.rate}
        del fields["epsilon"]
        return fields


@lru_cache
def confidence_interval(disagreed: int, checked: int, alpha: float) -> tuple[float, float]:
    """The time-uniform confidence interval of the rate of disagreement.

    Args:
        disagreed: k, the number of answers that differed.
        checked: n, the number of answers compared so far.
        alpha: the probability with which the interval may ever miss the true rate.

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


@dataclass(frozen=True)
class LabelWatch:
    """Watches a promise about one label, see `LabelBound`.

    Attributes:
        promise: what is promised.
        column: the label's place among those of the policy.
        monitor: counts the answers that it is about, at each level of the policy.

    """

    promise: LabelBound
    column: int
    monitor: Monitor


class Monitor(ABC):
    """Counts disagreement at each level of a policy's epsilon table, and detects broken bounds.

    A bound is found broken once there is `Evidence` of it, which happens with probability at most
    alpha if the bound holds. The level is then tightened: its requests run to full depth. It keeps
    counting but is never loosened again, because the operator must investigate and recalibrate.
    Levels are independent of each other.

    If epsilon bounds label probabilities, an answer with a probability that moved too far counts as
    a disagreement. If epsilon bounds the accuracy lost, no level is ever tightened: the accuracy
    lost is at most the disagreement but may be less, and the right answers are unknown in service.

    Attributes:
        alpha: the probability with which a level may ever be found broken though it holds, and
            that with which its interval may ever miss a rate that stays as it is.
        epsilons: fp64 [levels], the bounds, in the order of the epsilon table.
        tightened: bool [levels], True where requests must run to full depth.
        risk: what the bounds are on.
        labels: watch promises about single labels. Each may close a level, too.

    """

    labels: Sequence[LabelWatch] = ()

    def __init__(
        self,
        epsilons: Sequence[float],
        alpha: float,
        risk: Risk = "disagreement",
        longest: int = 1,
    ) -> None:
        """`epsilons` bound `risk` at each level; `longest` is the most answers of a unit."""
        self.alpha = alpha
        self.epsilons = np.array(epsilons, dtype=np.float64)
        self.tightened: Bools = np.zeros(len(epsilons), dtype=np.bool_)
        self.risk = risk
        self._checked, self._disagreed = [0] * len(epsilons), [0] * len(epsilons)
        self._longest = longest
        self._evidence = [Evidence(epsilon, alpha) for epsilon in epsilons]
        self._latest: list[deque[tuple[int, int]]] = [deque(maxlen=LATEST) for _ in epsilons]
        self._broken = [False] * len(epsilons)

    def watch_labels(
        self, promises: Mapping[LabelBound, int], make: Callable[[Sequence[float]], Monitor]
    ) -> None:
        """Watch promises about single labels, too.

        Args:
            promises: by promise, the label's column.
            make: makes a monitor of such bounds.

        """
        levels = len(self.epsilons)
        self.labels = [
            LabelWatch(one, column, make([one.epsilon] * levels))
            for one, column in promises.items()
        ]
        for watch in self.labels:
            watch.monitor.tightened = self.tightened

    @abstractmethod
    def observe(
        self, request_ids: Sequence[str], levels: Ints, disagreed: Bools
    ) -> list[MonitorStatus]:
        """Count answers that have been compared with full depth.

        Args:
            request_ids: [answers], the request of each.
            levels: [answers], the level each was decided at.
            disagreed: [answers], True where the answer differs from full depth.

        Returns:
            the status of each level whose bound has just been found broken.

        """

    def ended(self, request_id: str) -> list[MonitorStatus]:
        """Note that a request, of this policy or not, has ended; returns what `observe` does."""
        return []

    @abstractmethod
    def _interval(self, level: int) -> tuple[float, float]:
        """The time-uniform confidence interval of a level's rate."""

    def levels_of(self, threshold_rows: Ints) -> Ints:
        """[rows], the level of each of a policy's threshold rows, which repeat by question."""
        levels: Ints = threshold_rows % len(self.epsilons)
        return levels

    def tightened_rows(self, num_threshold_rows: int) -> Bools:
        """bool [num_threshold_rows], `tightened` for each of the policy's threshold rows."""
        return self.tightened[self.levels_of(np.arange(num_threshold_rows))]

    def status(self) -> list[MonitorStatus]:
        """The status of each level."""
        return [self._status(level) for level in range(len(self.epsilons))]

    def as_dict(self) -> dict[float, dict[str, Any]]:
        """`MonitorStatus.as_dict` of each level, by epsilon; with what is watched by label."""
        found = {status.epsilon: status.as_dict() for status in self.status()}
        for watch in self.labels:
            name = f"{watch.promise.kind} of {watch.promise.label}"
            for level, status in zip(found.values(), watch.monitor.status(), strict=True):
                level.setdefault("labels", {})[name] = status.as_dict()
        return found

    def _status(self, level: int) -> MonitorStatus:
        return MonitorStatus(
            float(self.epsilons[level]),
            self._checked[level],
            self._disagreed[level],
            *self._interval(level),
            sum(checked for checked, _ in self._latest[level]),
            sum(disagreed for _, disagreed in self._latest[level]),
            bool(self.tightened[level]),
        )

    def _tally(self, level: int, checked: int, disagreed: int) -> None:
        """Count a unit at a level in what is shown."""
        self._checked[level] += checked
        self._disagreed[level] += disagreed
        self._latest[level].append((checked, disagreed))

    def _count(self, level: int, checked: int, disagreed: int) -> list[MonitorStatus]:
        """Count a unit at a level; returns the level's status if its bound is now found broken."""
        self._tally(level, checked, disagreed)
        if self._broken[level]:
            return []
        self._broken[level] = self._evidence[level].add(
            disagreed / self._longest, checked / self._longest
        )
        if not self._broken[level]:
            return []
        self.tightened[level] = self.risk != "accuracy"
        return [self._status(level)]


class AnswerMonitor(Monitor):
    """Watches one-token answers, each from its own request."""

    @override
    def observe(
        self, request_ids: Sequence[str], levels: Ints, disagreed: Bools
    ) -> list[MonitorStatus]:
        found = []
        for level, differs in zip(levels.tolist(), disagreed.tolist(), strict=True):
            found += self._count(level, 1, differs)
        return found

    @override
    def _interval(self, level: int) -> tuple[float, float]:
        return confidence_interval(self._disagreed[level], self._checked[level], self.alpha)
