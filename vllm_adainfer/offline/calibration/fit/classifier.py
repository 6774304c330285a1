"""Fit the classifier of one exit point with scikit-learn: features in, "settled" score out.

The fit becomes the linear form that `score` evaluates. `crf` fits all exit points together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from vllm_adainfer.artifact.kinds import FEATURES, ClassifierKind

INVERSE_PENALTY = 100.0  # scikit-learn's C


def fit_classifier(
    kind: ClassifierKind,
    features: Tensor,
    settled: npt.NDArray[np.bool_],
    seed: int,
    names: Sequence[str] = FEATURES,
) -> Tensor | None:
    """Fit a classifier on the rows of one exit point.

    Args:
        kind: ``svm`` (linear, Platt-scaled on folds; AdaInfer's choice), ``logreg``, or
            ``threshold``, whose score is the gap itself (as in CALM, arXiv 2207.07061) or the
            distance from a gate. For ``crf`` use `fit_crf`.
        features: fp32 [rows, n].
        settled: [rows], True where the probe's answer is as good as the full model's.
        seed: the solver's seed.
        names: the names of the features, [n].

    Returns:
        fp32 [n + 1], weights and bias; None if the rows do not suffice to fit (no row is settled,
        or only one is in the rarer class).

    """
    if kind == "threshold":
        return torch.tensor([float(name in ("gap", "gate_distance")) for name in names] + [0.0])
    if settled.all():
        # Every row is settled: take the odds from the rule of succession.
        odds = torch.tensor([len(settled) + 1.0]).log()
        return torch.cat([torch.zeros(len(names)), odds])
    folds = min(5, int(settled.sum()), int((~settled).sum()))
    if folds < 2:
        return None
    x = features.double().numpy()
    if kind == "logreg":
        model = LogisticRegression(C=INVERSE_PENALTY, random_state=seed).fit(x, settled)
        return torch.tensor([*model.coef_[0], model.intercept_[0]], dtype=torch.float32)
    svm = LinearSVC(class_weight="balanced", random_state=seed)
    scaled = CalibratedClassifierCV(svm, method="sigmoid", ensemble=False, cv=folds)
    [fitted] = scaled.fit(x, settled).calibrated_classifiers_
    [platt] = fitted.calibrators
    # P(settled) = 1 / (1 + exp(a * decision + b)), so the log odds are linear in the decision.
    plane = np.append(fitted.estimator.coef_[0], fitted.estimator.intercept_[0]) * -platt.a_
    plane[-1] -= platt.b_
    return torch.from_numpy(plane).float()
