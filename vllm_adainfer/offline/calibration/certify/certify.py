"""Certify: the loosest joint threshold whose bound holds on the held-out rows.

One threshold on the settled score serves all exit points, so as it falls, no row leaves later than
before: a path with one parameter. The bound is tested along it for the whole policy (a row exits at
the first exit point whose score passes), not for each exit point alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.label_bounds import LabelTest
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored

STEPS = 200
EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class PathPoint:
    """The policy at one joint threshold, on some prompts.

    Attributes:
        threshold: the threshold on the settled score.
        exits: [rows], index of the exit point where each row exits; the number of exit points
            for a row that runs to the end.
        losses: [rows], the loss of each row where it exits; 0 if it runs to the end.
        answers: int64 [rows], the answer of each row.
        full: int64 [rows], the full model's.
        layers_saved: share of layers, 0 to 1.

    """

    threshold: float
    exits: Ints
    losses: Floats
    answers: Ints
    full: Ints
    layers_saved: float

    @property
    def disagreement(self) -> float:
        """Share of rows whose answer differs from the full model's."""
        return float(np.mean(self.answers != self.full))

    @property
    def risk(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())


Points = dict[float, PathPoint]  # by epsilon
QuestionRows = Mapping[str, Bools]  # question -> [held-out rows], True for those that ask it


def threshold_path(
    layers: Sequence[int], scored: Sequence[Scored], depth: int, thresholds: Sequence[float]
) -> Iterator[PathPoint]:
    """The policy with exit points after `layers` (ascending) at each threshold, strictest first."""
    rows, full = len(scored[0].loss), scored[0].full
    for threshold in thresholds:
        exits = np.full(rows, len(layers))
        losses, answers = np.zeros(rows), full.copy()
        for index, exit_point in enumerate(scored):
            leaves = (exits == len(layers)) & (exit_point.score >= threshold).numpy()
            exits[leaves] = index
            losses[leaves] = exit_point.loss[leaves]
            answers[leaves] = exit_point.tokens[leaves]
        run = np.array([*layers, depth])[exits]
        saved = 1 - float(run.sum()) / (rows * depth)
        yield PathPoint(threshold, exits, losses, answers, full, saved)


def held_out_path(
    exits: Sequence[FittedExit], depth: int, rows: Bools | None = None
) -> Iterator[PathPoint]:
    """`threshold_path` on the held-out rows, or on `rows` of them, bool."""
    layers, scored = [exit.layer for exit in exits], [exit.held_out for exit in exits]
    if rows is not None:
        scored = [one.of_rows(rows) for one in scored]
    return threshold_path(layers, scored, depth, threshold_grid(exits))


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


def loosest_certified(
    path: Iterable[PathPoint], epsilon: float, bound: Bound, tests: Sequence[LabelTest] = ()
) -> PathPoint | None:
    """The last point before the first that fails (fixed-sequence testing); None if all fail.

    A point fails if it does not certify `epsilon`, or fails one of the `tests`.
    """
    best = None
    for point in path:
        if not bound.holds(point.losses, epsilon):
            break
        if not all(test.holds(point.answers, point.full) for test in tests):
            break
        best = point
    return best


def certify(
    exits: Sequence[FittedExit],
    depth: int,
    epsilons: Iterable[float],
    bound: Bound,
    rows: Bools | None = None,
    tests: Sequence[LabelTest] = (),
) -> Points:
    """The loosest policy certified for each of `epsilons` that can be, on the held-out rows.

    With `rows`, bool [held-out rows], on those alone. `tests` must hold, too, on all rows.
    """
    if rows is not None:
        bound = bound.of_rows(rows)
    points = {
        epsilon: loosest_certified(held_out_path(exits, depth, rows), epsilon, bound, tests)
        for epsilon in epsilons
    }
    return {epsilon: point for epsilon, point in points.items() if point is not None}


def combine_questions(
    rows: QuestionRows, questions: Mapping[str, Points], exits: Sequence[FittedExit], depth: int
) -> Points:
    """The points of all held-out rows: questions within their own bounds, others at full depth."""
    layers, held_out = [exit.layer for exit in exits], [exit.held_out for exit in exits]
    points: Points = {}
    for epsilon in sorted({epsilon for own in questions.values() for epsilon in own}):
        [full_depth] = threshold_path(layers, held_out, depth, [np.inf])
        leaving, losses, answers = full_depth.exits, full_depth.losses, full_depth.answers
        saved = 0.0
        for name, own in questions.items():
            if epsilon in own:
                point, share = own[epsilon], float(rows[name].mean())
                leaving[rows[name]], losses[rows[name]] = point.exits, point.losses
                answers[rows[name]] = point.answers
                saved += share * point.layers_saved
        points[epsilon] = PathPoint(np.nan, leaving, losses, answers, full_depth.full, saved)
    return points


def allowance_of_questions(rows: QuestionRows, epsilon: float, bound: Bound) -> float:
    """The mean loss of all `rows` if each question has the largest that certifies it."""
    counts = [int(np.count_nonzero(own)) for own in rows.values()]
    if not counts:
        return 0.0
    allowed = [
        count * bound.of_rows(own).allowance(count, epsilon)
        for count, own in zip(counts, rows.values(), strict=True)
    ]
    return sum(allowed) / sum(counts)
