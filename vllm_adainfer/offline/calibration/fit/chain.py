"""A CRF over the chosen exit points takes the place of their own classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.offline.calibration.fit.classifier import fit_crf
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.policy.score import score


def fit_crf_chain(exits: Sequence[FittedExit], target: Target) -> list[FittedExit]:
    """Give the chosen exit points (ascending, at least one) a CRF over all of them."""
    unseen = [exit.fitted for exit in exits]
    steps = fit_crf(
        torch.stack([one.features for one in unseen], dim=1),
        np.stack([target.settled(one.agrees, one.loss) for one in unseen], axis=1),
    )
    fitted = _scores_of_chain(unseen, steps)
    held_out = _scores_of_chain([exit.held_out for exit in exits], steps)
    parts = zip(exits, steps, fitted, held_out, strict=True)
    return [
        replace(exit, classifier=step, fitted=ours, held_out=theirs)
        for exit, step, ours, theirs in parts
    ]


def _scores_of_chain(exits: Sequence[Scored], steps: Sequence[Tensor]) -> list[Scored]:
    """The same rows at each exit point, scored by the steps of a CRF."""
    found, memory = [], None
    for exit, step in zip(exits, steps, strict=True):
        memory = score(exit.features, step, memory)
        # Rows that are never settled stay so.
        found.append(replace(exit, score=memory.masked_fill(exit.score.isneginf(), -torch.inf)))
    return found
