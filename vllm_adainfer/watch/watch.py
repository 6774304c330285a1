"""Watches a policy's early answers: how often they differ from full depth, level by level.

What closes a level is `Evidence` that its bound does not hold now. What admits requests, in a
server that calibrates itself, is a `Ledger`, which counts the same answers. What is shown is the
rate since start, with a confidence interval that may be read after every answer, and the latest
counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.promise import Promise
from vllm_adainfer.watch.evidence import Evidence, log_factors
from vllm_adainfer.watch.intervals import RATES, Capital, confidence_interval
from vllm_adainfer.watch.units import EACH_ANSWER, Grouping, Queries, Units

LATEST = 100  # units whose counts are shown beside those since start
BLOCK = 100  # units, after which other gamblers bet against a bound
STAKES, LARGEST_STAKE = 24, 0.9
ANSWERS_ALONE = Changed()


@dataclass(frozen=True)
class Reading:
    """The results of the shadow requests at one level, whose bound is `epsilon`, so far.

    The other numbers are those of `vllm_adainfer.stats.ShadowChecks`.
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


class Level:
    """The counts of one level, and what bets on them."""

    def __init__(self, epsilon: float, alpha: float, grouping: Grouping, closes: bool) -> None:
        """Bound `epsilon`; see `Watch`."""
        self.epsilon, self._alpha, self._most = epsilon, alpha, grouping.most
        self.checked = self.disagreed = 0
        self.latest: deque[tuple[int, int]] = deque(maxlen=LATEST)
        # Of single answers, from the likelihood of a rate of 1.2 epsilon to that of 0.9 or more.
        self._stakes = np.geomspace(min(epsilon / 5, LARGEST_STAKE), LARGEST_STAKE, STAKES)
        self._evidence = Evidence(STAKES, BLOCK, alpha) if closes else None
        self._capital = Capital(np.union1d(RATES, [epsilon])) if self._most > 1 else None

    def count(self, checked: int, disagreed: int) -> bool:
        """Count a unit; returns whether its bound is now found broken, which happens once."""
        self.checked += checked
        self.disagreed += disagreed
        self.latest.append((checked, disagreed))
        shares = disagreed / self._most, checked / self._most
        if self._capital is not None:
            self._capital.bet(*shares)
        if self._evidence is None:
            return False
        self._evidence.add(log_factors(self._stakes, self.epsilon, *shares))
        if not self._evidence.is_enough:
            return False
        self._evidence = None
        return True

    def interval(self) -> tuple[float, float]:
        """The time-uniform confidence interval of the rate."""
        if self._capital is not None:
            return self._capital.interval(self._alpha)
        return confidence_interval(self.disagreed, self.checked, self._alpha)


