"""Classifiers: from an exit point's features to one "settled" score, fitted with scikit-learn.

Each is fitted here and converted to the tensor that `score` evaluates: a linear function, or a
table if it is not linear. The chain over several exit points is in `crf`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import Tensor

from vllm_adainfer.artifact.kinds import FEATURES, ClassifierKind
from vllm_adainfer.artifact.tensors import TABLE_SHAPE, served_shape
from vllm_adainfer.policy.score import LONGEST, stretch

INVERSE_PENALTY = 100.0  # scikit-learn's C


def fit_classifier(
    kind: ClassifierKind,
    features: Tensor,
    settled: npt.NDArray[np.bool_],
    seed: int,
    names: Sequence[str] = FEATURES,
) -> Tensor | None:
    """Fit a classifier on one exit point's rows.

    Args:
        kind: ``svm`` (linear, AdaInfer's choice), ``rbf`` (an SVM with that kernel) and
            ``boosting`` (shallow trees), all three Platt-scaled on folds; ``logreg``; or
            ``threshold``, whose score is the gap itself (as in CALM, arXiv 2207.07061).
            ``rbf`` and ``boosting`` read stretched features. For ``crf`` use `fit_crf`.
        features: fp32 [rows, n]; tables (rbf, boosting) are for ``top_prob`` and ``gap`` alone.
        settled: [rows], True where the probe's answer is as good as the full model's.
        seed: for the solver.
        names: of the features.

    Returns:
        fp32 with shape `served_shape`; None if these rows are too few to fit the exit point (only
        one row of the rarer class, or no settled row).

    """
    if kind == "threshold":
        return torch.tensor([float(name == "gap") for name in names] + [0.0])
    shape = served_shape(kind, len(names))
    tabled = shape == TABLE_SHAPE
    rare = min(int(settled.sum()), int((~settled).sum()))
    if rare == 0 and settled.all():
        # Every row is settled: take the odds from the rule of succession.
        odds = torch.tensor([len(settled) + 1.0]).log()
        return odds.expand(shape) if tabled else torch.cat([torch.zeros(len(names)), odds])
    folds = min(5, rare)
    if folds < 2:
        return None
    if kind == "logreg":
        model = LogisticRegression(C=INVERSE_PENALTY, random_state=seed)
        model.fit(features.double().numpy(), settled)
        return torch.tensor([*model.coef_[0], model.intercept_[0]], dtype=torch.float32)
    x = stretch(features) if tabled else features
    scaled = CalibratedClassifierCV(
        _estimator(kind, seed), method="sigmoid", ensemble=False, cv=folds
    )
    [fitted] = scaled.fit(x.double().numpy(), settled).calibrated_classifiers_
    [platt] = fitted.calibrators
    # P(settled) = 1 / (1 + exp(a * decision + b)), so the log odds are linear in the decision.
    slope, shift = -platt.a_, -platt.b_
    if tabled:
        axes = [np.linspace(0, LONGEST, entries) for entries in shape]
        entries = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
        odds = slope * fitted.estimator.decision_function(entries) + shift
        return torch.from_numpy(odds).float().reshape(shape)
    plane = np.append(fitted.estimator.coef_[0], fitted.estimator.intercept_[0])
    plane *= slope
    plane[-1] += shift
    return torch.from_numpy(plane).float()


def _estimator(kind: ClassifierKind, seed: int) -> ClassifierMixin:
    if kind == "svm":
        return LinearSVC(class_weight="balanced", random_state=seed)
    if kind == "rbf":
        return make_pipeline(StandardScaler(), SVC(class_weight="balanced", random_state=seed))
    # With few errors to learn from, trees would fit noise, so higher features never score lower.
    return HistGradientBoostingClassifier(
        max_iter=50, max_leaf_nodes=4, monotonic_cst=[1, 1], random_state=seed
    )
