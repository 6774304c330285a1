"""Ridge regression from moments alone: cross-validation chooses the penalty.

Features are standardised, so that a penalty means the same for each of them, and the intercept is
not penalised: this is scikit-learn's StandardScaler and Ridge, where the penalty is called alpha.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vllm_adainfer.exits.recording.moments import Moments


@dataclass(frozen=True)
class Linear:
    """The affine map y = matrix @ x + bias; fp64 matrix [n, d], bias [n]."""

    matrix: Tensor
    bias: Tensor


# A penalty chosen by cross-validation, the fit on all folds, and for each fold that on the others.
CrossValidated: TypeAlias = tuple[float, Linear, Sequence[Linear]]


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
    return Linear(matrix, moments.y_mean - matrix @ moments.x_mean)


def squared_error(moments: Moments, linear: Linear) -> float:
    """The weighted squared error summed over rows and targets; 0 without rows."""
    matrix = linear.matrix
    off = moments.y_mean - matrix @ moments.x_mean - linear.bias
    explained = (matrix * (2 * moments.xy.T - matrix @ moments.xx)).sum()
    return float(moments.yy.sum() - explained + moments.weight * off.square().sum())


def choose(folds: Sequence[Moments], penalties: Sequence[float]) -> CrossValidated:
    """The penalty (all are positive) with the least error on folds it was not fitted on."""
    whole = functools.reduce(operator.add, folds)
    errors = dict.fromkeys(penalties, 0.0)
    for fold in folds:
        others = whole - fold
        for penalty in penalties:
            errors[penalty] += squared_error(fold, solve(others, penalty))
    penalty = min(errors, key=errors.__getitem__)
    return penalty, solve(whole, penalty), [solve(whole - fold, penalty) for fold in folds]