class Watch:
    """Counts disagreement at each level of a policy's epsilon table, and detects broken bounds.

    A bound is found broken once there is `Evidence` of it, which happens with probability at most
    alpha if the bound holds. The level is then tightened: its requests run to full depth. It keeps
    counting but is never loosened again, because the operator must investigate and recalibrate.
    Levels are independent of each other.

    A disagreement is an answer that is wrong by the promise. If it is about the accuracy lost, no
    level is ever tightened: the accuracy lost is at most the disagreement but may be less, and the
    right answers are unknown in service.

    Attributes:
        alpha: the probability with which a level may ever be found broken though it holds, and
            that with which its interval may ever miss a rate that stays as it is.
        epsilons: fp64 [levels], the bounds, in the order of the epsilon table.
        tightened: bool [levels], True where requests must run to full depth.
        promise: what the bounds are on.
        queries: what documents are noted in, where queries count once; None elsewhere.
        about: the one label that answers are counted of, and its column; None for all answers.
        labels: watches of promises about single labels. Each may close a level, too.

    """

    labels: Sequence[Watch] = ()
    about: tuple[LabelBound, int] | None = None

    def __init__(
        self,
        epsilons: Sequence[float],
        alpha: float,
        grouping: Grouping = EACH_ANSWER,
        promise: Promise = ANSWERS_ALONE,
        closes: bool = True,
    ) -> None:
        """`epsilons` bound a promise, by level; without `closes`, a ledger judges the counts."""
        self.alpha, self.promise = alpha, promise
        self.epsilons = np.array(epsilons, dtype=np.float64)
        self.tightened: Bools = np.zeros(len(epsilons), dtype=np.bool_)
        self._grouping, self._closes = grouping, closes
        self._levels = [Level(one, alpha, grouping, closes) for one in epsilons]
        self.queries = None if grouping.loses is None else Queries(grouping)
        self._units = Units(grouping) if self.queries is None else self.queries
        self._new: dict[float, tuple[int, int]] = {}

    def watch_labels(self, promises: Mapping[LabelBound, int]) -> None:
        """Watch promises about single labels, too; `promises` gives the column of each's label."""
        self.labels = []
        for promise, column in promises.items():
            bounds = [promise.epsilon] * len(self.epsilons)
            watch = Watch(bounds, self.alpha, self._grouping, self.promise, self._closes)
            watch.about, watch.tightened = (promise, column), self.tightened
            self.labels.append(watch)

    def expect(self, request_id: str, level: int) -> None:
        """An answer begins that `observe` counts later: before all that begin after it.

        If its request ends first, it never counts.
        """
        self._units.expect(request_id, level)

    def observe(self, request_ids: Sequence[str], levels: Ints, disagreed: Bools) -> list[Reading]:
        """Count answers that have been compared with full depth; all are [answers].

        Returns the reading of each level whose bound has just been found broken.
        """
        found = []
        answers = zip(request_ids, levels.tolist(), disagreed.tolist(), strict=True)
        for answer in answers:
            self._units.add(*answer)
            found += self._count_complete()
        return found

    def ended(self, request_id: str, ran: bool = True) -> list[Reading]:
        """A request, of this policy or not, has ended; returns what `observe` does.

        `ran`: whether it ever ran; it may not have if its client hung up.
        """
        self._units.ended(request_id, ran)
        return self._count_complete()

    def take_counted(self) -> list[tuple[float, int, int]]:
        """By epsilon, the answers counted since the last call, and those of them that differed."""
        counted = [(epsilon, *counts) for epsilon, counts in self._new.items()]
        self._new = {}
        return counted

    def levels_of(self, threshold_rows: Ints) -> Ints:
        """[rows], the level of each of a policy's threshold rows, which repeat by question."""
        levels: Ints = threshold_rows % len(self.epsilons)
        return levels

    def tightened_rows(self, num_threshold_rows: int) -> Bools:
        """bool [num_threshold_rows], `tightened` for each of the policy's threshold rows."""
        return self.tightened[self.levels_of(np.arange(num_threshold_rows))]

    def readings(self) -> list[Reading]:
        """The reading of each level."""
        return [self._reading(level) for level in range(len(self.epsilons))]

    def as_dict(self) -> dict[float, dict[str, Any]]:
        """`Reading.as_dict` of each level, by epsilon; with what is watched by label."""
        found = {reading.epsilon: reading.as_dict() for reading in self.readings()}
        for watch in self.labels:
            assert watch.about is not None
            promise, _ = watch.about
            name = f"{promise.kind} of {promise.label}"
            for level, reading in zip(found.values(), watch.readings(), strict=True):
                level.setdefault("labels", {})[name] = reading.as_dict()
        return found

    def _reading(self, level: int) -> Reading:
        counts = self._levels[level]
        return Reading(
            counts.epsilon,
            counts.checked,
            counts.disagreed,
            *counts.interval(),
            sum(checked for checked, _ in counts.latest),
            sum(disagreed for _, disagreed in counts.latest),
            bool(self.tightened[level]),
        )

    def _count_complete(self) -> list[Reading]:
        """Count complete units; returns the readings of levels whose bound is now found broken."""
        found = []
        for unit in self._units.take_complete():
            counts = self._levels[unit.level]
            checked, disagreed = self._new.get(counts.epsilon, (0, 0))
            self._new[counts.epsilon] = checked + unit.checked, disagreed + unit.disagreed
            if counts.count(unit.checked, unit.disagreed):
                self.tightened[unit.level] = self.promise.closes
                found.append(self._reading(unit.level))
        return found
