"""Evidence that a loss is now above its bound, whatever it was before.

The promise is E[disagreed] <= epsilon E[checked], for each unit given all units before it. A unit
is an answer that is independent of others (checked is 1, disagreed is 0 or 1), or a group of
answers, such as the tokens of a text (both are shares of the most that count per group). A gambler
doubts the promise: a unit multiplies his capital by

    1 + stake (disagreed / epsilon - checked),   0 <= stake < 1,

which is never negative and, while the promise is kept, at most 1 in the mean. (Of single answers
these are the likelihood ratios of the rates above epsilon.) So by Ville's inequality capital that
begins with 1 ever reaches 1 / alpha with probability at most alpha, given any past, and however the
rate changes within epsilon.

One gambler who begins with the first unit has lost so much in good times that bad ones go unnoticed
for long. So a new one begins with every block of 100 units, the j-th with 1 / (j (j + 1)) of the
capital (all of them together have 1), divided evenly among 24 stakes. What matters is the sum, and
by stake one number is all that is kept. (A mixture of e-processes, as in Shin, Ramdas and Rinaldo
2022, "E-detectors", arXiv 2203.03532, with weights that add up to 1, so that the chance of a false
alarm is bounded over all time.)
"""

from __future__ import annotations

import numpy as np

BLOCK = 100  # units, after which another gambler begins
STAKES = 24
LARGEST_STAKE = 0.9


class Evidence:
    """The capital of those who bet that a bound does not hold; see the module docstring."""

    def __init__(self, epsilon: float, alpha: float) -> None:
        """Test the bound `epsilon`; `alpha` is the probability of ever being wrong about it."""
        self._epsilon = epsilon
        self._enough = 1 / alpha
        # Of single answers, from the likelihood of a rate of 1.2 epsilon to that of 0.9 or more.
        self._stakes = np.geomspace(min(epsilon / 5, LARGEST_STAKE), LARGEST_STAKE, STAKES)
        self._capital = np.zeros(STAKES)
        self._units = 0

    def add(self, disagreed: float, checked: float) -> bool:
        """Bet on a unit.

        Args:
            disagreed: its answers that differ, as a share of the most that count per unit.
            checked: its answers, as such a share, in 0 to 1.

        Returns:
            whether the bound is shown not to hold.

        """
        if self._units % BLOCK == 0:
            block = self._units // BLOCK + 1
            self._capital += 1 / (block * (block + 1) * STAKES)
        self._units += 1
        lead = disagreed / self._epsilon - checked
        self._capital *= 1 + self._stakes * lead
        return lead > 0 and float(self._capital.sum()) >= self._enough
