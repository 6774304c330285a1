"""Certify each question of a mixture on its own rows; questions with too few run to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_adainfer.offline.calibration.certify import (
    Bound,
    PathPoint,
    loosest,
    threshold_grid,
    walk,
)
from vllm_adainfer.offline.calibration.fit import Bools, FittedExit

Points = dict[float, PathPoint]  # by epsilon
QuestionRows = Mapping[str, Bools]  # [held-out rows] which are of each question, by its name


def certify_questions(
    rows: QuestionRows,
    exits: Sequence[FittedExit],
    depth: int,
    epsilons: Sequence[float],
    bound: Bound,
) -> dict[str, Points]:
    """The loosest policy of each question for each epsilon; without those that have none."""
    found = {}
    grid, layers = threshold_grid(exits), [exit.layer for exit in exits]
    for name, own in rows.items():
        scored = [exit.held_out.of_rows(own) for exit in exits]
        alone = bound.of_rows(own)
        points = {
            epsilon: loosest(walk(layers, scored, depth, grid), epsilon, alone)
            for epsilon in epsilons
        }
        certified = {epsilon: point for epsilon, point in points.items() if point is not None}
        if certified:
            found[name] = certified
    return found


def joined(
    rows: QuestionRows, questions: Mapping[str, Points], exits: Sequence[FittedExit], depth: int
) -> Points:
    """All held-out rows, those of each question within its own bound; others run to the end."""
    layers, held_out = [exit.layer for exit in exits], [exit.held_out for exit in exits]
    points: Points = {}
    for epsilon in sorted({epsilon for own in questions.values() for epsilon in own}):
        [nobody] = walk(layers, held_out, depth, [np.inf])
        leaving, losses = nobody.exits, nobody.losses
        disagreeing = saved = 0.0
        for name, own in questions.items():
            if epsilon in own:
                point, share = own[epsilon], float(rows[name].mean())
                leaving[rows[name]], losses[rows[name]] = point.exits, point.losses
                disagreeing += share * point.disagreement
                saved += share * point.layers_saved
        points[epsilon] = PathPoint(np.nan, leaving, losses, disagreeing, saved)
    return points


def allowance(rows: QuestionRows, epsilon: float, bound: Bound) -> float:
    """The mean loss of all these rows if each question's is the largest that certifies it."""
    counts = [int(np.count_nonzero(own)) for own in rows.values()]
    if not counts:
        return 0.0
    allowed = [
        count * bound.of_rows(own).allowance(count, epsilon)
        for count, own in zip(counts, rows.values(), strict=True)
    ]
    return sum(allowed) / sum(counts)
