"""Upper confidence bounds on a disagreement rate, exact for independent 0/1 outcomes.

With k disagreements among n held-out rows, ``P(Binomial(n, epsilon) <= k)`` is a p-value for
"the rate exceeds epsilon". Testing thresholds from the strictest on and stopping at the first
that fails (fixed-sequence testing, Angelopoulos et al. 2021, "Learn then Test") keeps the chance
of certifying any bad threshold at delta, however many thresholds are tried.
"""

from __future__ import annotations

import math

from scipy.stats import beta, binom


def certified(errors: int, rows: int, epsilon: float, delta: float) -> bool:
    """Whether `errors` of `rows` show a rate of at most `epsilon`, at confidence 1 - `delta`."""
    return bool(binom.cdf(errors, rows, epsilon) <= delta)


def upper_bound(errors: int, rows: int, delta: float) -> float:
    """Clopper-Pearson upper bound of the rate, at confidence 1 - `delta`."""
    return 1.0 if errors >= rows else float(beta.ppf(1 - delta, errors + 1, rows - errors))


def rows_needed(epsilon: float, delta: float) -> int:
    """Held-out rows below which not even zero errors certify `epsilon`."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))
