"""Certify: the loosest joint threshold whose promises hold on the held-out rows.

They are tested along the path of thresholds for the whole policy (a row exits at the first exit
point whose score passes), not for each exit point alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.fields import LabelBound, LabelRisk
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.path import (
    Pair,
    PathPoint,
    Points,
    Queries,
    Read,
    combine_questions,
    fitted_path,
    held_out_path,
    pair_path,
    pairs_of_thresholds,
    same,
    threshold_grid,
)
from vllm_adainfer.offline.calibration.data.split import numbered
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.promise.first_documents import FirstDocuments, relevance

EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)

AnyPoint = TypeVar("AnyPoint", PathPoint, Pair)


@dataclass(frozen=True)
class LabelTest:
    """A promise about one label, beside the one about all answers: its recall or precision.

    It is about a share of some rows: those that full depth answers with the label, or those that
    are answered with it. At one threshold these rows are independent draws like all others, so the
    same bound holds for the share of them that changes.

    Attributes:
        promise: what is promised.
        token: the token that stands for its label; of an object, the place of its value.
        bound: the bound, on all held-out rows.
        read: what the promise reads of answers; of an object, the place of the value of a field.

    """

    promise: LabelBound
    token: int
    bound: Bound
    read: Read = same

    def holds(self, answers: Ints, full: Ints) -> bool:
        """Whether the rows certify the promise; both arguments are tokens, int64 [rows]."""
        bound, losses = self._on(answers, full)
        return bound.holds(losses, self.promise.epsilon)

    def risk(self, answers: Ints, full: Ints) -> LabelRisk:
        """What rows that certify the promise say of it."""
        bound, losses = self._on(answers, full)
        return LabelRisk(
            rows=len(losses),
            risk=float(losses.mean()),
            bound=bound.within(self.promise.epsilon, losses),
        )

    def check(self, full: Ints) -> None:
        """Check that the held-out rows could certify the promise if not one answer changed.

        `full` is int64 [held-out rows], the full model's answers.

        An AdaInferError if they are too few; the message says how many it needs.
        """
        if self.holds(full, full):
            return
        promise, about, repeats = self.promise, self.read(full) == self.token, self.bound.repeats
        rows = int(np.count_nonzero(about if repeats is None else about & ~repeats))
        alone = self.bound.of_rows(about)
        needed = alone.groups_needed(int(np.count_nonzero(about)), promise.epsilon)
        wanted = "prompts that it does"
        if rows:
            wanted = f"about {math.ceil(needed / rows):d} times as many prompts"
        raise AdaInferError(
            f"--{promise.kind} {promise.label}:{promise.epsilon:g} needs {needed} held-out prompts "
            f"that full depth answers with {promise.label}, and there are {rows}: give {wanted}, "
            "or promise less"
        )

    def _on(self, answers: Ints, full: Ints) -> tuple[Bound, Floats]:
        answers, full = self.read(answers), self.read(full)
        rows = self.promise.chosen_by(answers, full) == self.token
        return self.bound.of_rows(rows), (answers != full)[rows].astype(np.float64)


def certify(
    path: Iterable[AnyPoint],
    epsilons: Iterable[float],
    bound: Bound,
    tests: Sequence[LabelTest] = (),
) -> dict[float, AnyPoint]:
    """By epsilon, the last point before the first that fails (fixed-sequence testing).

    An epsilon of which no point holds is left out. A point fails if it does not certify epsilon, or
    fails one of the `tests`. All promises hold together at confidence 1 - delta though each test
    has all of delta. Proof: the rows that fit determine the path. If no point of it breaks a
    promise, nothing can go wrong. Otherwise take the first that breaks one, and a promise that it
    breaks; the held-out rows chose neither. A point that breaks a promise is found only if all
    points before it passed and it passed itself. So the first one passed, the test of that promise
    with it, and that happens with a probability of at most delta (an intersection-union test at
    each point of a fixed sequence).

    The proof is for one walk: each epsilon, and each question, holds by itself.
    """
    found: dict[float, AnyPoint] = {}
    holding = [*epsilons]
    for point in path:
        holding = [epsilon for epsilon in holding if bound.holds(point.losses, epsilon)]
        if not holding or not all(
            test.holds(point.answers_about(test.token, test.read), point.full) for test in tests
        ):
            break
        found |= dict.fromkeys(holding, point)
    return found


@dataclass(frozen=True)
class Terms:
    """What the policy of a calibration must hold on the held-out rows."""

    calibration: Calibration

    @cached_property
    def bound(self) -> Bound:
        """The bound, on the decision rows of the held-out prompts."""
        calibration, split = self.calibration, self.calibration.split
        groups = split.groups
        if calibration.options.by_question:  # each is a mixture of its own
            groups = numbered([*zip(groups.tolist(), calibration.questions, strict=True)])
        together, repeats = split.most_together(groups), split.repeats
        prompts = calibration.rows.prompts[calibration.held_out]
        return Bound.promised(
            calibration.options,
            groups[prompts],
            together,
            None if repeats is None else repeats[prompts],
        )

    @property
    def tests(self) -> list[LabelTest]:
        """The promises about one label each, to test on the held-out rows."""
        asked, objects = self.calibration.options.label_bounds, self.calibration.target.objects
        if objects is not None:
            found = [(one, *objects.at(one.label)) for one in asked]
            return [
                LabelTest(one, place, self.bound, partial(objects.link.place_in, field))
                for one, field, place in found
            ]
        tokens = {label.name: label.token_id for label in self.calibration.labels}
        return [LabelTest(one, tokens[one.label], self.bound) for one in asked]

    @cached_property
    def queries(self) -> Queries | None:
        """The queries that the held-out rows are the documents of, if an order is promised."""
        return self._queries_of(self.calibration.held_out)

    @cached_property
    def fitted_queries(self) -> Queries | None:
        """Those of the rows that fit."""
        return self._queries_of(self.calibration.fitted)

    def _queries_of(self, rows: Ints) -> Queries | None:
        calibration, promise = self.calibration, self.calibration.options.promise
        if not isinstance(promise, FirstDocuments):
            return None
        full = relevance(calibration.target.full_depth_of(calibration.rows, rows)).double().numpy()
        groups = calibration.split.groups[calibration.rows.prompts[rows]]
        return Queries.of_groups(promise, groups, full)

    def rows_allowed(self, candidates: Sequence[FittedExit]) -> float:
        """The largest mean loss of rows within the bound, from `candidates`; 0 without any."""
        if not candidates:
            return 0.0
        options, bound = self.calibration.options, self.bound
        if options.by_question:
            own = [*self.certifiable_questions().values()]
            counts = [int(np.count_nonzero(rows)) for rows in own]
            allowances = [
                count * bound.of_rows(rows).allowance(count, options.epsilon)
                for count, rows in zip(counts, own, strict=True)
            ]
            return sum(allowances) / sum(counts) if counts else 0.0
        if self.queries is None:
            return bound.allowance(len(self.calibration.held_out), options.epsilon)
        assert self.fitted_queries is not None
        heads = [exit for exit in candidates if not exit.is_alternative]
        path = fitted_path(heads, self.calibration.rows.model.depth)
        allowed = bound.allowance(len(self.queries.rows), options.epsilon)
        return rows_allowed(path, self.fitted_queries, allowed)

    def rows_by_question(self) -> dict[str, Bools]:
        """The held-out rows of each question, bool [held-out rows]; the commonest comes first."""
        if not self.calibration.questions:
            return {}
        names = np.array(self.calibration.questions)[self.calibration.split.certify]
        found, counts = np.unique(names, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {str(name): names == name for name in found[order]}

    def certifiable_questions(self) -> dict[str, Bools]:
        """Those that serving can recognise and that have rows enough for a bound of their own."""
        bound, epsilon = self.bound, self.calibration.options.epsilon
        return {
            name: own
            for name, own in self.rows_by_question().items()
            if name in self.calibration.ends
            and bound.of_rows(own).holds(np.zeros(np.count_nonzero(own)), epsilon)
        }


def rows_allowed(path: Iterable[PathPoint], queries: Queries, allowed: float) -> float:
    """The mean loss of rows at the loosest point where that of queries is within `allowed`.

    The choice of exit points goes by the loss of rows, which adds up over them.
    """
    found = 0.0
    for point in path:
        if queries.losses(point).mean() > allowed:
            break
        found = point.risk
    return found


def certified(
    terms: Terms, whole: Sequence[FittedExit], last: Sequence[FittedExit] | None = None
) -> list[tuple[Points, dict[str, Points]]]:
    """The points that can be certified, and those of each question with a bound of its own.

    With heads for the `last` token, those of both parts: the loosest pairs of thresholds that one
    bound certifies, see `certify.path`. Where there are no such heads, that part is full depth.
    """
    if not whole:
        return [({}, {})]
    options, depth = terms.calibration.options, terms.calibration.rows.model.depth
    epsilons, queries = sorted({*EPSILONS, options.epsilon}), terms.queries
    thresholds = [(one, float("inf")) for one in threshold_grid(whole)]
    if last:
        thresholds = pairs_of_thresholds(whole, last, depth, terms.fitted_queries)
    parts = [whole] if last is None else [whole, last or whole]

    def walk(bound: Bound, rows: Bools | None = None) -> list[Points]:
        """The points of each part, on the held-out rows or on some of them."""
        paths = [
            held_out_path(
                exits,
                depth,
                own,
                rows,
                queries if last is None else None,
                terms.calibration.any_exit_point,
            )
            for exits, own in zip(parts, zip(*thresholds, strict=True), strict=False)
        ]
        if last is None:
            return [certify(paths[0], epsilons, bound, terms.tests)]
        both = pair_path(paths[0], paths[1], queries)
        pairs = certify(both, epsilons, bound, terms.tests)
        found = [{e: pair.whole for e, pair in pairs.items()}]
        found.append({e: pair.last for e, pair in pairs.items()})
        if queries is None:
            return found
        return [
            {e: replace(point, losses=queries.losses(point)) for e, point in points.items()}
            for points in found
        ]

    if not options.by_question:
        return [(points, {}) for points in walk(terms.bound)]
    by_question = terms.certifiable_questions()
    found = {name: walk(terms.bound.of_rows(rows), rows) for name, rows in by_question.items()}
    questions = [
        {name: own[place] for name, own in found.items() if own[place]}
        for place in range(len(parts))
    ]
    return [
        (combine_questions(by_question, own, exits, depth), own)
        for exits, own in zip(parts, questions, strict=True)
    ]
