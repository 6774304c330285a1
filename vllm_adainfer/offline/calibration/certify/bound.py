"""Upper confidence bounds on a mean loss. They assume only that the rows are independent.

A bound rejects "the mean loss exceeds epsilon" if its p-value is at most delta. Testing thresholds
from the strictest on and stopping at the first failure (fixed-sequence testing, Angelopoulos et al.
2021, "Learn then Test", arXiv 2110.01052) keeps the chance of certifying any bad threshold at
delta, however many thresholds are tried.

=========  =====================================================================================
``exact``  Clopper-Pearson, the binomial test: the best choice for losses of 0 or 1, and valid only
           for those.
``wsr``    Waudby-Smith and Ramdas 2020 (arXiv 2010.09686): the capital of a gambler who bets
           against the mean, with the bets of Bates et al. 2021 (arXiv 2101.02703). The best choice
           for signed losses of small variance: the rows it needs grow with 1 / epsilon.
=========  =====================================================================================

Rows must be independent draws from the distribution whose mean is bounded. ``wsr`` depends on their
order, which must not depend on the losses: shuffle rows that come sorted, say by label.

`losses` are [rows], each between `lowest` and 1. `lowest` is 0 for disagreement and -1 for accuracy
lost (1 where only the full model is right, -1 where only the early answer is).

No library covers this. `scipy.stats.binomtest` does ``exact`` alone. MAPIE 1.6's WSR bound adds up
the most capital held in each half of the rows, which can be more than was ever held. confseq 0.0.11
calls itself "in early-stage development"; its `betting_ci` is two-sided and searches a grid.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincc

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.kinds import BoundKind
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.promise.promise import Unit

HIGHEST, PRECISION = 0.999, 0.0005  # of an upper bound found by bisection


@dataclass(frozen=True)
class Bound:
    """The promise of a policy.

    Attributes:
        kind: the kind of bound, see above.
        delta: the probability that the bound fails.
        lowest: the smallest possible loss: 0 for disagreement, -1 for lost accuracy.
        groups: [rows], the group of each held-out row: the tokens of a text, or the prompts that
            came together. Losses of one group are not independent. None if each row stands alone.
        longest: the most rows a group can have. Groups with more do not count, so it must not
            depend on the held-out rows.
        repeats: [rows], whether a row repeats an earlier one, word for word; None if none does. See
            `_readings`.

    """

    kind: BoundKind
    delta: float
    lowest: float
    groups: Ints | None = None
    longest: int = 1
    repeats: Bools | None = None

    @classmethod
    def promised(
        cls,
        options: PolicyOptions,
        groups: Ints | None = None,
        together: int = 1,
        repeats: Bools | None = None,
    ) -> Bound:
        """The bound that the options ask for.

        `groups` [held-out rows] is the group of each; None if each row stands alone. An order is
        promised of queries, which are the rows then, and stand alone. `together` is the most
        prompts in a group of the part that fits. `repeats` [held-out rows], whether each repeats an
        earlier one, needs `groups`.

        An AdaInferError if the exact bound is asked for prompts that are not independent.
        """
        if options.promise.unit is Unit.QUERY:
            if repeats is not None and groups is not None:
                repeats = repeats[np.unique(groups, return_index=True)[1]]
            groups, together = None, 1
        if options.bound == "exact" and together > 1:
            raise AdaInferError(
                "--bound exact counts independent answers, and those to requests that came "
                "together are not: use wsr or auto"
            )
        kind, longest = options.bound, options.max_tokens * together
        signed = options.promise.reads_right
        if kind == "auto":
            kind = "wsr" if signed or longest > 1 else "exact"
        return cls(kind, options.delta, -1.0 if signed else 0.0, groups, longest, repeats)

    def of_rows(self, rows: Bools) -> Bound:
        """The bound for some of the rows alone."""
        groups = None if self.groups is None else self.groups[rows]
        repeats = None if self.repeats is None else self.repeats[rows]
        return replace(self, groups=groups, repeats=repeats)

    def holds(self, losses: Floats, epsilon: float) -> bool:
        """Whether `losses` certify a mean of at most `epsilon`, however repeats are read.

        The same as ``of(losses) <= epsilon``, but faster.

        A ValueError if a loss is out of range, or the bound is exact and one is neither 0 nor 1.
        """
        mean = (epsilon - self.lowest) / (1 - self.lowest)
        return all(
            len(one) > 0 and self._p_value(one)(mean) <= self.delta
            for one in self._readings(losses, epsilon)
        )

    def of(self, losses: Floats) -> float:
        """Upper confidence bound of the mean loss; raises as `holds` does."""
        if self.longest == 1:
            return max(map(self._upper, self._readings(losses, 0.0)))
        if not self.holds(losses, HIGHEST):
            return 1.0
        low, high = 0.0, HIGHEST
        while high - low > PRECISION:
            middle = (low + high) / 2
            low, high = (low, middle) if self.holds(losses, middle) else (middle, high)
        return high

    def _upper(self, losses: Floats) -> float:
        """Upper confidence bound of the mean of independent losses, perhaps none."""
        if not len(losses):
            return 1.0
        p_value = self._p_value(losses)
        if p_value(1.0) > self.delta:
            return 1.0
        bound = brentq(lambda mean: p_value(mean) - self.delta, 0.0, 1.0, xtol=1e-14)
        return float(self.lowest + (1 - self.lowest) * bound)

    def within(self, epsilon: float, losses: Floats) -> float:
        """The bound for losses that certify `epsilon`, which bisection may miss by a little."""
        return min(epsilon, self.of(losses))

    def _readings(self, losses: Floats, epsilon: float) -> list[Floats]:
        """The losses that must each certify: of all rows, and of those that repeat no other.

        Nothing in a row says why it repeats another. Either requests like it come often: then rows
        are independent draws, repeats among them, and each counts. Or it was copied, sent again or
        multiplied: then only the prompts are drawn, and each counts once. Whichever is true, its
        test alone passes wrongly with a probability of at most delta, and the other one can only
        stop it. So where both pass, the promise holds either way, with all of delta.

        Equal prompts are in one part, so these rows are draws of requests with other prompts than
        those that fit. How a policy answers prompts that it was fitted on, nothing here measures.
        """
        if self.repeats is None:
            return [self._by_group(losses, epsilon)]
        every, once = replace(self, repeats=None), self._once
        found = every._by_group(losses, epsilon)
        # Groups that ask the same lie side by side; draws come in random order.
        order = np.random.default_rng(0).permutation(len(found))
        return [found[order], once._by_group(losses[~self.repeats], epsilon)]

    @property
    def _once(self) -> Bound:
        """The bound for the rows that repeat no other."""
        if self.repeats is None:
            return self
        return replace(self.of_rows(~self.repeats), repeats=None)

    def _by_group(self, losses: Floats, epsilon: float) -> Floats:
        """[groups], `lowest` to 1, with a mean of at most `epsilon` exactly if the loss per row is.

        A group's losses are divided by the most rows a group can have, and each missing row
        counts as a loss of `epsilon`: E[losses] + epsilon (longest - E[rows]) <= epsilon longest.
        A group of one row, where no group can have more, keeps its loss to the last bit.
        """
        if self.groups is None:
            return losses
        _, place = np.unique(self.groups, return_inverse=True)
        rows, sums = np.bincount(place), np.bincount(place, weights=losses)
        by_group: Floats = (sums + epsilon * (self.longest - rows)) / self.longest
        return by_group[rows <= self.longest]

    def _p_value(self, losses: Floats) -> Callable[[float], float]:
        """The p-value of "the mean exceeds m", a function of m that never rises.

        m is in [0, 1], the range to which the losses are scaled.
        """
        values, lowest = np.asarray(losses, dtype=np.float64), self.lowest
        exact = self.kind == "exact"
        if exact and (lowest != 0 or not ((values == 0) | (values == 1)).all()):
            raise ValueError("the exact bound is for losses of 0 or 1 only: use wsr for others")
        if values.min() < lowest or values.max() > 1:
            raise ValueError(
                f"losses must lie between {lowest:g} and 1, got {values.min():g} to "
                f"{values.max():g}"
            )
        if exact:
            return partial(_binomial, float(values.sum()), len(values))
        scaled = (values - lowest) / (1 - lowest)
        return partial(_betting, scaled, _bets(scaled, self.delta))

    def groups_needed(self, rows: int, epsilon: float) -> int:
        """The fewest groups like those of `rows` rows that certify `epsilon` if nothing is lost.

        A ValueError if `epsilon` is not positive, or the bound is exact and `lowest` is not 0.
        """
        if epsilon <= 0:
            raise ValueError(
                f"no number of rows certifies epsilon {epsilon:g}: it must be positive"
            )
        lossless = self._readings(np.zeros(rows), epsilon)[-1]
        alone = replace(self, groups=None, repeats=None)

        def suffice(groups: int) -> bool:
            pattern = lossless if len(lossless) else np.zeros(1)
            return alone.holds(np.resize(pattern, groups), epsilon)

        enough = 1
        while not suffice(enough):
            enough *= 2
        return bisect_left(range(enough), True, lo=1, key=suffice)

    def allowance(self, rows: int, epsilon: float) -> float:
        """The largest mean of `rows` losses, each 0 or 1, that certifies `epsilon`.

        Repeats are left out: they lose as those that they repeat.
        """
        if self.repeats is not None:
            return self._once.allowance(int(np.count_nonzero(~self.repeats)), epsilon)
        order = np.random.default_rng(0).permutation(rows)
        if not self.holds(np.zeros(rows), epsilon):
            return 0.0
        fits, fails = 0, int(rows * epsilon) + 2
        while fails - fits > 1:
            middle = (fits + fails) // 2
            holds = self.holds((order < middle).astype(np.float64), epsilon)
            fits, fails = (middle, fails) if holds else (fits, middle)
        return fits / rows


def _binomial(successes: float, rows: int, rate: float) -> float:
    """P(Binomial(`rows`, `rate`) <= `successes`); `successes` is a whole number."""
    if successes >= rows:
        return 1.0
    return float(betaincc(successes + 1, rows - successes, rate))


def _bets(losses: Floats, delta: float) -> Floats:
    """The stake on each row, [rows] in 0 to 1, set by the rows before it (Bates et al. 2021)."""
    rows = len(losses)
    counts = np.arange(2, rows + 2)
    mean = (0.5 + np.cumsum(losses)) / counts
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / counts
    before = np.concatenate([[0.25], variance[:-1]])
    return np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (rows * before)))


def _betting(losses: Floats, bets: Floats, mean: float) -> float:
    """One over the most capital ever held, starting from 1: a p-value by Ville's inequality."""
    with np.errstate(divide="ignore"):  # ruin: everything staked, a loss of 1, a mean of 0
        capital = np.cumsum(np.log1p(bets * (mean - losses)))
    return math.exp(-max(0.0, float(capital.max())))
