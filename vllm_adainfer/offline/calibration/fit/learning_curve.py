"""What more prompts would bring: the savings of heads fitted on a quarter, a half and all of them.

The prompts are those that fit, judged out of fold; the held-out ones are for the bound alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_adainfer.artifact.kinds import ClassifierKind
from vllm_adainfer.offline.calibration.fit.choose import layers_saved
from vllm_adainfer.offline.calibration.fit.exits import fit_exits
from vllm_adainfer.offline.calibration.fit.loss import Loss
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit.split import Split
from vllm_adainfer.offline.calibration.record.recording import Recording

SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class CurvePoint:
    """Exit points fitted on so many prompts, and the share of layers that they save, 0 to 1."""

    prompts: int
    layers_saved: float


def learning_curve(
    recording: Recording,
    target: Target,
    split: Split,
    kind: ClassifierKind,
    seed: int,
    layers: Sequence[int],
    loss: Loss,
    allowed: float,
) -> list[CurvePoint]:
    """Fit exit points after `layers` on parts of the prompts that fit.

    Args:
        recording, target, split, kind, seed, layers, loss: as for `fit_exits`.
        allowed: the largest mean loss.

    """
    curve = []
    for share in SHARES:
        fit = split.fit[: round(len(split.fit) * share)]
        exits = fit_exits(recording, target, replace(split, fit=fit), kind, seed, layers, loss)
        curve.append(CurvePoint(len(fit), layers_saved(exits, recording.depth, allowed)))
    return curve
