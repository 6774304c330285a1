"""Learning curve: savings with a quarter, half and all of the prompts.

The prompts are those for fitting, judged out of fold; the held-out ones are for the bound alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.choose import layers_saved
from vllm_adainfer.offline.calibration.fit.exits import fit_exits

SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class CurvePoint:
    """Exit points fitted on so many prompts, and the share of layers that they save, 0 to 1."""

    prompts: int
    layers_saved: float


def learning_curve(
    calibration: Calibration, layers: Sequence[int], allowed: float
) -> list[CurvePoint]:
    """Fit exit points after `layers` on parts of the prompts that fit.

    `allowed` is the largest mean loss.
    """
    curve, split, depth = [], calibration.split, calibration.rows.model.depth
    for share in SHARES:
        fit = split.fit[: round(len(split.fit) * share)]
        exits = fit_exits(replace(calibration, split=replace(split, fit=fit)), layers)
        curve.append(CurvePoint(len(fit), layers_saved(exits, depth, allowed)))
    return curve
