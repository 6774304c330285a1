"""What each question of a mixture saves and risks."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_adainfer.offline.calibration.certify import PathPoint
from vllm_adainfer.offline.calibration.fitted_policy import FittedPolicy


def by_question(policy: FittedPolicy, point: PathPoint) -> list[dict[str, Any]]:
    """A row for each question of the held-out prompts, the commonest first."""
    calibration, bound = policy.calibration, policy.calibration.bound
    epsilon = calibration.options.epsilon
    questions = calibration.rows_by_question()
    if len(questions) < 2:
        return []
    layers = np.array([*(exit.layer for exit in policy.exits), policy.costs.depth])
    saved = 1 - layers[point.exits] / policy.costs.depth
    rows = []
    for name, own in questions.items():
        alone = policy.questions.get(name, {}).get(epsilon)
        rows.append(
            {
                "question": name,
                "prompts": int(own.sum()),
                "risk": float(point.losses[own].mean()),
                "layers_saved": float(saved[own].mean()),
                "known": name in calibration.ends,
                # Of this question alone, where each is certified on its own.
                "bound": None
                if alone is None
                else bound.of_rows(own).within(epsilon, alone.losses),
            }
        )
    return rows
