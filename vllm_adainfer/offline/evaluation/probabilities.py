"""The report's rows about label probabilities: how good they are, and how far exits move them.

Log-probabilities are arrays [rows, labels], over the whole vocabulary or among the labels alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Logprobs, Rounds, Run
from vllm_adainfer.offline.reports.shares import Share, of_rounds

BINS = 15
MOVES: dict[str, Callable[[Any], Any]] = {
    "move_mean": np.mean,
    "move_p95": partial(np.quantile, q=0.95),
    "move_max": np.max,
}

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def probability_rows(
    config: ArtifactConfig, examples: Sequence[Example], groups: Ints, rounds: Rounds
) -> dict[str, Any]:
    """How good the probabilities are, and how far they are from never exiting in the same round.

    Comparisons are medians over the rounds, like the report's disagreement; ECE, Brier score, label
    mass and bins are those of the first round, like its accuracy.

    Args:
        config: config of an artifact for probabilities.
        examples: the prompts. If one has no label, ECE, Brier score and bins are None.
        groups: [prompts], the group of each prompt; groups are independent.
        rounds: the runs, all with log-probabilities.

    Returns:
        a row for `stock`, whose differences are rounding, one for `never_exit`, and `levels`, with
        a row for each epsilon.

    """
    truth = _true_labels(config, examples)
    full = [by_epsilon[NEVER_EXIT] for _, by_epsilon in rounds]

    def row(runs: Sequence[Run]) -> dict[str, Any]:
        found = _quality(config, runs[0], truth)
        compared = [_compare(config, run, other) for run, other in zip(runs, full, strict=True)]
        for name, summary in MOVES.items():
            found[name] = statistics.median(float(summary(one.moves)) for one in compared)
        for name in ("label_differs", "wrong"):
            found[name], found[f"{name}_95"] = of_rounds(
                [
                    Share(getattr(one, name).astype(np.float64), np.ones(len(groups)), groups)
                    for one in compared
                ]
            )
        return found

    return {
        "stock": row([baseline for baseline, _ in rounds]),
        "never_exit": row(full),
        "levels": [
            {
                "epsilon": level.epsilon,
                **row([by_epsilon[level.epsilon] for _, by_epsilon in rounds]),
            }
            for level in config.levels
        ],
    }


def default_level(report: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a report's `probabilities` at the artifact's own epsilon."""
    rows: list[dict[str, Any]] = report["probabilities"]["levels"]
    return next(row for row in rows if row["epsilon"] == report["epsilon"])


def _true_labels(config: ArtifactConfig, examples: Sequence[Example]) -> Ints | None:
    """Index of each row's true label, [rows]; None if a row has no label."""
    index = {label.name: number for number, label in enumerate(config.labels)}
    if examples[0].labels is not None:  # a request's label is the right token
        index = {str(token): number for number, token in enumerate(config.label_ids)}
    found = [index[str(example.label)] for example in examples if example.label is not None]
    return np.array(found, dtype=np.int64) if len(found) == len(examples) else None


def _quality(config: ArtifactConfig, run: Run, truth: Ints | None) -> dict[str, Any]:
    """Scores of one run; None for those that need true labels or the whole vocabulary."""
    assert run.logprobs is not None
    found: dict[str, Any] = {"ece": None, "brier": None, "label_mass": None, "bins": None}
    if config.label_mass:
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


def _compare(config: ArtifactConfig, run: Run, full: Run) -> Moves:
    assert run.logprobs is not None
    assert full.logprobs is not None
    assert config.tolerance is not None
    if config.score_head == "sigmoids":  # no label is the answer
        moves = np.abs(np.exp(run.logprobs) - np.exp(full.logprobs)).max(axis=1).astype(np.float64)
        return Moves(moves, np.zeros(len(moves), np.bool_), moves > config.tolerance)
    ids = list(config.label_ids)
    answered, best = (np.isin([text[0] for text in either.texts], ids) for either in (run, full))
    # Apart from rounding, only an exit can answer a label where the best token is not one.
    return compare_probabilities(
        run.logprobs, full.logprobs, config.tolerance, config.label_mass, answered & ~best
    )


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


def largest_moves(logprobs: Logprobs, full: Logprobs, in_vocabulary: bool) -> Floats:
    """For each row the largest difference of a probability from full depth, [rows], 0 to 1.

    Args:
        logprobs: the log-probabilities of the answers.
        full: those of full depth, for the same rows.
        in_vocabulary: whether to compare also the labels' probabilities in the whole vocabulary
            and their sum, the label mass.

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
        moves: [rows], the largest difference of a probability, see `largest_moves`.
        label_differs: [rows], whether the best label is a different one.
        wrong: [rows], whether the answer breaks the policy's promise: the best label differs, a
            probability moves beyond the tolerance, or a label stands for a token that is none.

    """

    moves: Floats
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
        logprobs: the log-probabilities of the answers.
        full: those of full depth, for the same rows.
        tolerance: how far a probability may move.
        in_vocabulary: whether the promise covers the whole vocabulary; see `largest_moves`.
        label_for_none: [rows], whether a label was answered where full depth's best token is not a
            label; counts only with `in_vocabulary`.

    """
    moves = largest_moves(logprobs, full, in_vocabulary)
    differs = logprobs.argmax(axis=1) != full.argmax(axis=1)
    wrong = differs | (moves > tolerance)
    return Moves(moves, differs, wrong | label_for_none if in_vocabulary else wrong)


def reliability(probabilities: Floats, truth: Ints) -> list[dict[str, Any]]:
    """Sort rows by the probability of their best label, and cut them into `BINS` equal bins.

    scikit-learn's `calibration_curve(strategy="quantile")` does not give the number of rows in a
    bin, which the ECE needs, and its bins are unequal where many probabilities are equal.

    Args:
        probabilities: [rows, labels], among the labels.
        truth: [rows], index of each row's true label.

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
    score of two.

    Args:
        probabilities: [rows, labels], among the labels.
        truth: [rows], index of each row's true label.

    """
    errors = probabilities - np.eye(probabilities.shape[1])[truth]
    return float((errors**2).sum(axis=1).mean())
