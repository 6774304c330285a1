"""A policy's view at an exit point, as `explain` shows it to people."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ProbeView:
    """A policy's view of some rows; all tensors are [rows].

    Attributes:
        tokens: int64, the token that the probe would answer.
        top_prob: fp32, its probability among the tokens that the probe scores.
        gap: fp32, its lead over the second.
        odds: fp32, the classifier's score, log odds that the answer is final.
        threshold: fp32, the least score at which a row is settled.

    """

    tokens: Tensor
    top_prob: Tensor
    gap: Tensor
    odds: Tensor
    threshold: Tensor
