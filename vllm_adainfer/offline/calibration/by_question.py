"""What each question of a mixture saves and risks, within the bound on the mixture."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_adainfer.offline.calibration.certify import PathPoint
from vllm_adainfer.offline.calibration.fitted_policy import FittedPolicy


def by_question(policy: FittedPolicy, point: PathPoint) -> list[dict[str, Any]]:
    """A row for each question of the held-out prompts, the commonest first.

    The bound is about all of them together: a question whose own risk is above epsilon takes more
    than its share (``above``).
    """
    calibration = policy.calibration
    if len(set(calibration.questions)) < 2:
        return []
    names = np.array(calibration.questions)[calibration.split.certify]
    layers = np.array([*(exit.layer for exit in policy.exits), policy.costs.depth])
    saved = 1 - layers[point.exits] / policy.costs.depth
    rows = []
    for name in np.unique(names):
        own = names == name
        risk = float(point.losses[own].mean())
        rows.append(
            {
                "question": str(name),
                "prompts": int(own.sum()),
                "risk": risk,
                "layers_saved": float(saved[own].mean()),
                "above": risk > calibration.options.epsilon,
            }
        )
    return sorted(rows, key=lambda row: -int(row["prompts"]))
