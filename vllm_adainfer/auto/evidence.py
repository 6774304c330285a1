"""Evidence that a policy changes more answers than it may, with an error rate that holds for ever.

A request under a policy is a compared miss with probability q p, where q is that of its coin, and p
that of a miss given the past. If no p exceeds epsilon, then for each r > epsilon the factor

    r / epsilon for a compared miss, (1 - q r) / (1 - q epsilon) for any other request

has a mean of at most 1. So products of such factors, for several r and begun at several moments,
with weights that add up to 1, are a supermartingale that begins at 1. By Ville's inequality it ever
reaches 1 / ERROR_RATE with probability ERROR_RATE at most. A product that begins late sees a change
that a long good past would hide.
"""

from __future__ import annotations

import math
from typing import Any

ERROR_RATE = 0.01
TIMES = (2, 5, 20)  # so often epsilon is each r
BLOCK = 1000  # requests under a policy, after which the next products begin
MOST_EXPONENT = 700.0  # of a step's factor, which must stay a float


class Evidence:
    """Grows while a policy misses more than `epsilon`, and shrinks while it misses less."""

    def __init__(self, epsilon: float) -> None:
        """Begin without any; `epsilon` is the share of answers that may be changed."""
        self.epsilon = epsilon
        self._decided = self._begun = 0
        self._products = [0.0] * len(TIMES)

    @property
    def is_enough(self) -> bool:
        """Whether the policy misses more than `epsilon`, wrong once in 1 / ERROR_RATE kinds."""
        return sum(self._products) >= 1 / ERROR_RATE

    def add(self, decided: int, misses: int, rate: float) -> None:
        """Count a step; see `Ledger.add`. `rate` is that of its coins."""
        begun = 1 + self._decided // BLOCK  # known before the coins
        weight = (1 / (self._begun + 1) - 1 / (begun + 1)) / len(TIMES)
        within = rate * self.epsilon
        for index, times in enumerate(TIMES):
            beyond = rate * min(1.0, times * self.epsilon)
            exponent = misses * math.log(beyond / within)
            exponent += (decided - misses) * math.log((1 - beyond) / (1 - within))
            factor = math.exp(min(exponent, MOST_EXPONENT))
            self._products[index] = (self._products[index] + weight) * factor
        self._begun = begun
        self._decided += decided

    def as_dict(self) -> dict[str, Any]:
        """The whole state, for a JSON file."""
        return {"decided": self._decided, "begun": self._begun, "products": list(self._products)}

    @classmethod
    def of_dict(cls, epsilon: float, state: Any) -> Evidence:
        """What `as_dict` described, to go on exactly.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.

        """
        evidence = cls(epsilon)
        evidence._decided, evidence._begun = int(state["decided"]), int(state["begun"])
        products = [float(one) for one in state["products"]]
        evidence._products = [one for one, _ in zip(products, TIMES, strict=True)]
        return evidence
