"""Scores: how calibration and serving both evaluate a fitted classifier.

A served classifier is one fp32 tensor, whose shape gives its form:

    [F + 1] linear: weights of the F features, bias (svm, logreg, threshold)
    [G, G]  a table of log odds over stretched top_prob (rows) and gap (columns), see `stretch`,
            read by bilinear interpolation (rbf, boosting)
    [F + 5] one step of a chain: log potentials of the transitions 0->0, 0->1, 1->0, 1->1 (1 is
            settled) from the previous exit point, then a linear form (crf)

The features are top_prob and gap, or those of `vllm_adainfer.policy.probabilities`.

Scores are log odds of "the answer is final", so one threshold is fair to all exit points.
"""

from __future__ import annotations

import math

import torch
from adainfer_kernels import linear_score
from torch import Tensor

from vllm_adainfer.artifact.tensors import TRANSITIONS

# About the finest difference between probabilities near 1 that fp32 log-sum-exps resolve.
FINEST = 2.0**-20
LONGEST = -math.log(FINEST)


def is_chain(classifier: Tensor, features: Tensor) -> bool:
    """Whether `classifier` is a step of a chain over `features` [rows, n]."""
    return classifier.dim() == 1 and len(classifier) > features.shape[1] + 1


def stretch(features: Tensor) -> Tensor:
    """-log(1 - feature), elementwise, from 0 to `LONGEST`: spreads features that crowd near 1."""
    return -(1 - features).clamp(FINEST, 1).log()


def score(features: Tensor, classifier: Tensor, memory: Tensor | None) -> Tensor:
    """Log odds that the answer is final.

    Args:
        features: fp32 [rows, n]; a table is for ``top_prob`` and ``gap`` alone.
        classifier: in any of the forms above.
        memory: fp32 [rows], for a chain: the scores of these rows at the previous exit point, None
            at the first. The other forms ignore it.

    Returns:
        fp32 [rows]; NaN where a feature is NaN, which no threshold accepts.

    """
    if classifier.dim() == 2:
        return _table_score(features, classifier)
    if not is_chain(classifier, features):
        return linear_score(features, classifier)
    emission = linear_score(features, classifier[TRANSITIONS:])
    if memory is None:
        return emission
    # The forward algorithm in log odds: sum over the previous state, given its odds.
    stay_open, settle, reopen, stay_settled = classifier[:TRANSITIONS]
    return (
        emission
        + torch.logaddexp(settle, memory + stay_settled)
        - torch.logaddexp(stay_open, memory + reopen)
    )


def _table_score(features: Tensor, table: Tensor) -> Tensor:
    cells = len(table) - 1
    place = stretch(features) * (cells / LONGEST)
    corner = place.nan_to_num().clamp(max=cells - 1).long()
    along_top_prob, along_gap = (place - corner).unbind(dim=-1)
    row, column = corner.unbind(dim=-1)
    # A lerp between equal values is exact, so the plateaus of trees stay flat.
    before = torch.lerp(table[row, column], table[row, column + 1], along_gap)
    after = torch.lerp(table[row + 1, column], table[row + 1, column + 1], along_gap)
    return torch.lerp(before, after, along_top_prob)
