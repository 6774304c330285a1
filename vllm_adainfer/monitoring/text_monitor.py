"""Monitor of generated text: how often its tokens differ from full depth, counted by text.

A bound on generated text promises E[tokens that differ] <= epsilon E[tokens], over prompts (see
`offline/calibration/certify/certify.py`). Tokens of one text are not independent, but texts are. So
a gambler bets on whole texts, as in Waudby-Smith and Ramdas 2020 (arXiv 2010.09686). Let n be
the tokens of a text that were compared and d those that differ, both as shares of the most tokens
that count per text. A text multiplies the capital held against "the rate is at most p" by

    1 + stake (d - p n) / p,   and that against "at least p" by   1 + stake (p n - d) / (1 - p).

Neither factor is negative, and at the rate p each has mean 1. So by Ville's inequality the capital
ever reaches 2 / alpha with probability at most alpha / 2. Capital is held against each rate of a
grid, as the mean over several stakes; the interval lies between the rejected rates.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.monitoring.monitor import Monitor, MonitorStatus

STAKES = np.array([0.5, 0.25, 0.12, 0.06, 0.03, 0.015])
RATES = np.geomspace(1e-4, 0.98, 120)  # the grid, to which `TextMonitor` adds its epsilons


@dataclass
class Text:
    """The text of a shadow request, as far as it has been compared.

    Attributes:
        level: the level of the epsilon table that its tokens are decided at.
        checked: number of tokens compared.
        disagreed: number of those that differed.
        complete: whether the text has ended or has as many tokens as count.

    """

    level: int
    checked: int = 0
    disagreed: int = 0
    complete: bool = False


class Capital:
    """The gambler's capital against each rate at one level; see the module docstring."""

    def __init__(self, rates: Floats) -> None:
        """`rates` [rates] ascend, between 0 and 1."""
        self._rates = rates
        # [2, rates, stakes], first against "at most", then against "at least" each rate.
        self._log_capital = np.zeros((2, len(rates), len(STAKES)))

    def bet(self, disagreed: float, checked: float) -> None:
        """Bet on a text; both numbers are shares of the most tokens that count."""
        lead = disagreed - self._rates * checked
        odds = np.stack([lead / self._rates, -lead / (1 - self._rates)])
        self._log_capital += np.log1p(odds[:, :, None] * STAKES)

    def interval(self, alpha: float) -> tuple[float, float]:
        """The highest rate rejected as too low, and the lowest rejected as too high."""
        held = logsumexp(self._log_capital, axis=2) - math.log(len(STAKES))
        too_low, too_high = held >= math.log(2 / alpha)
        low, high = self._rates[too_low], self._rates[too_high]
        return float(low.max(initial=0.0)), float(high.min(initial=1.0))


class TextMonitor(Monitor):
    """Watches generated texts, each up to as many tokens as calibration generated.

    Texts are counted in the order in which they began. The order in which they end would be a
    biased sample: short texts come first.
    """

    def __init__(self, epsilons: Sequence[float], alpha: float, longest: int) -> None:
        """`longest` is the most tokens per text that count; see `Monitor` for the rest."""
        super().__init__(epsilons, alpha)
        rates = np.union1d(RATES, self.epsilons)
        self._capital = [Capital(rates) for _ in epsilons]
        self._longest = longest
        self._running: dict[str, Text] = {}  # by request id
        self._to_count: deque[Text] = deque()

    @override
    def observe(
        self, request_ids: Sequence[str], levels: Ints, disagreed: Bools
    ) -> list[MonitorStatus]:
        """Count each answer as the next token of its request's text; see `Monitor.observe`."""
        answers = zip(request_ids, levels.tolist(), disagreed.tolist(), strict=True)
        for request_id, level, differs in answers:
            if request_id not in self._running:
                self._running[request_id] = Text(level)
                self._to_count.append(self._running[request_id])
            text = self._running[request_id]
            if not text.complete:
                text.checked += 1
                text.disagreed += differs
                text.complete = text.checked == self._longest
        return self._count_complete()

    @override
    def ended(self, request_id: str) -> list[MonitorStatus]:
        text = self._running.pop(request_id, None)
        if text is None:
            return []
        text.complete = True
        return self._count_complete()

    def _count_complete(self) -> list[MonitorStatus]:
        """Count complete texts, up to the first incomplete one."""
        found = []
        while self._to_count and self._to_count[0].complete:
            text = self._to_count.popleft()
            self._capital[text.level].bet(
                text.disagreed / self._longest, text.checked / self._longest
            )
            found += self._count(text.level, text.checked, text.disagreed)
        return found

    @override
    def _interval(self, level: int) -> tuple[float, float]:
        return self._capital[level].interval(self.alpha)
