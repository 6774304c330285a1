"""Upper confidence bounds on a mean loss. They assume only that the rows are independent.

Each kind of bound but ``naive`` rejects "the mean loss exceeds epsilon" if its p-value is at most
delta. Testing thresholds from the strictest on and stopping at the first failure (fixed-sequence
testing, Angelopoulos et al. 2021, "Learn then Test", arXiv 2110.01052) keeps the chance of
certifying any bad threshold at delta, however many thresholds are tried.

=====================  =========================================================================
``exact``              Clopper-Pearson, the binomial test: the best choice for losses of 0 or 1,
                       and valid only for those.
``wsr``                Waudby-Smith and Ramdas 2020 (arXiv 2010.09686): the capital of a gambler
                       who bets against the mean, with the bets of Bates et al. 2021 (arXiv
                       2101.02703). The best choice for signed losses of small variance: the
                       rows it needs grow with 1 / epsilon.
``hoeffding-bentkus``  Bates et al. 2021 and "Learn then Test": Hoeffding's bound, in its
                       Kullback-Leibler form, or Bentkus's, whichever is smaller. It ignores the
                       variance: for signed losses the rows it needs grow with 1 / epsilon**2.
``naive``              The mean itself, without confidence: for comparison only.
=====================  =========================================================================

Rows must be independent draws from the distribution whose mean is bounded. ``wsr`` depends on their
order, which must not depend on the losses: shuffle rows that come sorted, say by label.

`losses` are [rows], each between `lowest` and 1. `lowest` is 0 for disagreement and -1 for accuracy
lost (1 where only the full model is right, -1 where only the early answer is).

No library covers this. `scipy.stats.binomtest` does ``exact`` alone; Bentkus's bound needs the same
binomial tail, so both take it from `scipy.special`. MAPIE 1.6 has the p-value of
``hoeffding-bentkus``, for losses in [0, 1], but no upper bound from it; its WSR bound adds up the
most capital held in each half of the rows, which can be more than was ever held. confseq 0.0.11
calls itself "in early-stage development"; its `betting_ci` is two-sided and searches a grid.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaincc, rel_entr

from vllm_adainfer.artifact.kinds import BoundKind

FloatArray = npt.NDArray[np.float64]


def certified(
    losses: FloatArray, epsilon: float, delta: float, kind: BoundKind, lowest: float = 0.0
) -> bool:
    """Whether `losses` show that the mean is at most `epsilon`, at confidence 1 - `delta`.

    Equals ``upper_bound(losses, delta, kind, lowest) <= epsilon``, but is faster.

    Raises:
        ValueError: a loss is out of range, or `kind` is ``exact`` and a loss is neither 0 nor 1.

    """
    if kind == "naive":
        return bool(np.mean(losses) <= epsilon)
    p_value = _p_value(_unit(losses, kind, lowest), delta, kind)
    return p_value((epsilon - lowest) / (1 - lowest)) <= delta


def upper_bound(losses: FloatArray, delta: float, kind: BoundKind, lowest: float = 0.0) -> float:
    """Upper confidence bound on the mean loss, at confidence 1 - `delta`.

    Raises:
        ValueError: as in `certified`.

    """
    if kind == "naive":
        return float(np.mean(losses))
    p_value = _p_value(_unit(losses, kind, lowest), delta, kind)
    if p_value(1.0) > delta:
        return 1.0
    bound = brentq(lambda mean: p_value(mean) - delta, 0.0, 1.0, xtol=1e-14)
    return float(lowest + (1 - lowest) * bound)


def rows_needed(
    epsilon: float,
    delta: float,
    kind: BoundKind,
    lowest: float = 0.0,
    pattern: Sequence[float] | FloatArray = (0.0,),
) -> int:
    """The fewest rows that certify `epsilon` > 0 when all losses are 0; `lowest` is 0 or -1.

    Or when the losses are those of `pattern`, again and again; their mean is below `epsilon`.

    Raises:
        ValueError: `epsilon` is not positive, or `kind` is ``exact`` and `lowest` is not 0.

    """
    if epsilon <= 0:
        raise ValueError(f"no number of rows certifies epsilon {epsilon:g}: it must be positive")
    if kind == "naive":
        return 1
    losses = _unit(np.asarray(pattern), kind, lowest)

    def certifies(rows: int) -> bool:
        # Only wsr needs the rows themselves; hoeffding-bentkus may need more than fit in memory.
        p_value = (
            _p_value(np.resize(losses, rows), delta, kind)
            if kind == "wsr"
            else partial(TAILS[kind], losses.mean() * rows, rows)
        )
        return p_value((epsilon - lowest) / (1 - lowest)) <= delta

    # Search over pairs of rows: with signed losses each zero counts as a half, and Bentkus's bound
    # rounds an odd number of halves up, so an odd number of rows may fail where fewer suffice. All
    # kinds are monotone in the number of pairs.
    enough = 1
    while not certifies(2 * enough):
        enough *= 2
    pairs = bisect_left(range(enough), True, lo=1, key=lambda pairs: certifies(2 * pairs))
    return 2 * pairs - 1 if certifies(2 * pairs - 1) else 2 * pairs


def _unit(losses: FloatArray, kind: BoundKind, lowest: float) -> FloatArray:
    """`losses` scaled to [0, 1]."""
    values = np.asarray(losses, dtype=np.float64)
    if kind == "exact" and (lowest != 0 or not ((values == 0) | (values == 1)).all()):
        raise ValueError("the exact bound is for losses of 0 or 1 only: use wsr for others")
    if values.min() < lowest or values.max() > 1:
        raise ValueError(
            f"losses must lie between {lowest:g} and 1, got {values.min():g} to {values.max():g}"
        )
    return (values - lowest) / (1 - lowest)


def _p_value(losses: FloatArray, delta: float, kind: BoundKind) -> Callable[[float], float]:
    """The p-value of "the mean exceeds m", a function of m in [0, 1] that never rises.

    `losses` are in [0, 1].
    """
    if kind == "wsr":
        return partial(_betting, losses, _bets(losses, delta))
    return partial(TAILS[kind], float(losses.sum()), len(losses))


def _binomial(successes: float, rows: int, rate: float) -> float:
    """P(Binomial(`rows`, `rate`) <= `successes`); `successes` is a whole number."""
    if successes >= rows:
        return 1.0
    return float(betaincc(successes + 1, rows - successes, rate))


def _hoeffding_bentkus(total: float, rows: int, mean: float) -> float:
    """An upper bound on P(the sum of `rows` losses with this mean <= `total`)."""
    seen = min(total / rows, mean)
    divergence = rel_entr(seen, mean) + rel_entr(1 - seen, 1 - mean)
    hoeffding = math.exp(-rows * divergence)
    bentkus = math.e * _binomial(math.ceil(total), rows, mean)
    return min(hoeffding, bentkus)


TAILS: dict[str, Callable[[float, int, float], float]] = {
    "exact": _binomial,
    "hoeffding-bentkus": _hoeffding_bentkus,
}


def _bets(losses: FloatArray, delta: float) -> FloatArray:
    """The stake on each row, [rows] in 0 to 1, set by the rows before it (Bates et al. 2021)."""
    rows = len(losses)
    counts = np.arange(2, rows + 2)
    mean = (0.5 + np.cumsum(losses)) / counts
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / counts
    before = np.concatenate([[0.25], variance[:-1]])
    return np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (rows * before)))


def _betting(losses: FloatArray, bets: FloatArray, mean: float) -> float:
    """One over the most capital ever held, starting from 1: a p-value by Ville's inequality."""
    with np.errstate(divide="ignore"):  # ruin: everything staked, a loss of 1, a mean of 0
        capital = np.cumsum(np.log1p(bets * (mean - losses)))
    return math.exp(-max(0.0, float(capital.max())))
