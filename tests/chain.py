"""A linear-chain CRF by its definition: every sequence of states is counted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np


def potentials(features: np.ndarray, steps: np.ndarray) -> dict[tuple[int, ...], float]:
    """Log potential of each sequence of states, for one row.

    `features` is [exit points, 2], `steps` [exit points, 7] as they are served.
    """
    found = {}
    for states in itertools.product([0, 1], repeat=len(features)):
        total = 0.0
        for index, state in enumerate(states):
            total += state * (float(features[index] @ steps[index, 4:6]) + steps[index, 6])
            if index > 0:
                total += steps[index, 2 * states[index - 1] + state]
        found[states] = total
    return found


def log_sum(values: Sequence[float]) -> float:
    return math.log(math.fsum(math.exp(value) for value in values))


def log_odds(features: np.ndarray, steps: np.ndarray) -> float:
    """Log odds that the last state is settled."""
    found = potentials(features, steps)
    yes, no = ([v for states, v in found.items() if states[-1] == last] for last in (1, 0))
    return log_sum(yes) - log_sum(no)
