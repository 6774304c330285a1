"""Losses: what an early answer costs, by what the policy's bound is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.offline.calibration.bound import FloatArray
from vllm_adainfer.offline.calibration.collect import Ints
from vllm_adainfer.policy.probabilities import LabelProbabilities

RightTokens = Sequence[set[int]]


@dataclass(frozen=True)
class Said:
    """What a probe says about some rows.

    Attributes:
        features: fp32 [rows, n], what a classifier reads.
        tokens: int64 [rows], the answers.
        probabilities: of the labels; None if the probe reads the answer alone.

    """

    features: Tensor
    tokens: Ints
    probabilities: LabelProbabilities | None = None


class Loss(Protocol):
    """What the mean of the bound is over."""

    def of(self, said: Said, full: Ints, rows: Ints) -> FloatArray:
        """[rows], the loss of each answer.

        Args:
            said: by a probe.
            full: int64 [rows], the full model's answers.
            rows: int64 [rows], places in the recording.

        """


@dataclass(frozen=True)
class Disagreement(Loss):
    """1 where the answer differs from the full model's, else 0."""

    @override
    def of(self, said: Said, full: Ints, rows: Ints) -> FloatArray:
        return (said.tokens != full).astype(np.float64)


@dataclass(frozen=True)
class AccuracyLost(Loss):
    """1 where the full model is right and the answer is not, -1 in the opposite case, else 0.

    Attributes:
        right: the right tokens of each row of the recording.

    """

    right: RightTokens

    @override
    def of(self, said: Said, full: Ints, rows: Ints) -> FloatArray:
        return is_right(full, self.right, rows) - is_right(said.tokens, self.right, rows)


@dataclass(frozen=True)
class ProbabilityMoved(Loss):
    """1 where the answer differs or a probability moves by more than the tolerance, else 0.

    Attributes:
        full: the labels' probabilities at full depth, of each row of the recording.
        label_is_best: bool [rows], whether the best token of the whole vocabulary is a label.
        tolerance: how far a probability may move.
        with_mass: whether probabilities in the whole vocabulary count, too: then an answer is also
            wrong if the best token is no label.

    """

    full: LabelProbabilities
    label_is_best: Tensor
    tolerance: float
    with_mass: bool

    @override
    def of(self, said: Said, full: Ints, rows: Ints) -> FloatArray:
        assert said.probabilities is not None
        reference = LabelProbabilities(self.full.among[rows], self.full.mass[rows])
        moved = said.probabilities.largest_move(reference, self.with_mass)
        wrong = (said.tokens != full) | ~(moved <= self.tolerance).numpy()
        if self.with_mass:
            wrong |= ~self.label_is_best[rows].numpy()
        return wrong.astype(np.float64)


def is_right(tokens: Ints, right: RightTokens, rows: Ints) -> FloatArray:
    """[rows], 1 where the token is one of the right ones for its row, else 0."""
    pairs = zip(tokens.tolist(), rows.tolist(), strict=True)
    return np.array([float(token in right[row]) for token, row in pairs])
