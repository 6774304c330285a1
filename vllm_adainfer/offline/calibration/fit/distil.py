"""Distil label heads: softmax regressions on the probabilities that full depth gives the labels.

Softmax regression (multinomial logistic regression) on a teacher's probabilities is Hinton, Vinyals
and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531), with a linear
student. A ridge regression on the logits, which it replaced, agrees with full depth about as often,
but its probabilities are comparable from layer to layer less well: on the fine-tuned demo model it
saved 4 to 8 points less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.offline.calibration.fit.ridge import CrossValidated, Linear
from vllm_adainfer.offline.calibration.record.rows import FOLDS
from vllm_adainfer.promise.label_subsets import restrict
from vllm_adainfer.promise.links import SOFTMAX, Link

# Small penalties give closer probabilities, but rank answers worse across layers: on the demo
# model a joint threshold saved up to 15 points less with 0.03 at every layer than with 0.3 to 1.
PENALTIES = (3.0, 1.0, 0.3, 0.1)
PENALTIES_FOR_PROBABILITIES = (*PENALTIES, 0.03, 0.01, 0.003)
ITERATIONS = 100
PRECISION = 1e-4  # of the mean cross-entropy; further steps change next to no decision


@dataclass(frozen=True)
class Taught:
    """The targets of a head, for some rows.

    Attributes:
        read: fp32 [rows, width], what it reads.
        labels: fp32 [rows, labels], the labels' probabilities at full depth.
        mass: fp32 [rows], the label mass; None if the head does not read it.
        subsets: bool [rows, labels], the labels that each row is about; None for all.
        link: how scores become probabilities.

    """

    read: Tensor
    labels: Tensor
    mass: Tensor | None = None
    subsets: Tensor | None = None
    link: Link = SOFTMAX

    def of_rows(self, rows: Tensor) -> Taught:
        """The same of bool `rows` alone."""
        mass = None if self.mass is None else self.mass[rows]
        subsets = None if self.subsets is None else self.subsets[rows]
        return Taught(self.read[rows], self.labels[rows], mass, subsets, self.link)

    def loss(self, linear: Linear) -> tuple[float, Tensor]:
        """The mean cross-entropy, and its gradient [rows, scores] by the scores.

        The gradient is the difference of the probabilities.
        """
        scores = self.read @ linear.matrix.T + linear.bias
        labels = self.labels.shape[1]
        own = restrict(scores[:, :labels], self.subsets)
        wrong = self.link.probabilities(own) - self.labels
        if self.mass is not None:
            odds = scores[:, labels]
            wrong = torch.cat([wrong, (odds.sigmoid() - self.mass).unsqueeze(1)], dim=1)
        return float(self.cross_entropy(scores)), wrong / max(1, len(scores))

    def cross_entropy(self, scores: Tensor) -> Tensor:
        """The mean cross-entropy of `scores` fp32 [rows, labels or labels + 1]."""
        labels = self.labels.shape[1]
        loss = self.link.cross_entropy(restrict(scores[:, :labels], self.subsets), self.labels)
        if self.mass is not None:
            odds = scores[:, labels]
            loss = loss + torch.nn.functional.softplus(odds).sum() - self.mass @ odds
        return loss / max(1, len(scores))


def distil(taught: Taught, folds: Ints, penalties: Sequence[float]) -> CrossValidated:
    """Fit a head, with the penalty that predicts unseen `folds` [rows] best.

    The penalties are tried from the largest; they weigh half of the squared coefficients of
    standardised features.
    """
    places = [torch.from_numpy(folds == fold) for fold in range(FOLDS)]
    held_out = [taught.of_rows(here) for here in places]
    solvers = [solver(taught.of_rows(~here)) for here in places]
    without: list[Linear | None] = [None] * FOLDS
    best, least = penalties[0], np.inf
    chosen: list[Linear] = []
    for penalty in penalties:
        fits = [best_of(penalty, near) for best_of, near in zip(solvers, without, strict=True)]
        error = sum(rows.loss(fit)[0] for rows, fit in zip(held_out, fits, strict=True))
        if chosen and error >= least:  # a smaller penalty only fits the same rows more closely
            break
        best, least, chosen, without = penalty, error, fits, [*fits]
    return best, solve(taught, best), chosen


def distil_fields(
    taught: Taught, sizes: Sequence[int], folds: Ints, penalties: Sequence[float]
) -> CrossValidated:
    """Fit a head for each field of an object, see `distil`; all of them in one.

    `taught` reads [rows, fields, width]; `sizes` are the labels of each field. A label mass is read
    at the last row.
    """
    masses = [None] * (len(sizes) - 1) + [taught.mass]
    parts = zip(taught.read.unbind(1), taught.labels.split(list(sizes), dim=1), masses, strict=True)
    fits = [distil(Taught(*part), folds, penalties) for part in parts]
    whole, *without = (
        Linear(
            torch.cat([one.matrix for one in of_fields]), torch.cat([one.bias for one in of_fields])
        )
        for of_fields in zip(*([whole, *without] for _, whole, without in fits), strict=True)
    )
    return fits[0][0], whole, without


def solve(taught: Taught, penalty: float) -> Linear:
    """Minimise the mean cross-entropy plus `penalty` / 2 times the squared coefficients.

    The coefficients are those of features divided by their standard deviation; a constant feature
    gets 0. The bias is not penalised.
    """
    return solver(taught)(penalty, None)


def solver(taught: Taught) -> Callable[[float, Linear | None], Linear]:
    """`solve` for several penalties on the same rows, beginning at a map of raw features.

    Where rows are fewer than features, coefficients are sought among the combinations of rows
    alone, because any other part of them would change no score and only add to the penalty. In an
    orthonormal basis of these that is the same problem with as many features as rows.
    """
    mean, deviation = taught.read.mean(0), taught.read.std(0, correction=0)
    scale = torch.where(deviation > 1e-9 * mean.abs(), 1 / deviation, 0)
    read, basis = (taught.read - mean) * scale, None
    if len(read) < read.shape[1]:
        basis, triangle = torch.linalg.qr(read.T)
        read = triangle.T.contiguous()
    rows = replace(taught, read=read)
    shape = rows.labels.shape[1] + (rows.mass is not None), read.shape[1] + 1

    def best(penalty: float, start: Linear | None) -> Linear:
        def objective(flat: Floats) -> tuple[float, Floats]:
            both = torch.from_numpy(flat).view(shape).to(read)
            matrix, bias = both[:, :-1], both[:, -1]
            loss, wrong = rows.loss(Linear(matrix, bias))
            by_matrix = wrong.T @ read + penalty * matrix
            gradient = torch.cat([by_matrix, wrong.sum(0).unsqueeze(1)], dim=1)
            return loss + penalty / 2 * float(
                matrix.square().sum()
            ), gradient.double().flatten().numpy()

        first = torch.zeros(shape, dtype=torch.float64)
        if start is not None:
            matrix = start.matrix / torch.where(scale > 0, scale, 1)
            if basis is not None:
                matrix = matrix @ basis
            bias = start.bias + start.matrix @ mean
            first = torch.cat([matrix, bias.unsqueeze(1)], dim=1).double()
        found = minimize(
            objective,
            first.flatten().numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": ITERATIONS, "ftol": PRECISION},
        )
        both = torch.from_numpy(found.x).view(shape).to(read)
        matrix = both[:, :-1]
        if basis is not None:
            matrix = matrix @ basis.T
        matrix = matrix * scale
        return Linear(matrix, both[:, -1] - matrix @ mean)

    return best
