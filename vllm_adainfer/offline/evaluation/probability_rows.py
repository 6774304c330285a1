"""The rows of an evaluation report that are about the probabilities of labels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.evaluation.probabilities import (
    Logprobs,
    Moves,
    among_labels,
    brier_score,
    compare_probabilities,
    expected_calibration_error,
    label_mass,
    reliability,
)
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.reports.shares import Share, of_rounds


def probability_rows(
    config: ArtifactConfig,
    tolerance: float,
    examples: Sequence[Example],
    groups: Ints,
    rounds: Sequence[tuple[Run, dict[float, Run]]],
) -> dict[str, Any]:
    """How good the probabilities are, and how far they are from never exiting in the same round.

    What is compared is the median over the rounds, like the report's disagreement; ECE, Brier
    score, label mass and bins are the first round's, like its accuracy.

    Args:
        config: of the artifact.
        tolerance: its own.
        examples: the prompts; without a label in each, ECE, Brier score and bins are None.
        groups: [prompts], those that came together.
        rounds: for each round, stock's run and ours by epsilon, which include `NEVER_EXIT`. All of
            them read probabilities.

    Returns:
        a row for `stock`, whose moves are rounding, one for `never_exit`, and `levels`, with a row
        for each epsilon.

    """
    truth = _true_labels(config, examples)

    def row(runs: Sequence[Run]) -> dict[str, Any]:
        moves = [
            _moves(config, tolerance, run, by_epsilon[NEVER_EXIT])
            for run, (_, by_epsilon) in zip(runs, rounds, strict=True)
        ]
        found = _quality(config, runs[0], truth)
        for name in ("move_mean", "move_p95", "move_max"):
            found[name] = statistics.median(getattr(move, name) for move in moves)
        for name in ("label_differs", "wrong"):
            shares = [
                Share(getattr(move, name).astype(np.float64), np.ones(len(groups)), groups)
                for move in moves
            ]
            found[name], found[f"{name}_95"] = of_rounds(shares)
        return found

    def ours(epsilon: float) -> list[Run]:
        return [by_epsilon[epsilon] for _, by_epsilon in rounds]

    return {
        "stock": row([baseline for baseline, _ in rounds]),
        "never_exit": row(ours(NEVER_EXIT)),
        "levels": [
            {"epsilon": level.epsilon, **row(ours(level.epsilon))} for level in config.levels
        ],
    }


def _true_labels(config: ArtifactConfig, examples: Sequence[Example]) -> Ints | None:
    """Index of each row's true label, [rows]; None if a row has no label."""
    index = {label.name: number for number, label in enumerate(config.labels)}
    if examples[0].labels is not None:  # of a request, the right token
        index = {str(token): number for number, token in enumerate(config.label_ids)}
    found = [index[str(example.label)] for example in examples if example.label is not None]
    return np.array(found, dtype=np.int64) if len(found) == len(examples) else None


def _quality(config: ArtifactConfig, run: Run, truth: Ints | None) -> dict[str, Any]:
    """Measures of one run; None for those that need true labels or the whole vocabulary."""
    logprobs = _read(run)
    found: dict[str, Any] = {"ece": None, "brier": None, "label_mass": None, "bins": None}
    if config.label_mass:
        found["label_mass"] = float(label_mass(logprobs).mean())
    if truth is not None:
        probabilities = among_labels(logprobs)
        bins = reliability(probabilities, truth)
        found["ece"] = expected_calibration_error(bins)
        found["brier"] = brier_score(probabilities, truth)
        found["bins"] = [asdict(one) for one in bins]
    return found


def _moves(config: ArtifactConfig, tolerance: float, run: Run, full: Run) -> Moves:
    ids = list(config.label_ids)
    answered, best = (np.isin([text[0] for text in either.texts], ids) for either in (run, full))
    # Apart from rounding, only an exit answers with a label where the best token is none.
    return compare_probabilities(
        _read(run), _read(full), tolerance, config.label_mass, answered & ~best
    )


def _read(run: Run) -> Logprobs:
    """The log-probabilities of a run that read them."""
    assert run.logprobs is not None
    return run.logprobs


def asked_row(report: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a report's `probabilities` at the epsilon that the report is about."""
    rows: list[dict[str, Any]] = report["probabilities"]["levels"]
    return next(row for row in rows if row["epsilon"] == report["epsilon"])
