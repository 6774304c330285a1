"""Evidence that a bound does not hold now, whatever was before, with an error rate for all time.

The promise is E[disagreed] <= bound E[checked], for each unit given all units before it. A unit is
an answer that is independent of others (checked is 1, disagreed is 0 or 1), or a group of answers,
such as the tokens of a text (both are shares of the most that count per group). A gambler doubts
the promise: a unit multiplies his capital by

    1 + stake (disagreed / bound - checked),   0 <= stake < 1,

which is never negative and, while the promise is kept, at most 1 in the mean. (Of single answers
these are the likelihood ratios of the rates above the bound.) So by Ville's inequality capital that
begins with 1 ever reaches 1 / alpha with probability at most alpha, given any past, and however the
rate changes within the bound.

One gambler who begins with the first unit has lost so much in good times that bad ones go unnoticed
for long. So new ones begin with every block of units, those of the j-th with 1 / (j (j + 1)) of the
capital (all of them together have 1), divided evenly among several stakes. What matters is the sum,
and by stake one number is all that is kept. (A mixture of e-processes, as in Shin, Ramdas and
Rinaldo 2022, "E-detectors", arXiv 2203.03532, with weights that add up to 1, so that the chance of
a false alarm is bounded over all time.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_adainfer.arrays import Floats

MOST_EXPONENT = 700.0  # of a factor, which must stay a float


def log_factors(stakes: Floats, bound: float, disagreed: float, checked: float = 1.0) -> Floats:
    """[stakes], the logarithm of what a unit multiplies capital by; see the module docstring."""
    factors: Floats = np.log1p(stakes * (disagreed / bound - checked))
    return factors


class Evidence:
    """The capital of those who bet that a bound does not hold; see the module docstring."""

    def __init__(self, stakes: int, block: int, alpha: float) -> None:
        """Begin without any; new gamblers begin with every `block` of units, see above."""
        self._block, self._enough = block, 1 / alpha
        self._capital = np.zeros(stakes)
        self._units = self._begun = 0

    @property
    def is_enough(self) -> bool:
        """Whether the bound is shown not to hold."""
        return float(self._capital.sum()) >= self._enough

    def add(self, factors: Floats, units: int = 1) -> None:
        """Bet on units that become known at once; `factors` [stakes] sum their `log_factors`."""
        begun = 1 + self._units // self._block  # known before the units
        weight = 1 / (self._begun + 1) - 1 / (begun + 1)
        self._capital += weight / len(self._capital)
        self._capital *= np.exp(np.minimum(factors, MOST_EXPONENT))
        self._begun = begun
        self._units += units

    def as_dict(self) -> dict[str, Any]:
        """The whole state, for a JSON file."""
        capital = self._capital.tolist()
        return {"decided": self._units, "begun": self._begun, "products": capital}

    def restore(self, state: Any) -> None:
        """Go on exactly from what `as_dict` described.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.

        """
        self._units, self._begun = int(state["decided"]), int(state["begun"])
        capital = [float(one) for one in state["products"]]
        if len(capital) != len(self._capital):
            raise ValueError("there are other stakes")
        self._capital = np.array(capital)
