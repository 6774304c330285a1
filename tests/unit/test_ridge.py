"""Ridge regression from moments is ridge regression on the rows."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration.fit import ridge
from vllm_adainfer.offline.calibration.fit.ridge import Linear, choose, solve

ROWS, D, N = 300, 12, 7
FOLDS = 4

Rows = tuple[Tensor, Tensor, Tensor]


def rows_of(seed: int, noise: float = 0.5, rank: int = N, rows: int = ROWS) -> Rows:
    """Features of uneven scale and mean, linear targets of a rank, uneven weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(rows, D) @ normal(D, D) * torch.logspace(-1, 2, D) + 5 * normal(D)
    y = x / x.std(0) @ normal(D, rank) @ normal(rank, N) + 3
    return x, y + noise * normal(rows, N), normal(rows).square() + 0.1


def moments_of(rows: Rows) -> Moments:
    moments = Moments.zeros(D, N)
    moments.add(*rows)
    return moments


def fold_of(rows: Rows, fold: int) -> Rows:
    x, y, weight = (part[fold::FOLDS] for part in rows)
    return x, y, weight


def others_of(rows: Rows, fold: int) -> Rows:
    kept = torch.arange(len(rows[0])) % FOLDS != fold
    x, y, weight = (part[kept] for part in rows)
    return x, y, weight


def folds_of(rows: Rows) -> list[Moments]:
    return [moments_of(fold_of(rows, fold)) for fold in range(FOLDS)]


def by_scikit_learn(rows: Rows, penalty: float) -> Linear:
    x, y, weight = (part.numpy() for part in rows)
    scaler = StandardScaler().fit(x, sample_weight=weight)
    ridge = Ridge(penalty).fit(scaler.transform(x), y, sample_weight=weight)
    matrix = torch.from_numpy(ridge.coef_ / scaler.scale_)
    return Linear(matrix, torch.from_numpy(ridge.intercept_ - matrix.numpy() @ scaler.mean_))


def squared_error(rows: Rows, linear: Linear) -> float:
    x, y, weight = rows
    return mean_squared_error(y, x @ linear.matrix.T + linear.bias, sample_weight=weight)


def assert_same(found: Linear, right: Linear, rtol: float = 1e-7) -> None:
    for ours, theirs in ((found.matrix, right.matrix), (found.bias, right.bias)):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_a_solution_is_scikit_learns(penalty):
    rows = rows_of(0)
    assert_same(solve(moments_of(rows), penalty), by_scikit_learn(rows, penalty))


def test_a_feature_that_never_changes_has_no_coefficient():
    x, y, weight = rows_of(1)
    x[:, 3] = 4.1
    matrix = solve(moments_of((x, y, weight)), 1.0).matrix
    assert not matrix[:, 3].any()
    assert matrix.isfinite().all()


def test_the_error_is_that_of_the_rows():
    seen, unseen = rows_of(2), rows_of(3)
    linear = solve(moments_of(seen), 1.0)
    for rows in (seen, unseen):
        total = ridge.squared_error(moments_of(rows), linear)
        assert total / (rows[2].sum() * N) == pytest.approx(squared_error(rows, linear))


@pytest.mark.parametrize("batch", [1, 17, ROWS])
def test_moments_do_not_depend_on_how_rows_come(batch):
    rows = rows_of(4)
    moments = Moments.zeros(D, N)
    for part in zip(*(column.split(batch) for column in rows), strict=True):
        moments.add(*part)
    assert_same(solve(moments, 1.0), by_scikit_learn(rows, 1.0))


def test_rows_of_no_weight_and_steps_of_no_rows_change_nothing():
    x, y, weight = rows_of(5)
    moments = moments_of((x, y, weight))
    before = solve(moments, 1.0)
    moments.add(x[:0], y[:0], weight[:0])
    moments.add(x, y, torch.zeros_like(weight))
    assert_same(solve(moments + Moments.zeros(D, N), 1.0), before)


def test_a_sum_without_a_fold_is_a_fit_without_its_rows():
    rows = rows_of(6)
    whole = moments_of(rows)
    for fold in range(FOLDS):
        others = whole - moments_of(fold_of(rows, fold))
        assert_same(solve(others, 1.0), by_scikit_learn(others_of(rows, fold), 1.0))


def test_a_mean_far_above_the_spread_costs_no_digits_in_single_precision():
    """As the few features of a residual stream that are thousands at every token."""
    x, y, weight = rows_of(7)
    x = x / x.std(0)
    x[:, :2] += 5000.0
    single = x.float()
    moments = Moments.zeros(D, N)
    for part in zip(single.split(50), y.float().split(50), weight.split(50), strict=True):
        moments.add(*part)
    right = by_scikit_learn((single.double(), y, weight), 1.0)
    torch.testing.assert_close(solve(moments, 1.0).matrix, right.matrix, rtol=1e-4, atol=1e-4)


def test_moments_take_the_same_memory_whatever_the_rows():
    def size(rows: int) -> int:
        return sum(part.nbytes for part in vars(moments_of(rows_of(8, rows=rows))).values())

    assert size(4000) == size(40)


@pytest.mark.parametrize("noise", [0.01, 30.0])
def test_the_penalty_is_the_best_by_cross_validation_and_each_fold_has_a_fit_without_it(noise):
    penalties = (1e-3, 1.0, 30.0, 1000.0)
    rows = rows_of(9, noise=noise, rows=60)
    held_out = {
        penalty: sum(
            squared_error(fold_of(rows, fold), by_scikit_learn(others_of(rows, fold), penalty))
            * float(fold_of(rows, fold)[2].sum())
            for fold in range(FOLDS)
        )
        for penalty in penalties
    }
    penalty, whole, without = choose(folds_of(rows), penalties)
    assert penalty == min(held_out, key=held_out.__getitem__)
    assert_same(whole, by_scikit_learn(rows, penalty))
    for fold, linear in enumerate(without):
        assert_same(linear, by_scikit_learn(others_of(rows, fold), penalty))
