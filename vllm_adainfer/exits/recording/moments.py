"""Moments: what a linear regression needs of its rows, in memory independent of their number."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# A decision row weighs as much as this many other rows of a prompt.
DECISION_ROW_WEIGHT = 64.0
# One in this many of a prompt's other rows is used: more take time and improve a lens little.
STRIDE = 3


@dataclass
class Moments:
    """Weight, means and central sums of rows x [rows, d] with targets y [rows, n].

    The sums are about the mean, and sets of rows are joined as in Chan, Golub and LeVeque
    ("Updating formulae and a pairwise algorithm for computing sample variances", 1979). This keeps
    precision for features whose mean is far larger than their spread, as in a residual stream.

    All are fp64, on the CPU; ``xx`` and ``xy`` of a tuned lens at hidden size 8192 take 1 GiB.

    Attributes:
        weight: [], sum of the rows' weights.
        x_mean: [d], mean of the features.
        y_mean: [n], mean of the targets.
        xx: [d, d], weighted sum of products of centred features.
        xy: [d, n], weighted sum of products of centred features and centred targets.
        yy: [n], weighted sum of squares of each centred target.

    """

    weight: Tensor
    x_mean: Tensor
    y_mean: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, d: int, n: int) -> Moments:
        """Moments of no rows."""
        shapes = (), (d,), (n,), (d, d), (d, n), (n,)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows x [rows, d], y [rows, n] with weights [rows], on any device.

        Products of these rows are computed on their device, in fp32 unless the rows are fp64, and
        added to the sums in fp64 on the CPU.
        """
        weight = weight.to(x.device, torch.float64)
        total = weight.sum()
        if total == 0:
            return
        x_mean = weight @ x.double() / total
        y_mean = weight @ y.double() / total
        work = torch.promote_types(x.dtype, torch.float32)
        root = weight.sqrt().unsqueeze(1)
        x = ((x - x_mean) * root).to(work)
        y = ((y - y_mean) * root).to(work)
        sums = total, x_mean, y_mean, x.T @ x, x.T @ y, y.square().sum(0)
        self._join(Moments(*(tensor.to(self.weight) for tensor in sums)), 1.0)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of rows together."""
        joined = copy.deepcopy(self)
        joined._join(other, 1.0)
        return joined

    def __sub__(self, other: Moments) -> Moments:
        """Moments of the rows without those of `other`, which must be among them."""
        joined = copy.deepcopy(self)
        joined._join(other, -1.0)
        return joined

    def _join(self, other: Moments, sign: float) -> None:
        """Add the rows of `other`, or remove them, in place."""
        weight = self.weight + sign * other.weight
        share = sign * other.weight / weight if weight > 0 else torch.zeros_like(weight)
        x_apart, y_apart = other.x_mean - self.x_mean, other.y_mean - self.y_mean
        between = float(self.weight * share)
        self.xx.add_(other.xx, alpha=sign).addr_(x_apart, x_apart, alpha=between)
        self.xy.add_(other.xy, alpha=sign).addr_(x_apart, y_apart, alpha=between)
        self.yy.add_(other.yy, alpha=sign).addcmul_(y_apart, y_apart, value=between)
        self.x_mean += share * x_apart
        self.y_mean += share * y_apart
        self.weight = weight


class TunedLensSums:
    """Regression sums for a tuned lens (Belrose et al. 2023, arXiv 2303.08112) at each layer.

    The lens maps the state there to its change until the last layer. Prompts are split into folds
    by their record row, so that each fold can be predicted from the others.
    """

    def __init__(self, layers: Sequence[int], folds: int, prompts: int) -> None:
        """Use requests with record rows below `prompts`; the others are held out."""
        self._layers = layers
        self._folds = folds
        self._prompts = prompts
        self._moments: list[list[Moments]] = []

    def add(
        self, states: Sequence[Tensor], record_rows: Tensor, positions: Tensor, last: Tensor
    ) -> None:
        """Add a step's rows; arguments as for `Recorder.record`, the last state is final.

        A prompt's first row is left out: it is an attention sink, whose state is an outlier many
        times longer than any other, and no request is decided there.
        """
        chosen = last | ((record_rows + positions) % STRIDE == 0) & (positions > 0)
        chosen &= (record_rows >= 0) & (record_rows < self._prompts)
        *inner, final = states
        size = final.shape[1]
        if not self._moments:
            self._moments = [[Moments.zeros(size, size) for _ in range(self._folds)] for _ in inner]
        for fold in range(self._folds):
            rows = torch.nonzero(chosen & (record_rows % self._folds == fold)).squeeze(1)
            weight = torch.where(last[rows], DECISION_ROW_WEIGHT, 1.0)
            target = final[rows].float()
            for state, moments in zip(inner, self._moments, strict=True):
                x = state[rows].float()
                moments[fold].add(x, target - x, weight)

    def take(self) -> dict[str, Tensor]:
        """Return the sums as `moments_of` reads them, and start over."""
        taken = {
            f"lens.{layer}.{fold}.{field.name}": getattr(moments, field.name)
            for layer, by_fold in zip(self._layers, self._moments, strict=False)
            for fold, moments in enumerate(by_fold)
            for field in fields(Moments)
        }
        self._moments = []
        return taken


def moments_of(sums: Mapping[str, Tensor]) -> dict[int, list[Moments]]:
    """The moments by layer and fold, from tensors ``lens.<layer>.<fold>.<field of Moments>``."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in sums.items():
        if name.startswith("lens."):
            _, layer, fold, field = name.split(".")
            found.setdefault(int(layer), {}).setdefault(int(fold), {})[field] = tensor
    return {
        layer: [Moments(**folds[fold]) for fold in sorted(folds)] for layer, folds in found.items()
    }
