"""Ridge regression from moments alone: penalty and rank by cross-validation, never a row.

Features are standardised, so that a penalty means the same for each of them, and the intercept
is free: with the penalty called alpha, this is scikit-learn's StandardScaler and Ridge.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.policy.moments import Moments


@dataclass(frozen=True)
class Linear:
    """The affine map y = matrix @ x + bias; fp64 matrix [n, d], bias [n]."""

    matrix: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Ridge:
    """A ridge regression whose penalty was chosen by cross-validation.

    Attributes:
        penalty: the chosen one.
        whole: fitted on all folds.
        without: for each fold, fitted on the others.

    """

    penalty: float
    whole: Linear
    without: tuple[Linear, ...]


def total(folds: Sequence[Moments]) -> Moments:
    """Moments of the rows of all folds."""
    return functools.reduce(operator.add, folds)


def solve(moments: Moments, penalty: float) -> Linear:
    """The least weighted squared error plus `penalty` times the squared coefficients.

    The coefficients are those of features divided by their standard deviation; a feature that
    never changes gets 0.
    """
    deviation = (moments.xx.diagonal() / moments.weight).clamp(min=0).sqrt()
    changes = deviation > 1e-9 * moments.x_mean.abs()  # more than fp64's rounding of the mean
    scale = torch.where(changes, 1 / deviation, 0)
    scaled = moments.xx * scale
    scaled *= scale.unsqueeze(1)
    scaled.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(scaled)
    coefficients = torch.cholesky_solve(moments.xy * scale.unsqueeze(1), factor)
    matrix = (coefficients * scale.unsqueeze(1)).T
    return Linear(matrix, intercept(moments, matrix))


def intercept(moments: Moments, matrix: Tensor) -> Tensor:
    """The bias [n] with which `matrix` [n, d] is right on average."""
    return moments.y_mean - matrix @ moments.x_mean


def error(moments: Moments, linear: Linear) -> float:
    """Mean squared error of `linear` on the rows behind `moments`, per row and target."""
    return _squared_error(moments, linear) / (float(moments.weight) * len(linear.bias))


def _squared_error(moments: Moments, linear: Linear) -> float:
    """The weighted sum over rows and targets; 0 without rows."""
    matrix = linear.matrix
    off = moments.y_mean - matrix @ moments.x_mean - linear.bias
    explained = (matrix * (2 * moments.xy.T - matrix @ moments.xx)).sum()
    return float(moments.yy.sum() - explained + moments.weight * off.square().sum())


def choose(folds: Sequence[Moments], penalties: Sequence[float]) -> Ridge:
    """The penalty (all positive) with the least error on folds it was not fitted on."""
    whole = total(folds)
    errors = dict.fromkeys(penalties, 0.0)
    for fold in folds:
        others = whole - fold
        for penalty in penalties:
            errors[penalty] += _squared_error(fold, solve(others, penalty))
    penalty = min(errors, key=errors.__getitem__)
    return Ridge(
        penalty,
        solve(whole, penalty),
        tuple(solve(whole - fold, penalty) for fold in folds),
    )


def low_rank(moments: Moments, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The map of rank `rank` that is nearest to `matrix` [n, d] on these rows.

    Nearest in the features' covariance, which is reduced-rank regression (Izenman 1975) of what
    `matrix` predicts: its projection on the leading principal directions of its predictions.

    Returns:
        down [d, rank] and up [rank, n]: x @ down @ up stands for x @ matrix.T.

    """
    return _truncated(matrix, _directions(moments, matrix), rank)


def _directions(moments: Moments, matrix: Tensor) -> Tensor:
    """Principal directions [n, n] of the predictions, the leading one first."""
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
        folds: moments of each fold.
        penalty: of the full map.
        ranks: to choose from.
        tolerance: how much larger the mean squared error may be, relative to the full map's.

    Returns:
        None if none of `ranks` is within `tolerance`.

    """
    whole = total(folds)
    full = 0.0
    errors = dict.fromkeys(sorted(ranks), 0.0)
    for fold in folds:
        others = whole - fold
        linear = solve(others, penalty)
        full += _squared_error(fold, linear)
        directions = _directions(others, linear.matrix)
        for rank in errors:
            down, up = _truncated(linear.matrix, directions, rank)
            matrix = (down @ up).T
            errors[rank] += _squared_error(fold, Linear(matrix, intercept(others, matrix)))
    return next((rank for rank, e in errors.items() if e <= full * (1 + tolerance)), None)
