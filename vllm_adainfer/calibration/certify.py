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
from vllm_adainfer.decision.bound import BoundKind, FloatArray, certified, upper_bound

MAX_EXIT_POINTS = 4
STEPS = 200
# An exit point must save so much more of the layers to be worth its probe and its cut.
MIN_GAIN = 0.005


@dataclass(frozen=True)
class PathPoint:
    """The policy at one joint threshold, on one half of the prompts.

    Attributes:
        threshold: on the settled score.
        losses: [rows], of each row where it leaves; 0 where it runs to the end.
        layers_saved: share of layers, 0 to 1.

    """

    threshold: float
    losses: FloatArray
    layers_saved: float

    @property
    def rows(self) -> int:
        """How many prompts that half has."""
        return len(self.losses)

    @property
    def risk(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())


def walk(
    exits: Sequence[FittedExit],
    half: Callable[[FittedExit], Scored],
    depth: int,
    thresholds: Sequence[float],
) -> Iterator[PathPoint]:
    """The policy of `exits` (ascending) at each threshold, strictest first."""
    scored = [(fitted.layer, half(fitted)) for fitted in exits]
    rows = len(scored[0][1].loss)
    for threshold in thresholds:
        inside = np.ones(rows, dtype=np.bool_)
        losses, saved = np.zeros(rows), 0
        for layer, row in scored:
            leaves = inside & (row.score >= threshold).numpy()
            losses[leaves] = row.loss[leaves]
            saved += int(np.count_nonzero(leaves)) * (depth - layer)
            inside &= ~leaves
        yield PathPoint(threshold, losses, saved / (rows * depth))


def threshold_grid(exits: Sequence[FittedExit]) -> list[float]:
    """Thresholds to try, strictest first; read off the fitted half only."""
    scores = torch.cat([fitted.fitted.score for fitted in exits]).double()
    grid = torch.quantile(scores, torch.linspace(1, 0, STEPS, dtype=torch.float64))
    return [float("inf"), *sorted(set(grid.tolist()), reverse=True)]


def loosest(
    path: Iterator[PathPoint],
    epsilon: float,
    delta: float,
    kind: BoundKind = "exact",
    lowest: float = 0.0,
) -> PathPoint | None:
    """The last point before the first that cannot be certified (fixed-sequence testing)."""
    best = None
    for point in path:
        if not certified(point.losses, epsilon, delta, kind, lowest):
            break
        best = point
    return best


def certify(
    exits: Sequence[FittedExit],
    depth: int,
    epsilon: float,
    delta: float,
    kind: BoundKind = "exact",
    lowest: float = 0.0,
) -> PathPoint | None:
    """The loosest certified policy on the held-out half; None if there is none."""
    path = walk(exits, lambda fitted: fitted.held_out, depth, threshold_grid(exits))
    return loosest(path, epsilon, delta, kind, lowest)


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


def bound_of(
    point: PathPoint, delta: float, kind: BoundKind = "exact", lowest: float = 0.0
) -> float:
    """Upper confidence bound of the point's risk."""
    return upper_bound(point.losses, delta, kind, lowest)
