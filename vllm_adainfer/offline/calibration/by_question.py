"""What each question of a mixture saves and risks, within the bound on the mixture."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_adainfer.offline.calibration.certify import PathPoint
from vllm_adainfer.offline.calibration.fitted_policy import FittedPolicy


def by_question(policy: FittedPolicy, point: PathPoint) -> list[dict[str, Any]]:
    """A row for each question of the held-out prompts, the commonest first."""
    calibration = policy.calibration
    if len(set(calibration.questions)) < 2:
        return []
    names = np.array(calibration.questions)[calibration.split.certify]
    layers = np.array([*(exit.layer for exit in policy.exits), policy.costs.depth])
    saved = 1 - layers[point.exits] / policy.costs.depth
    rows = []
    for name in np.unique(names):
        own = names == name
        rows.append(
            {
                "question": str(name),
                "prompts": int(own.sum()),
                "risk": float(point.losses[own].mean()),
                "layers_saved": float(saved[own].mean()),
            }
        )
    return sorted(rows, key=lambda row: -int(row["prompts"]))
