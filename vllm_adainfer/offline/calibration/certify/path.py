"""The path of policies that one joint threshold goes along.

One threshold on the settled score serves all exit points, so as it falls, no row leaves later than
before: a path with one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored

STEPS = 200


@dataclass(frozen=True)
class PathPoint:
    """The policy at one joint threshold, on some prompts.

    Attributes:
        threshold: the threshold on the settled score.
        exits: [rows], index of the exit point where each row exits; the number of exit points
            for a row that runs to the end.
        losses: [rows], the loss of each row where it exits; 0 if it runs to the end. Or [queries].
        answers: int64 [rows], the answer of each row.
        full: int64 [rows], the full model's.
        layers_saved: share of layers, 0 to 1.
        relevance: [rows], see `Judged.relevance`; NaN for a row that runs to the end.

    """

    threshold: float
    exits: Ints
    losses: Floats
    answers: Ints
    full: Ints
    layers_saved: float
    relevance: Floats

    @property
    def disagreement(self) -> float:
        """Share of rows whose answer differs from the full model's."""
        return float(np.mean(self.answers != self.full))

    @property
    def risk(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    def answers_about(self, token: int) -> Ints:
        """The answers that a promise about `token` is about."""
        return self.answers


def threshold_path(
    layers: Sequence[int], scored: Sequence[Scored], depth: int, thresholds: Sequence[float]
) -> Iterator[PathPoint]:
    """The policy with exit points after `layers` (ascending) at each threshold, strictest first."""
    rows, full = len(scored[0].loss), scored[0].full
    for threshold in thresholds:
        exits = np.full(rows, len(layers))
        losses, answers, relevance = np.zeros(rows), full.copy(), np.full(rows, np.nan)
        for index, exit_point in enumerate(scored):
            leaves = (exits == len(layers)) & (exit_point.score >= threshold).numpy()
            exits[leaves] = index
            losses[leaves] = exit_point.loss[leaves]
            answers[leaves] = exit_point.tokens[leaves]
            if exit_point.relevance is not None:
                relevance[leaves] = exit_point.relevance[leaves]
        run = np.array([*layers, depth])[exits]
        saved = 1 - float(run.sum()) / (rows * depth)
        yield PathPoint(threshold, exits, losses, answers, full, saved, relevance)


def threshold_grid(exits: Sequence[FittedExit]) -> list[float]:
    """The thresholds to try, strictest first; taken from the fitted part only.

    Rows that are never settled have a score of -inf, and some a NaN; between those and others there
    is no quantile.
    """
    scores = torch.cat([exit.fitted.score for exit in exits]).double()
    scores = scores[scores.isfinite()]
    if not len(scores):
        return [float("inf")]
    grid = torch.quantile(scores, torch.linspace(1, 0, STEPS, dtype=torch.float64))
    return [float("inf"), *sorted(set(grid.tolist()), reverse=True)]
