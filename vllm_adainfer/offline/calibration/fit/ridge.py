"""Ridge regression from moments alone: cross-validation chooses the penalty and the rank.

Features are standardised, so that a penalty means the same for each of them, and the intercept is
not penalised: this is scikit-learn's StandardScaler and Ridge, where the penalty is called alpha.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.exits.recording.moments import Moments


@dataclass(frozen=True)
class Linear:
    """The affine map y = matrix @ x + bias; fp64 matrix [n, d], bias [n]."""

    matrix: Tensor
    bias: Tensor


@dataclass(frozen=True)
class CrossValidated:
    """A fit with a penalty chosen by cross-validation.

    Attributes:
        penalty: the chosen penalty.
        whole: the fit on all folds.
        without: for each fold, the fit on the others.

    """

    penalty: float
    whole: Linear
    without: tuple[Linear, ...]


def total(folds: Sequence[Moments]) -> Moments:
    """The moments of the rows of all folds."""
    return functools.reduce(operator.add, folds)


def solve(moments: Moments, penalty: float) -> Linear:
    """Minimise the weighted squared error plus `penalty` times the squared coefficients.

    The coefficients are those of features divided by their standard deviation; a constant feature
    gets 0.
    """
    deviation = (moments.xx.diagonal() / moments.weight).clamp(min=0).sqrt()
    changes = deviation > 1e-9 * moments.x_mean.abs()  # more than fp64 rounds the mean by
    scale = torch.where(changes, 1 / deviation, 0)
    scaled = moments.xx * scale
    scaled *= scale.unsqueeze(1)
    scaled.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(scaled)
    coefficients = torch.cholesky_solve(moments.xy * scale.unsqueeze(1), factor)
    matrix = (coefficients * scale.unsqueeze(1)).T
    return Linear(matrix, intercept(moments, matrix))


def intercept(moments: Moments, matrix: Tensor) -> Tensor:
    """The bias [n] that makes `matrix` [n, d] right on average."""
    return moments.y_mean - matrix @ moments.x_mean


def squared_error(moments: Moments, linear: Linear) -> float:
    """The weighted squared error summed over rows and targets; 0 without rows."""
    matrix = linear.matrix
    off = moments.y_mean - matrix @ moments.x_mean - linear.bias
    explained = (matrix * (2 * moments.xy.T - matrix @ moments.xx)).sum()
    return float(moments.yy.sum() - explained + moments.weight * off.square().sum())


def choose(folds: Sequence[Moments], penalties: Sequence[float]) -> CrossValidated:
    """The penalty (all are positive) with the least error on folds it was not fitted on."""
    whole = total(folds)
    errors = dict.fromkeys(penalties, 0.0)
    for fold in folds:
        others = whole - fold
        for penalty in penalties:
            errors[penalty] += squared_error(fold, solve(others, penalty))
    penalty = min(errors, key=errors.__getitem__)
    return CrossValidated(
        penalty,
        solve(whole, penalty),
        tuple(solve(whole - fold, penalty) for fold in folds),
    )


def low_rank(moments: Moments, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The map of rank `rank` whose predictions are nearest to those of `matrix` [n, d].

    Nearest on the rows behind `moments`. This is reduced-rank regression (Izenman 1975) on the
    predictions of `matrix`: the projection on their leading principal directions.

    Returns:
        down [d, rank] and up [rank, n]: x @ down @ up stands for x @ matrix.T.

    """
    return _truncated(matrix, _directions(moments, matrix), rank)


def _directions(moments: Moments, matrix: Tensor) -> Tensor:
    """The principal directions [n, n] of the predictions, the leading one first."""
    _, directions = torch.linalg.eigh(matrix @ moments.xx @ matrix.T)
    return directions.flip(1)


def _truncated(matrix: Tensor, directions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    kept = directions[:, :rank]
    return matrix.T @ kept, kept.T


def choose_rank(
    folds: Sequence[Moments], penalty: float, ranks: Sequence[int], tolerance: float
) -> int | None:
    """The smallest rank that predicts unseen folds as well as the full map.

    Args:
        folds: the moments of each fold.
        penalty: the penalty of the full map.
        ranks: the ranks to choose from.
        tolerance: the largest increase of the mean squared error, as a share of the full map's.

    Returns:
        None if none of `ranks` is within `tolerance`.

    """
    whole = total(folds)
    full = 0.0
    errors = dict.fromkeys(sorted(ranks), 0.0)
    for fold in folds:
        others = whole - fold
        linear = solve(others, penalty)
        full += squared_error(fold, linear)
        directions = _directions(others, linear.matrix)
        for rank in errors:
            down, up = _truncated(linear.matrix, directions, rank)
            matrix = (down @ up).T
            errors[rank] += squared_error(fold, Linear(matrix, intercept(others, matrix)))
    return next((rank for rank, e in errors.items() if e <= full * (1 + tolerance)), None)
