"""How good the probabilities of labels are, and how far exits move them.

Log-probabilities are arrays [rows, labels] over the whole vocabulary, or among the labels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_adainfer.arrays import Bools, Floats, Ints

BINS = 15

Logprobs = npt.NDArray[np.float32]


def among_labels(logprobs: Logprobs) -> Floats:
    """Softmax among the labels, [rows, labels]: each row sums to 1."""
    shifted = logprobs.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    probabilities: Floats = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def label_mass(logprobs: Logprobs) -> Floats:
    """The labels' share of the whole vocabulary, [rows], between 0 and 1.

    `logprobs` are over the whole vocabulary.
    """
    # Rounded logarithms may add up to a little more than 1.
    mass: Floats = np.minimum(np.exp(logprobs.astype(np.float64)).sum(axis=1), 1.0)
    return mass


def largest_moves(logprobs: Logprobs, full: Logprobs, in_vocabulary: bool) -> Floats:
    """How far the probability that moves most is from full depth's, [rows], between 0 and 1.

    Args:
        logprobs: of the answers.
        full: of full depth, on the same rows.
        in_vocabulary: whether the labels' probabilities in the whole vocabulary and their sum, the
            label mass, count beside those among the labels.

    """
    moves = np.abs(among_labels(logprobs) - among_labels(full)).max(axis=1)
    if in_vocabulary:
        here, there = np.exp(logprobs.astype(np.float64)), np.exp(full.astype(np.float64))
        mass = np.abs(label_mass(logprobs) - label_mass(full))
        moves = np.maximum.reduce([moves, np.abs(here - there).max(axis=1), mass])
    found: Floats = moves
    return found


@dataclass(frozen=True)
class Moves:
    """How answers differ from those of full depth.

    Attributes:
        move_mean: of the largest move of each row.
        move_p95: 95th percentile of the same.
        move_max: the largest of all.
        label_differs: [rows], whether the best label is another one.
        wrong: [rows], whether the policy's promise is broken: the best label is another one, a move
            is beyond the tolerance, or a label is answered for a token that is none.

    """

    move_mean: float
    move_p95: float
    move_max: float
    label_differs: Bools
    wrong: Bools


def compare_probabilities(
    logprobs: Logprobs,
    full: Logprobs,
    tolerance: float,
    in_vocabulary: bool,
    label_for_none: Bools,
) -> Moves:
    """Compare probabilities with those of full depth, row by row.

    Args:
        logprobs: of the answers.
        full: of full depth, on the same rows.
        tolerance: how far a probability may move.
        in_vocabulary: whether the promise is about the whole vocabulary too; see `largest_moves`.
        label_for_none: [rows], whether a label was answered where full depth's best token is no
            label; counts only with `in_vocabulary`.

    """
    moves = largest_moves(logprobs, full, in_vocabulary)
    differs = logprobs.argmax(axis=1) != full.argmax(axis=1)
    wrong = differs | (moves > tolerance)
    if in_vocabulary:
        wrong |= label_for_none
    return Moves(
        move_mean=float(moves.mean()),
        move_p95=float(np.quantile(moves, 0.95)),
        move_max=float(moves.max()),
        label_differs=differs,
        wrong=wrong,
    )


@dataclass(frozen=True)
class Bin:
    """Rows whose best labels are about equally probable.

    Attributes:
        rows: how many.
        confidence: mean probability of the best label.
        accuracy: share of rows whose best label is the true one.

    """

    rows: int
    confidence: float
    accuracy: float


def reliability(probabilities: Floats, truth: Ints) -> list[Bin]:
    """Rows sorted by the probability of their best label, cut into `BINS` bins of equal size.

    scikit-learn's `calibration_curve(strategy="quantile")` does not say how many rows are in a
    bin, which the ECE needs, and where many probabilities are equal its bins are not equal.

    Args:
        probabilities: [rows, labels], among the labels.
        truth: [rows], index of each row's true label.

    Returns:
        the bins by rising confidence; with fewer rows than `BINS`, one for each row.

    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    order = np.argsort(confidence, kind="stable")
    return [
        Bin(len(rows), float(confidence[rows].mean()), float(right[rows].mean()))
        for rows in np.array_split(order, min(BINS, len(order)))
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """ECE: the mean distance of confidence and accuracy over the rows of `bins`, 0 to 1."""
    total = sum(one.rows for one in bins)
    return sum(one.rows * abs(one.accuracy - one.confidence) for one in bins) / total


def brier_score(probabilities: Floats, truth: Ints) -> float:
    """Squared errors, summed over the labels, mean over the rows: 0 to 2.

    scikit-learn's `brier_score_loss` takes more than two labels only from 1.7 on, and halves the
    score of two.

    Args:
        probabilities: [rows, labels], among the labels.
        truth: [rows], index of each row's true label.

    """
    errors = probabilities.copy()
    errors[np.arange(len(truth)), truth] -= 1
    return float((errors**2).sum(axis=1).mean())
