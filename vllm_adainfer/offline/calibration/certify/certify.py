"""Certify: the loosest joint threshold whose bound holds on the held-out rows.

One threshold on the settled score serves all exit points, so as it falls, no row leaves later than
before: a path with one parameter. The bound is tested along it for the whole policy (a row exits at
the first exit point whose score passes), not for each exit point alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.kinds import BoundKind
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.bound import certified, rows_needed, upper_bound
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.offline.calibration.options import PolicyOptions

STEPS = 200
HIGHEST, PRECISION = 0.999, 0.0005  # of an upper bound found by bisection
EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Bound:
    """The promise of a policy.

    Attributes:
        kind: the kind of bound, see `vllm_adainfer.offline.calibration.certify.bound`.
        delta: the probability that the bound fails.
        lowest: the smallest possible loss: 0 for disagreement, -1 for lost accuracy.
        groups: [rows], the group of each held-out row: the tokens of a text, or the prompts that
            came together. Losses of one group are not independent. None if each row stands alone.
        longest: the most rows a group can have. Groups with more do not count, so it must not
            depend on the held-out rows.

    """

    kind: BoundKind
    delta: float
    lowest: float
    groups: Ints | None = None
    longest: int = 1

    @classmethod
    def promised(
        cls, options: PolicyOptions, groups: Ints | None = None, together: int = 1
    ) -> Bound:
        """The bound that the options ask for.

        Args:
            options: checked by `check_options`.
            groups: [held-out rows], the group of each; None if each row stands alone.
            together: the most prompts in a group of the part that fits.

        Raises:
            AdaInferError: the exact bound is asked for prompts that are not independent.

        """
        if options.bound == "exact" and together > 1:
            raise AdaInferError(
                "--bound exact counts independent answers, and those to requests that came "
                "together are not: use wsr or auto"
            )
        kind, longest = options.bound, options.max_tokens * together
        accuracy = options.risk == "accuracy"
        if kind == "auto":
            kind = "wsr" if accuracy or longest > 1 else "exact"
        return cls(kind, options.delta, -1.0 if accuracy else 0.0, groups, longest)

    def of_rows(self, rows: Bools) -> Bound:
        """The bound for some of the rows alone."""
        return self if self.groups is None else replace(self, groups=self.groups[rows])

    def holds(self, losses: Floats, epsilon: float) -> bool:
        """Whether `losses` certify a mean of at most `epsilon`."""
        losses = self._by_group(losses, epsilon)
        return len(losses) > 0 and certified(losses, epsilon, self.delta, self.kind, self.lowest)

    def of(self, losses: Floats) -> float:
        """Upper confidence bound of the mean loss."""
        if self.longest == 1:
            losses = self._by_group(losses, 0.0)
            return upper_bound(losses, self.delta, self.kind, self.lowest) if len(losses) else 1.0
        if not self.holds(losses, HIGHEST):
            return 1.0
        low, high = 0.0, HIGHEST
        while high - low > PRECISION:
            middle = (low + high) / 2
            low, high = (low, middle) if self.holds(losses, middle) else (middle, high)
        return high

    def within(self, epsilon: float, losses: Floats) -> float:
        """The bound for losses that certify `epsilon`, which bisection may miss by a little."""
        return min(epsilon, self.of(losses))

    def _by_group(self, losses: Floats, epsilon: float) -> Floats:
        """[groups], `lowest` to 1, with a mean of at most `epsilon` exactly if the loss per row is.

        A group's losses are divided by the most rows a group can have, and each missing row
        counts as a loss of `epsilon`: E[losses] + epsilon (longest - E[rows]) <= epsilon longest.
        A group of one row, where no group can have more, keeps its loss to the last bit.
        """
        if self.groups is None:
            return losses
        _, place = np.unique(self.groups, return_inverse=True)
        rows, sums = np.bincount(place), np.bincount(place, weights=losses)
        by_group: Floats = (sums + epsilon * (self.longest - rows)) / self.longest
        return by_group[rows <= self.longest]

    def groups_needed(self, rows: int, epsilon: float) -> int:
        """The fewest groups like those of `rows` rows that certify `epsilon` if nothing is lost."""
        lossless = self._by_group(np.zeros(rows), epsilon)
        if not len(lossless):
            lossless = np.zeros(1)
        return rows_needed(epsilon, self.delta, self.kind, self.lowest, lossless)

    def allowance(self, rows: int, epsilon: float) -> float:
        """The largest mean of `rows` losses, each 0 or 1, that certifies `epsilon`."""
        order = np.random.default_rng(0).permutation(rows)
        if not self.holds(np.zeros(rows), epsilon):
            return 0.0
        fits, fails = 0, int(rows * epsilon) + 2
        while fails - fits > 1:
            middle = (fits + fails) // 2
            holds = self.holds((order < middle).astype(np.float64), epsilon)
            fits, fails = (middle, fails) if holds else (fits, middle)
        return fits / rows


@dataclass(frozen=True)
class PathPoint:
    """The policy at one joint threshold, on some prompts.

    Attributes:
        threshold: the threshold on the settled score.
        exits: [rows], index of the exit point where each row exits; the number of exit points
            for a row that runs to the end.
        losses: [rows], the loss of each row where it exits; 0 if it runs to the end.
        disagreement: share of rows whose answer differs from the full model's.
        layers_saved: share of layers, 0 to 1.

    """

    threshold: float
    exits: Ints
    losses: Floats
    disagreement: float
    layers_saved: float

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
    rows = len(scored[0].loss)
    for threshold in thresholds:
        exits = np.full(rows, len(layers))
        losses, disagreeing = np.zeros(rows), 0
        for index, exit_point in enumerate(scored):
            leaves = (exits == len(layers)) & (exit_point.score >= threshold).numpy()
            exits[leaves] = index
            losses[leaves] = exit_point.loss[leaves]
            disagreeing += int(np.count_nonzero(~exit_point.agrees[leaves]))
        run = np.array([*layers, depth])[exits]
        saved = 1 - float(run.sum()) / (rows * depth)
        yield PathPoint(threshold, exits, losses, disagreeing / rows, saved)


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


def loosest_certified(path: Iterable[PathPoint], epsilon: float, bound: Bound) -> PathPoint | None:
    """The last point before the first that fails (fixed-sequence testing); None if all fail."""
    best = None
    for point in path:
        if not bound.holds(point.losses, epsilon):
            break
        best = point
    return best


def certify(
    exits: Sequence[FittedExit],
    depth: int,
    epsilons: Iterable[float],
    bound: Bound,
    rows: Bools | None = None,
) -> Points:
    """The loosest policy certified for each of `epsilons` that can be, on the held-out rows.

    With `rows`, bool [held-out rows], on those alone.
    """
    if rows is not None:
        bound = bound.of_rows(rows)
    points = {
        epsilon: loosest_certified(held_out_path(exits, depth, rows), epsilon, bound)
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
        leaving, losses = full_depth.exits, full_depth.losses
        disagreeing = saved = 0.0
        for name, own in questions.items():
            if epsilon in own:
                point, share = own[epsilon], float(rows[name].mean())
                leaving[rows[name]], losses[rows[name]] = point.exits, point.losses
                disagreeing += share * point.disagreement
                saved += share * point.layers_saved
        points[epsilon] = PathPoint(np.nan, leaving, losses, disagreeing, saved)
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
