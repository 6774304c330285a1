"""The score of a fitted classifier, computed in the same way in calibration and in serving.

An artifact stores a classifier as one fp32 tensor, whose length gives its form:

    [F + 1] linear: weights of the F features, bias (svm, logreg, threshold)
    [F + 5] one step of a linear-chain CRF: log potentials of the transitions 0->0, 0->1, 1->0,
            1->1 (1 is settled) from the previous exit point, then a linear form (crf)

The features are top_prob and gap, or those of `vllm_adainfer.promise.probabilities`.

Scores are log odds of "the answer is final", so one threshold is fair to all exit points.
"""

from __future__ import annotations

import torch
from adainfer_kernels import linear_score
from torch import Tensor

from vllm_adainfer.artifact.tensors import TRANSITIONS


def is_chain(classifier: Tensor, features: Tensor) -> bool:
    """Whether `classifier` is a step of a CRF over `features` [rows, n]."""
    return len(classifier) > features.shape[1] + 1


def score(features: Tensor, classifier: Tensor, memory: Tensor | None) -> Tensor:
    """Log odds that the answer is final, fp32 [rows], by `features` fp32 [rows, n].

    For a CRF, `memory` fp32 [rows] has the scores of these rows at the previous exit point; it is
    None at the first. The result is NaN where a feature is NaN, which no threshold accepts.
    """
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
