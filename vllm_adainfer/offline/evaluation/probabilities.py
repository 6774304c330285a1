"""How good label probabilities are: calibration error, Brier score, label mass.

Log-probabilities are arrays [rows, labels], over the whole vocabulary or among the labels alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.run import Logprobs, Run

BINS = 15


def true_labels(config: ArtifactConfig, examples: Sequence[Example]) -> Ints | None:
    """Index of each row's true label, [rows]; None if a row has no label."""
    index = {label.name: number for number, label in enumerate(config.labels)}
    if examples[0].labels is not None:  # a request's label is the right token
        index = {str(token): number for number, token in enumerate(config.label_ids)}
    found = [index[str(example.label)] for example in examples if example.label is not None]
    return np.array(found, dtype=np.int64) if len(found) == len(examples) else None


def quality(config: ArtifactConfig, run: Run, truth: Ints | None) -> dict[str, Any]:
    """Scores of one run; None for those that need true labels or the whole vocabulary."""
    assert run.logprobs is not None
    found: dict[str, Any] = {"ece": None, "brier": None, "label_mass": None, "bins": None}
    if config.promise.covers_mass:
        found["label_mass"] = float(label_mass(run.logprobs).mean())
    if truth is not None and config.score_head != "sigmoids":
        probabilities = among_labels(run.logprobs)
        bins = reliability(probabilities, truth)
        scores = {
            "ece": expected_calibration_error(bins),
            "brier": brier_score(probabilities, truth),
        }
        found |= {**scores, "bins": bins}
    return found


def among_labels(logprobs: Logprobs) -> Floats:
    """Softmax among the labels, [rows, labels]: each row sums to 1."""
    shifted = logprobs.astype(np.float64)
    weights = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    probabilities: Floats = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def label_mass(logprobs: Logprobs) -> Floats:
    """The labels' total probability in the whole vocabulary, [rows], between 0 and 1."""
    # Rounded logarithms may add up to a little more than 1.
    mass: Floats = np.minimum(np.exp(logprobs.astype(np.float64)).sum(axis=1), 1.0)
    return mass


def reliability(probabilities: Floats, truth: Ints) -> list[dict[str, Any]]:
    """Sort rows by the probability of their best label, and cut them into `BINS` equal bins.

    scikit-learn's `calibration_curve(strategy="quantile")` does not give the number of rows in a
    bin, which the ECE needs, and its bins are unequal where many probabilities are equal.

    `probabilities` [rows, labels] are among the labels, `truth` [rows] has the true label's index.

    Returns:
        the bins by rising confidence, at most one for each row: the number of rows, their mean
        confidence (the probability of the best label) and accuracy (how often it is the true one).

    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    order = np.argsort(confidence, kind="stable")
    return [
        {
            "rows": len(rows),
            "confidence": float(confidence[rows].mean()),
            "accuracy": float(right[rows].mean()),
        }
        for rows in np.array_split(order, min(BINS, len(order)))
    ]


def expected_calibration_error(bins: Sequence[Mapping[str, Any]]) -> float:
    """ECE: the mean distance between confidence and accuracy over the rows of `bins`, 0 to 1."""
    total = sum(one["rows"] for one in bins)
    distances = [one["rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
    return float(sum(distances) / total)


def brier_score(probabilities: Floats, truth: Ints) -> float:
    """Brier score: squared errors, summed over the labels, mean over the rows; 0 to 2.

    scikit-learn's `brier_score_loss` takes more than two labels only from 1.7 on, and halves the
    score of two. The arguments are those of `reliability`.
    """
    errors = probabilities - np.eye(probabilities.shape[1])[truth]
    return float((errors**2).sum(axis=1).mean())
