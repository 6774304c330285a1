"""Certify: the loosest joint threshold whose bound holds on the held-out rows.

The bound is tested along the path of thresholds for the whole policy (a row exits at the first exit
point whose score passes), not for each exit point alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.label_bounds import LabelTest
from vllm_adainfer.offline.calibration.certify.path import (
    PathPoint,
    threshold_grid,
    threshold_path,
)
from vllm_adainfer.offline.calibration.certify.queries import Queries
from vllm_adainfer.offline.calibration.fit.exits import FittedExit

EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)


Points = dict[float, PathPoint]  # by epsilon
AnyPoint = TypeVar("AnyPoint", bound="Certifiable")
QuestionRows = Mapping[str, Bools]  # question -> [held-out rows], True for those that ask it


class Certifiable(Protocol):
    """A place on a path: a policy, or several of which any may decide a row."""

    @property
    def losses(self) -> Floats:
        """[rows], the loss of each row. Or [queries]."""

    @property
    def full(self) -> Ints:
        """int64 [rows], the full model's answers."""

    def answers_about(self, token: int) -> Ints:
        """int64 [rows], the answers that promises about `token` are tested on."""


def held_out_path(
    exits: Sequence[FittedExit],
    depth: int,
    rows: Bools | None = None,
    queries: Queries | None = None,
) -> Iterator[PathPoint]:
    """`threshold_path` on the held-out rows, or on `rows` of them, bool.

    With `queries`, those of the held-out rows, losses are of queries.
    """
    layers, scored = [exit.layer for exit in exits], [exit.held_out for exit in exits]
    if rows is not None:
        scored = [one.of_rows(rows) for one in scored]
    path = threshold_path(layers, scored, depth, threshold_grid(exits))
    return path if queries is None else queries.on(path)


def loosest_certified(
    path: Iterable[AnyPoint], epsilon: float, bound: Bound, tests: Sequence[LabelTest] = ()
) -> AnyPoint | None:
    """The last point before the first that fails (fixed-sequence testing); None if all fail.

    A point fails if it does not certify `epsilon`, or fails one of the `tests`. All promises hold
    together at confidence 1 - delta though each test has all of delta. Proof: the rows that fit
    determine the path. If no point of it breaks a promise, nothing can go wrong. Otherwise take the
    first that breaks one, and a promise that it breaks; the held-out rows chose neither. A point
    that breaks a promise is found only if all points before it passed and it passed itself. So the
    first one passed, the test of that promise with it, and that happens with a probability of at
    most delta (an intersection-union test at each point of a fixed sequence).

    The proof is for one walk: each epsilon, and each question, holds by itself.
    """
    best = None
    for point in path:
        if not bound.holds(point.losses, epsilon):
            break
        if not all(test.holds(point.answers_about(test.token), point.full) for test in tests):
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
    queries: Queries | None = None,
) -> Points:
    """The loosest policy certified for each of `epsilons` that can be, on the held-out rows.

    With `rows`, bool [held-out rows], on those alone. `tests` must hold, too, on all rows. With
    `queries`, the bound is on their losses.
    """
    bound = bound if rows is None else bound.of_rows(rows)
    return certified_on(lambda: held_out_path(exits, depth, rows, queries), epsilons, bound, tests)


def certified_on(
    path: Callable[[], Iterable[AnyPoint]],
    epsilons: Iterable[float],
    bound: Bound,
    tests: Sequence[LabelTest] = (),
) -> dict[float, AnyPoint]:
    """The loosest point certified for each of `epsilons` that can be, each on a walk of its own."""
    found = {epsilon: loosest_certified(path(), epsilon, bound, tests) for epsilon in epsilons}
    return {epsilon: point for epsilon, point in found.items() if point is not None}


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
        points[epsilon] = replace(
            full_depth,
            threshold=np.nan,
            exits=leaving,
            losses=losses,
            answers=answers,
            layers_saved=saved,
        )
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
