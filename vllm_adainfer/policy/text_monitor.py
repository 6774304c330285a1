"""Disagreement of generated text in service, watched by prompt.

A bound on generated text promises, per token, that E[tokens that differ] <= epsilon E[tokens],
over prompts (see `vllm_adainfer.offline.calibration.certify`). Tokens of one text are not
independent, texts are. So a gambler bets on whole texts, as in Waudby-Smith and Ramdas 2020
(arXiv 2010.09686): with d and n the tokens of a text that differ and that were decided, as shares of the most that
count, a text multiplies the capital held against "the rate is at most p" by

    1 + stake (d - p n) / p,   and that against "at least p" by   1 + stake (p n - d) / (1 - p).

Neither factor is negative, and at that rate its mean is 1, so by Ville's inequality the capital
ever reaches 2 / alpha with a chance of at most alpha / 2. Capital is held for a grid of rates, for
several stakes at once (their mean counts); the interval lies between the rates that are rejected.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from vllm_adainfer.policy.monitor import Bools, Ints, Monitor, Reading

STAKES = np.array([0.5, 0.25, 0.12, 0.06, 0.03, 0.015])
RATES = np.geomspace(1e-4, 0.98, 120)  # the ends of an interval are among them, and the epsilons


@dataclass
class Text:
    """What has been compared of a shadow request's text.

    Attributes:
        level: the row of the epsilon table it is decided with.
        checked: tokens that were compared.
        disagreed: those that differed.
        complete: whether it has ended, or no more of its tokens count.

    """

    level: int
    checked: int = 0
    disagreed: int = 0
    complete: bool = False


class Capital:
    """What a gambler holds against rates of one level: see the head of this file."""

    def __init__(self, rates: npt.NDArray[np.float64]) -> None:
        """`rates` ascend between 0 and 1."""
        self._rates = rates
        # Logarithms, [above or below, rates, stakes].
        self._capital = np.zeros((2, len(rates), len(STAKES)))

    def bet(self, disagreed: float, checked: float) -> None:
        """A text with shares of tokens that differ and that were decided."""
        lead = disagreed - self._rates * checked
        odds = np.stack([lead / self._rates, -lead / (1 - self._rates)])
        self._capital += np.log1p(odds[:, :, None] * STAKES)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Between the highest rate that is too low and the lowest that is too high."""
        held = logsumexp(self._capital, axis=2) - math.log(len(STAKES))
        too_low, too_high = held >= math.log(2 / alpha)
        low, high = self._rates[too_low], self._rates[too_high]
        return float(low.max(initial=0.0)), float(high.min(initial=1.0))


class TextMonitor(Monitor):
    """Watches generated texts, up to as many tokens of each as calibration generated.

    Texts count in the order in which they began, each when it has ended (or has enough tokens): in
    the order of their ends short ones would come first, and texts that run are no fair draw.
    """

    def __init__(self, epsilons: Sequence[float], alpha: float, longest: int) -> None:
        """`longest` is the most tokens of a text that count; see `Monitor`."""
        super().__init__(epsilons, alpha)
        rates = np.union1d(RATES, self.epsilons)
        self._capital = [Capital(rates) for _ in epsilons]
        self._longest = longest
        self._running: dict[str, Text] = {}  # by request
        self._to_count: deque[Text] = deque()

    def observe(self, request_ids: Sequence[str], levels: Ints, disagreed: Bools) -> list[Reading]:
        """See `Monitor.observe`; an answer is the next token of its request's text."""
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

    def ended(self, request_id: str) -> list[Reading]:
        """See `Monitor.ended`."""
        text = self._running.pop(request_id, None)
        if text is None:
            return []
        text.complete = True
        return self._count_complete()

    def _count_complete(self) -> list[Reading]:
        """Count texts that are complete, up to the first that is not."""
        found = []
        while self._to_count and self._to_count[0].complete:
            text = self._to_count.popleft()
            self._capital[text.level].bet(
                text.disagreed / self._longest, text.checked / self._longest
            )
            found += self._count(text.level, text.checked, text.disagreed)
        return found

    def _interval(self, level: int) -> tuple[float, float]:
        return self._capital[level].interval(self.alpha)

    def _exceeds(self, level: int) -> bool:
        """Whether epsilon, which is among the rates, is too low."""
        return self._interval(level)[0] >= self.epsilons[level]
