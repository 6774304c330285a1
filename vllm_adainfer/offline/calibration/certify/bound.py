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
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincc

from vllm_adainfer.arrays import Floats
from vllm_adainfer.artifact.kinds import BoundKind


def certified(
    losses: Floats, epsilon: float, delta: float, kind: BoundKind, lowest: float = 0.0
) -> bool:
    """Whether `losses` show that the mean is at most `epsilon`, at confidence 1 - `delta`.

    Equals ``upper_bound(losses, delta, kind, lowest) <= epsilon``, but is faster.

    Raises:
        ValueError: a loss is out of range, or `kind` is ``exact`` and a loss is neither 0 nor 1.

    """
    return _p_value(losses, delta, kind, lowest)((epsilon - lowest) / (1 - lowest)) <= delta


def upper_bound(losses: Floats, delta: float, kind: BoundKind, lowest: float = 0.0) -> float:
    """Upper confidence bound on the mean loss, at confidence 1 - `delta`.

    Raises:
        ValueError: as in `certified`.

    """
    p_value = _p_value(losses, delta, kind, lowest)
    if p_value(1.0) > delta:
        return 1.0
    bound = brentq(lambda mean: p_value(mean) - delta, 0.0, 1.0, xtol=1e-14)
    return float(lowest + (1 - lowest) * bound)


def rows_needed(
    epsilon: float,
    delta: float,
    kind: BoundKind,
    lowest: float = 0.0,
    pattern: Sequence[float] | Floats = (0.0,),
) -> int:
    """The fewest rows that certify `epsilon` > 0 when all losses are 0.

    With a `pattern`, whose mean is below `epsilon`, the losses repeat it.

    Raises:
        ValueError: `epsilon` is not positive, or `kind` is ``exact`` and `lowest` is not 0.

    """
    if epsilon <= 0:
        raise ValueError(f"no number of rows certifies epsilon {epsilon:g}: it must be positive")

    def suffice(rows: int) -> bool:
        return certified(np.resize(pattern, rows), epsilon, delta, kind, lowest)

    enough = 1
    while not suffice(enough):
        enough *= 2
    return bisect_left(range(enough), True, lo=1, key=suffice)


def _p_value(
    losses: Floats, delta: float, kind: BoundKind, lowest: float
) -> Callable[[float], float]:
    """The p-value of "the mean exceeds m", a function of m that never rises.

    m is in [0, 1], the range to which the losses are scaled.
    """
    values = np.asarray(losses, dtype=np.float64)
    if kind == "exact" and (lowest != 0 or not ((values == 0) | (values == 1)).all()):
        raise ValueError("the exact bound is for losses of 0 or 1 only: use wsr for others")
    if values.min() < lowest or values.max() > 1:
        raise ValueError(
            f"losses must lie between {lowest:g} and 1, got {values.min():g} to {values.max():g}"
        )
    if kind == "exact":
        return partial(_binomial, float(values.sum()), len(values))
    scaled = (values - lowest) / (1 - lowest)
    return partial(_betting, scaled, _bets(scaled, delta))


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
