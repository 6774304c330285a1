"""Probes: how an intermediate hidden state becomes next-token scores and features.

Calibration and serving both go through `Probe`, so that a feature means the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from adainfer_kernels import ProbeResult, probe
from adainfer_kernels.probe import lensed, normed
from torch import Tensor

FEATURES = ("top_prob", "gap")


def features(result: ProbeResult) -> Tensor:
    """AdaInfer's two features, fp32 [rows, 2], in the order of `FEATURES`."""
    return torch.stack([result.top_prob, result.gap], dim=-1)


@dataclass(frozen=True)
class LabelHead:
    """A fitted linear map from the hidden state straight to the labels' final scores.

    Attributes:
        head_weight: fp32 [labels, hidden size].
        head_bias: fp32 [labels].

    """

    head_weight: Tensor
    head_bias: Tensor

    def scores(self, hidden: Tensor) -> Tensor:
        """Label scores, fp32 [rows, labels], of hidden states [rows, hidden size]."""
        return torch.addmm(self.head_bias, hidden.float(), self.head_weight.T)


@dataclass(frozen=True)
class Lens:
    """Final norm and LM head on an intermediate state, after an affine lens if there is one.

    Attributes:
        norm_weight: [hidden size] of the model's final RMSNorm.
        norm_eps: its epsilon.
        head_weight: [n, hidden size], the LM head or the labels' rows of it.
        lens_weight: [hidden size, hidden size], None for the logit lens.
        lens_bias: [hidden size], goes with it.

    """

    norm_weight: Tensor
    norm_eps: float
    head_weight: Tensor
    lens_weight: Tensor | None = None
    lens_bias: Tensor | None = None

    def readout(self, hidden: Tensor) -> Tensor:
        """The state that the LM head is to read, [rows, hidden size], in the model's dtype."""
        if self.lens_weight is not None and self.lens_bias is not None:
            hidden = lensed(hidden, self.lens_weight, self.lens_bias)
        return normed(hidden, self.norm_weight, self.norm_eps)

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of the head's rows, fp32 [rows, n], of hidden states [rows, hidden size]."""
        return (self.readout(hidden) @ self.head_weight.T).float()

    def summary(self, hidden: Tensor) -> ProbeResult:
        """Best row of the head (as a column), and the numbers the features come from."""
        return probe(
            hidden,
            self.head_weight,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
            lens_weight=self.lens_weight,
            lens_bias=self.lens_bias,
        )


Probe = LabelHead | Lens
