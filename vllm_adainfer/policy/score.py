"""Scores: what serving evaluates of a fitted classifier, as calibration did.

A served classifier is one fp32 tensor; its shape says which form it is:

    [3]     linear: weights of top_prob and gap, bias (svm, logreg, threshold)
    [G, G]  a table of log odds over stretched top_prob (rows) and gap (columns), see `stretch`,
            read by bilinear interpolation (rbf, boosting)
    [7]     a step of a chain: log potentials of the transitions 0->0, 0->1, 1->0, 1->1 (1 is
            settled) from the exit point before, then a linear form (crf)

Scores are log odds of "the answer is final", so that one threshold is fair to all exit points.
"""

from __future__ import annotations

import math

import torch
from adainfer_kernels import linear_score
from torch import Tensor

LINEAR_SHAPE = (3,)
# So fine that an RBF SVM's log odds are met within 0.01, and that boosting, which is made of steps
# and goes wrong by as much as a step in the cell that holds one, decides 99 % of rows alike.
TABLE_SHAPE = (256, 256)
CHAIN_SHAPE = (7,)
# fp32 log-sum-exps carry probabilities near 1 no finer than about this.
FINEST = 2.0**-20
LONGEST = -math.log(FINEST)


def served_shape(kind: str) -> tuple[int, ...]:
    """Shape of the tensor that serves a classifier of `kind`."""
    if kind in ("rbf", "boosting"):
        return TABLE_SHAPE
    return CHAIN_SHAPE if kind == "crf" else LINEAR_SHAPE


def stretch(features: Tensor) -> Tensor:
    """-log(1 - feature), elementwise, from 0 to `LONGEST`: features crowd near 1."""
    return -(1 - features).clamp(FINEST, 1).log()


def score(features: Tensor, classifier: Tensor, memory: Tensor | None) -> Tensor:
    """Log odds that the answer is final.

    Args:
        features: fp32 [rows, 2], ``top_prob`` and ``gap``.
        classifier: any served form, see above.
        memory: fp32 [rows], the scores of these rows at the exit point before, for a chain; None
            at the first one. The other forms do not read it.

    Returns:
        fp32 [rows]; NaN where a feature is, which no threshold accepts.

    """
    if classifier.dim() == 2:
        return _table_score(features, classifier)
    if classifier.shape == LINEAR_SHAPE:
        return linear_score(features, classifier)
    emission = linear_score(features, classifier[4:])
    if memory is None:
        return emission
    # The forward algorithm in log odds: sum over the state before, given its odds.
    stay_open, settle, reopen, stay_settled = classifier[:4]
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
    # A lerp between equals is exact, so that the plateaus of trees stay flat.
    before = torch.lerp(table[row, column], table[row, column + 1], along_gap)
    after = torch.lerp(table[row + 1, column], table[row + 1, column + 1], along_gap)
    return torch.lerp(before, after, along_top_prob)
