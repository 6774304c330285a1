"""Classifiers: from an exit point's features to one "settled" score, by scikit-learn.

Every kind ends as one linear function of the features, which serving evaluates. Scores are log
odds of "the answer is final", so that one threshold is fair to all exit points.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from vllm_adainfer.decision.probe import FEATURES

Kind = Literal["svm", "logreg", "threshold"]


def fit_classifier(
    kind: Kind, features: Tensor, settled: npt.NDArray[np.bool_], seed: int
) -> Tensor | None:
    """Fit on one exit point's rows.

    Args:
        kind: ``svm`` (AdaInfer's choice; balanced, Platt-scaled), ``logreg``, or ``threshold``,
            which takes the gap itself as the score (as in CALM, arXiv 2207.07061).
        features: fp32 [rows, features].
        settled: [rows], True where the probe's best token is the full model's.
        seed: for the solver.

    Returns:
        fp32 [features + 1], the bias last; None if the exit point cannot be learned from these
        rows (a class with fewer rows than calibration folds).

    """
    if kind == "threshold":
        return torch.tensor([float(name == "gap") for name in FEATURES] + [0.0])
    rare = min(int(settled.sum()), int((~settled).sum()))
    if rare == 0 and settled.all():
        # Nothing to tell apart: the odds of an error by the rule of succession.
        return torch.tensor([0.0] * len(FEATURES) + [float(np.log(len(settled) + 1))])
    folds = min(5, rare)
    if folds < 2:
        return None
    x = features.double().numpy()
    if kind == "logreg":
        model = LogisticRegression(C=100.0, random_state=seed).fit(x, settled)
        coefficients = [*model.coef_[0], model.intercept_[0]]
    else:
        svm = LinearSVC(class_weight="balanced", random_state=seed)
        scaled = CalibratedClassifierCV(svm, method="sigmoid", ensemble=False, cv=folds)
        [fitted] = scaled.fit(x, settled).calibrated_classifiers_
        [platt] = fitted.calibrators
        # P(settled) = 1 / (1 + exp(a * decision + b)), so the log odds are linear too.
        plane = np.append(fitted.estimator.coef_[0], fitted.estimator.intercept_[0])
        coefficients = list(-platt.a_ * plane)
        coefficients[-1] -= platt.b_
    return torch.tensor(coefficients, dtype=torch.float32)
