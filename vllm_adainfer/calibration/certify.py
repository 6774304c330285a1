"""Certify: choose exit points, then the loosest joint threshold whose bound holds.

One threshold on the settled score serves all exit points, so lowering it makes every row leave
no later: a one-parameter path. The bound is tested along that path for the whole policy (first
exit point whose score passes), not for each exit point alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_adainfer.calibration.fit import FittedExit, Scored
from vllm_adainfer.decision.bound import certified, upper_bound

MAX_EXIT_POINTS = 4
STEPS = 200
# An exit point must save so much more of the layers to be worth its probe and its cut.
MIN_GAIN = 0.005


@dataclass(frozen=True)
class PathPoint:
    """The policy at one joint threshold, on one half of the prompts.

    Attributes:
        threshold: on the settled score.
        errors: rows whose answer differs from the full model's.
        rows: of that half.
        layers_saved: share of layers, 0 to 1.

    """

    threshold: float
    errors: int
    rows: int
    layers_saved: float


def walk(
    exits: Sequence[FittedExit],
    half: Callable[[FittedExit], Scored],
    depth: int,
    thresholds: Sequence[float],
) -> Iterator[PathPoint]:
    """The policy of `exits` (ascending) at each threshold, strictest first."""
    scored = [(fitted.layer, half(fitted)) for fitted in exits]
    rows = len(scored[0][1].agrees)
    for threshold in thresholds:
        inside = np.ones(rows, dtype=np.bool_)
        errors, saved = 0, 0
        for layer, row in scored:
            leaves = inside & (row.score >= threshold).numpy()
            errors += int(np.count_nonzero(leaves & ~row.agrees))
            saved += int(np.count_nonzero(leaves)) * (depth - layer)
            inside &= ~leaves
        yield PathPoint(threshold, errors, rows, saved / (rows * depth))


def threshold_grid(exits: Sequence[FittedExit]) -> list[float]:
    """Thresholds to try, strictest first; read off the fitted half only."""
    scores = torch.cat([fitted.fitted.score for fitted in exits]).double()
    grid = torch.quantile(scores, torch.linspace(1, 0, STEPS, dtype=torch.float64))
    return [float("inf"), *sorted(set(grid.tolist()), reverse=True)]


def loosest(path: Iterator[PathPoint], epsilon: float, delta: float) -> PathPoint | None:
    """The last point before the first that cannot be certified (fixed-sequence testing)."""
    best = None
    for point in path:
        if not certified(point.errors, point.rows, epsilon, delta):
            break
        best = point
    return best


def certify(
    exits: Sequence[FittedExit], depth: int, epsilon: float, delta: float
) -> PathPoint | None:
    """The loosest certified policy on the held-out half; None if there is none."""
    path = walk(exits, lambda fitted: fitted.held_out, depth, threshold_grid(exits))
    return loosest(path, epsilon, delta)


def choose_exits(
    candidates: Sequence[FittedExit], depth: int, epsilon: float, delta: float
) -> list[FittedExit]:
    """Up to `MAX_EXIT_POINTS` that save most, greedily, judged on the fitted half alone."""
    chosen: list[FittedExit] = []
    saved = 0.0
    while len(chosen) < min(MAX_EXIT_POINTS, len(candidates)):
        options = []
        for candidate in candidates:
            if candidate in chosen:
                continue
            exits = sorted([*chosen, candidate], key=lambda fitted: fitted.layer)
            path = walk(exits, lambda fitted: fitted.fitted, depth, threshold_grid(exits))
            point = loosest(path, epsilon, delta)
            options.append((point.layers_saved if point else 0.0, candidate.layer, exits))
        best_saved, _, exits = max(options, key=lambda option: option[:2])
        if best_saved < saved + MIN_GAIN:
            break
        chosen, saved = exits, best_saved
    return chosen


def bound_of(point: PathPoint, delta: float) -> float:
    """Upper confidence bound of the point's disagreement rate."""
    return upper_bound(point.errors, point.rows, delta)
