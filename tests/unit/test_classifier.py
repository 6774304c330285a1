from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import linear_score
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from vllm_adainfer.offline.calibration.fit.classifier import fit_classifier
from vllm_adainfer.policy.score import score
from vllm_adainfer.promise.probabilities import FEATURES

LEARNED = ["svm", "logreg"]


def rows(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Features, and settled where the gap is large, with noise."""
    generator = np.random.default_rng(seed)
    gap = generator.random(count)
    top_prob = gap + (1 - gap) * generator.random(count) / 2
    settled = generator.random(count) < 1 / (1 + np.exp(-8 * (gap - 0.3)))
    return torch.tensor(np.stack([top_prob, gap], axis=1)).float(), settled


def with_minority(count: int, minority: int, of: bool) -> tuple[Tensor, np.ndarray]:
    features, _ = rows(count, seed=3)
    settled = np.full(count, not of)
    settled[:minority] = of
    return features, settled


def sklearn_estimator(kind: str, folds: int, seed: int) -> Any:
    if kind == "logreg":
        return LogisticRegression(C=100.0, random_state=seed)
    svm = LinearSVC(class_weight="balanced", random_state=seed)
    return CalibratedClassifierCV(svm, method="sigmoid", ensemble=False, cv=folds)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize(
    ("features_and_settled", "folds"),
    [
        pytest.param(rows(400, seed=0), 5, id="400 rows"),
        pytest.param(rows(60, seed=1), 5, id="60 rows"),
        pytest.param(with_minority(200, 3, of=False), 3, id="3 errors"),
        pytest.param(with_minority(200, 2, of=True), 2, id="2 settled"),
    ],
)
def test_the_linear_score_is_the_log_odds_of_scikit_learns_own_estimator(
    kind, features_and_settled, folds
):
    features, settled = features_and_settled
    estimator = sklearn_estimator(kind, folds, seed=7).fit(features.double().numpy(), settled)
    classifier = fit_classifier(kind, features, settled, seed=7)
    assert classifier.shape == (len(FEATURES) + 1,)
    assert classifier.dtype == torch.float32
    unseen, _ = rows(300, seed=2)
    found = linear_score(unseen, classifier).double().numpy()
    probability = estimator.predict_proba(unseen.double().numpy())[:, 1]
    np.testing.assert_allclose(found, np.log(probability / (1 - probability)), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found >= 0, estimator.predict(unseen.double().numpy()))
    apart = np.diff(np.sort(probability)) > 1e-6
    np.testing.assert_array_equal(np.diff(found[np.argsort(probability)])[apart] > 0, True)


@pytest.mark.parametrize("features", [[math.nan, 0.5], [0.5, math.nan], [math.nan, math.nan]])
@pytest.mark.parametrize("shape", [(3,), (7,)])
def test_a_row_without_features_has_no_score(shape, features):
    found = score(torch.tensor([features]), torch.rand(shape), torch.zeros(1))
    assert found.isnan().all()


@pytest.mark.parametrize("kind", LEARNED)
def test_a_larger_gap_is_surer(kind):
    classifier = fit_classifier(kind, *rows(400, seed=0), seed=0)
    low, high = score(torch.tensor([[0.5, 0.1], [0.9, 0.8]]), classifier, None)
    assert low < high


@pytest.mark.parametrize("share", ["mixed", "all settled", "none settled"])
def test_threshold_takes_the_gap_for_the_score(share):
    features, settled = rows(50, seed=0)
    if share != "mixed":
        settled[:] = share == "all settled"
    classifier = fit_classifier("threshold", features, settled, seed=0)
    assert torch.equal(linear_score(features, classifier), features[:, FEATURES.index("gap")])


@pytest.mark.parametrize("count", [1, 10, 1000])
@pytest.mark.parametrize("kind", LEARNED)
def test_where_all_rows_are_settled_the_score_is_one_constant(kind, count):
    features, _ = rows(count, seed=0)
    classifier = fit_classifier(kind, features, np.ones(count, dtype=bool), seed=0)
    found = score(features, classifier, None)
    torch.testing.assert_close(found, torch.full((count,), math.log(count + 1)))


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize(
    ("minority", "of"),
    [
        pytest.param(0, True, id="none settled"),
        pytest.param(1, True, id="one settled"),
        pytest.param(1, False, id="one error"),
    ],
)
def test_what_cannot_be_learned_gives_no_classifier(kind, minority, of):
    assert fit_classifier(kind, *with_minority(100, minority, of), seed=0) is None
