"""A distilled label head is the softmax regression that scikit-learn would fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vllm_adainfer.offline.calibration.fit import distil as distilling
from vllm_adainfer.offline.calibration.fit.distil import (
    Taught,
    distil,
    distil_fields,
    solve,
    solver,
)
from vllm_adainfer.offline.calibration.fit.ridge import Linear
from vllm_adainfer.offline.calibration.record.rows import FOLDS

ROWS, WIDTH, LABELS = 240, 6, 3


@pytest.fixture(autouse=True)
def to_the_last_digit(monkeypatch) -> None:
    monkeypatch.setattr(distilling, "PRECISION", 1e-14)
    monkeypatch.setattr(distilling, "ITERATIONS", 1000)


def rows_of(seed: int, mass: bool = False, noise: float = 1.0, width: int = WIDTH) -> Taught:
    """What is read tells of the labels' probabilities, and of their mass, but for some noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    read = 3 * normal(ROWS, width) + 5
    labels = (read @ normal(width, LABELS) / 3 + noise * normal(ROWS, LABELS)).softmax(1)
    own_mass = (read @ normal(width) / 5).sigmoid() if mass else None
    return Taught(read, labels, own_mass)


def probabilities(rows: Taught, linear: Linear) -> torch.Tensor:
    return (rows.read @ linear.matrix.T + linear.bias)[:, :LABELS].softmax(1)


@pytest.mark.parametrize("width", [WIDTH, ROWS + 60])
@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_a_head_is_the_softmax_regression_of_standardised_features(penalty, width):
    """The oracle gets each row once a label, weighed by the label's probability."""
    rows = rows_of(0, width=width)
    mean, deviation = rows.read.mean(0), rows.read.std(0, correction=0)
    features = ((rows.read - mean) / deviation).repeat(LABELS, 1).numpy()
    answers = np.repeat(np.arange(LABELS), ROWS)
    oracle = LogisticRegression(C=1 / (penalty * ROWS), tol=1e-10, max_iter=10_000)
    oracle.fit(features, answers, sample_weight=rows.labels.T.flatten().numpy())
    expected = oracle.predict_proba(features[:ROWS])
    found = probabilities(rows, solve(rows, penalty))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("width", [WIDTH, ROWS + 60])
def test_a_warm_start_ends_at_the_same_head(width):
    rows = rows_of(1, mass=True, width=width)
    cold = solve(rows, 0.1)
    warm = solver(rows)(0.1, solve(rows, 3.0))
    torch.testing.assert_close(warm.matrix, cold.matrix, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(warm.bias, cold.bias, atol=1e-3, rtol=1e-3)


def test_the_mass_is_a_logistic_regression_beside_the_labels():
    rows = rows_of(2, mass=True, noise=0.0)
    linear = solve(rows, 1e-5)
    found = (rows.read @ linear.matrix.T + linear.bias)[:, LABELS].sigmoid()
    torch.testing.assert_close(found, rows.mass, atol=0.01, rtol=0.01)
    alone = solve(replace(rows, mass=None), 1e-5)
    torch.testing.assert_close(linear.matrix[:LABELS], alone.matrix, atol=1e-2, rtol=1e-2)


def test_a_row_teaches_only_of_the_labels_that_it_is_about():
    """A label that no row is about keeps no coefficients, and the others are as without it."""
    rows = rows_of(3)
    two = rows.labels[:, :2] / rows.labels[:, :2].sum(1, keepdim=True)
    wider = torch.cat([two, torch.zeros(ROWS, 1, dtype=torch.float64)], dim=1)
    about = torch.tensor([True, True, False]).expand(ROWS, 3)
    found = solve(Taught(rows.read, wider, subsets=about), 0.1)
    expected = solve(Taught(rows.read, two), 0.1)
    torch.testing.assert_close(found.matrix[:2], expected.matrix, atol=1e-5, rtol=1e-4)
    assert found.matrix[2].abs().max() == 0


@pytest.mark.parametrize("mass", [False, True])
def test_rows_fewer_than_features_give_the_head_that_the_features_give(mass):
    """Each row twice is the same mean of losses, and more rows than features."""
    rows = rows_of(7, mass=mass, width=ROWS + 60)
    twice = Taught(
        *(
            None if one is None else torch.cat([one, one])
            for one in (rows.read, rows.labels, rows.mass)
        )
    )
    assert len(rows.read) < rows.read.shape[1] < len(twice.read)
    found, expected = solve(rows, 0.1), solve(twice, 0.1)
    torch.testing.assert_close(found.matrix, expected.matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bias, expected.bias, atol=1e-4, rtol=1e-4)


def test_a_constant_feature_gets_no_coefficient():
    rows = rows_of(4)
    read = torch.cat([rows.read, torch.full((ROWS, 1), 7.0, dtype=torch.float64)], dim=1)
    found, expected = solve(Taught(read, rows.labels), 0.1), solve(rows, 0.1)
    assert found.matrix[:, WIDTH].abs().max() == 0
    torch.testing.assert_close(found.matrix[:, :WIDTH], expected.matrix, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("noise", "largest"), [(0.0, False), (30.0, True)])
def test_the_penalty_is_the_one_that_predicts_unseen_folds_best(noise, largest):
    """Where there is nothing but noise that is the largest, and where there is none the least."""
    penalties, folds = (10.0, 0.1, 1e-4), np.arange(ROWS) % FOLDS
    penalty, _, _ = distil(rows_of(5, noise=noise), folds, penalties)
    assert penalty == (penalties[0] if largest else penalties[-1])


def test_each_fold_has_a_head_that_has_not_seen_it():
    rows, folds = rows_of(6), np.arange(ROWS) % FOLDS
    _, _, fits = distil(rows, folds, (0.1,))
    for fold, without in enumerate(fits):
        own = solve(rows.of_rows(torch.from_numpy(folds != fold)), 0.1)
        torch.testing.assert_close(without.matrix, own.matrix, atol=1e-5, rtol=1e-4)


def test_the_heads_of_an_objects_fields_are_those_of_each_alone():
    """A field with one value has nothing to learn."""
    folds, penalties = np.arange(ROWS) % FOLDS, (3.0, 0.1)
    rows = [rows_of(seed, noise=noise) for seed, noise in ((8, 0.1), (9, 30.0))]
    lone = Taught(rows[0].read, torch.ones(ROWS, 1, dtype=torch.float64))
    parts = [rows[0], lone, rows[1]]
    taught = Taught(
        torch.stack([part.read for part in parts], dim=1),
        torch.cat([part.labels for part in parts], dim=1),
    )
    _, whole, without = distil_fields(taught, (LABELS, 1, LABELS), folds, penalties)
    alone = [distil(part, folds, penalties) for part in (rows[0], rows[1])]
    assert alone[0][0] != alone[1][0], "each has the penalty that suits it"
    for found, *own in zip(
        [whole, *without], *([one, *more] for _, one, more in alone), strict=True
    ):
        assert found.matrix.shape == (2 * LABELS + 1, WIDTH)
        for columns, one in ((slice(LABELS), own[0]), (slice(LABELS + 1, None), own[1])):
            torch.testing.assert_close(found.matrix[columns], one.matrix)
            torch.testing.assert_close(found.bias[columns], one.bias)
        assert found.matrix[LABELS].abs().max() == 0
