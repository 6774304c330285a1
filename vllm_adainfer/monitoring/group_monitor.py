"""Monitor of answers that are not independent: how often they differ, counted by group.

A group is what calibration counts as one (see `offline/calibration/certify/bound.py`): the tokens
of a generated text, or the answers to all questions of one HTTP request, which are about one text.
The promise is E[answers that differ] <= epsilon E[answers], over groups, which are independent.

For the interval, a gambler bets on whole groups, as in Waudby-Smith and Ramdas 2020 (arXiv
2010.09686). Let n be the answers of a group that were compared and d those that differ, both as
shares of the most that count per group. A group multiplies the capital held against "the rate is at
most p" by

    1 + stake (d - p n) / p,   and that against "at least p" by   1 + stake (p n - d) / (1 - p).

Neither factor is negative, and at the rate p each has mean 1. So by Ville's inequality the capital
ever reaches 2 / alpha with probability at most alpha / 2. Capital is held against each rate of a
grid, as the mean over several stakes; the interval lies between the rejected rates.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.kinds import Risk
from vllm_adainfer.monitoring.monitor import Monitor, MonitorStatus
from vllm_adainfer.monitoring.query_monitor import ENDED_SINCE

STAKES = np.array([0.5, 0.25, 0.12, 0.06, 0.03, 0.015])
RATES = np.geomspace(1e-4, 0.98, 120)  # the grid, to which `GroupMonitor` adds its epsilons


@dataclass
class Group:
    """The answers of a group, as far as they have been compared.

    Attributes:
        level: the level of the epsilon table that they are decided at.
        checked: number of answers compared.
        disagreed: number of those that differed.
        seen_at: how many requests had ended when the latest of them was compared.
        complete: whether the group has ended or has as many answers as count.

    """

    level: int
    checked: int = 0
    disagreed: int = 0
    seen_at: int = 0
    complete: bool = False


class Capital:
    """The gambler's capital against each rate at one level; see the module docstring."""

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


class GroupMonitor(Monitor):
    """Watches answers by group: by text, or by the HTTP request that they are parts of.

    Groups are counted in the order in which they began. The order in which they end would be a
    biased sample: small ones come first. Nothing says how many parts an HTTP request has. It is
    complete once so many other requests have ended that no further part can be on its way.
    """

    def __init__(
        self,
        epsilons: Sequence[float],
        alpha: float,
        longest: int,
        risk: Risk = "disagreement",
        group_of: Callable[[str], str | None] | None = None,
    ) -> None:
        """Watch groups of which at most `longest` answers count; see `Monitor` for the rest.

        `group_of` gives the HTTP request that the request of an id is part of, None for one that is
        a group by itself; without it each request is.
        """
        super().__init__(epsilons, alpha, risk, longest)
        rates = np.union1d(RATES, self.epsilons)
        self._capital = [Capital(rates) for _ in epsilons]
        self._group_of = group_of
        self._ended = 0
        self._alone: dict[str, Group] = {}  # by request id
        self._of_parts: OrderedDict[str, Group] = OrderedDict()  # the one seen last comes last
        self._to_count: deque[Group] = deque()

    @override
    def observe(
        self, request_ids: Sequence[str], levels: Ints, disagreed: Bools
    ) -> list[MonitorStatus]:
        """Count each answer in its group; see `Monitor.observe`."""
        answers = zip(request_ids, levels.tolist(), disagreed.tolist(), strict=True)
        for request_id, level, differs in answers:
            group = self._group(request_id, level)
            if not group.complete:
                group.checked += 1
                group.disagreed += differs
                group.complete = group.checked == self._longest
        return self._count_complete()

    def _group(self, request_id: str, level: int) -> Group:
        """The group of an answer that has been compared; a new one if there is none."""
        name = None if self._group_of is None else self._group_of(request_id)
        groups = self._alone if name is None else self._of_parts
        key = request_id if name is None else name
        if key not in groups:
            groups[key] = Group(level)
            self._to_count.append(groups[key])
        group = groups[key]
        # A client may use one id for ever: what no longer counts does not keep its group going.
        if name is not None and not group.complete:
            group.seen_at = self._ended
            self._of_parts.move_to_end(name)
        return group

    @override
    def ended(self, request_id: str) -> list[MonitorStatus]:
        self._ended += 1
        over = [self._alone.pop(request_id)] if request_id in self._alone else []
        while self._of_parts:
            name, group = next(iter(self._of_parts.items()))
            if self._ended - group.seen_at < ENDED_SINCE:
                break
            over.append(self._of_parts.pop(name))
        for group in over:
            group.complete = True
        return self._count_complete()

    def _count_complete(self) -> list[MonitorStatus]:
        """Count complete groups, up to the first incomplete one."""
        found = []
        while self._to_count and self._to_count[0].complete:
            group = self._to_count.popleft()
            self._capital[group.level].bet(
                group.disagreed / self._longest, group.checked / self._longest
            )
            found += self._count(group.level, group.checked, group.disagreed)
        return found

    @override
    def _interval(self, level: int) -> tuple[float, float]:
        return self._capital[level].interval(self.alpha)
