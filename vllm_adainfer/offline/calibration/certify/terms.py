"""The terms of a calibration: what its policy must hold on the held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import (
    EPSILONS,
    Points,
    QuestionRows,
    allowance_of_questions,
    certified_on,
    certify,
    combine_questions,
)
from vllm_adainfer.offline.calibration.certify.label_bounds import LabelTest
from vllm_adainfer.offline.calibration.certify.parts import Pair, pair_path, pairs_of_thresholds
from vllm_adainfer.offline.calibration.certify.path import PathPoint, threshold_grid, threshold_path
from vllm_adainfer.offline.calibration.certify.queries import Queries, rows_allowed
from vllm_adainfer.offline.calibration.data.split import numbered
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.promise.first_documents import relevance


@dataclass(frozen=True)
class Terms:
    """The bound of a calibration, and what else must hold with it."""

    calibration: Calibration

    @property
    def epsilons(self) -> list[float]:
        """The bounds to certify, ascending."""
        return sorted({*EPSILONS, self.calibration.options.epsilon})

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
        tokens = {label.name: label.token_id for label in self.calibration.labels}
        asked = self.calibration.options.label_bounds
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
        calibration = self.calibration
        if calibration.options.top_k is None:
            return None
        full = relevance(calibration.target.full_depth_of(calibration.rows, rows)).double().numpy()
        groups = calibration.split.groups[calibration.rows.prompts[rows]]
        return Queries.of_groups(calibration.options.top_k, groups, full)

    @cached_property
    def allowed(self) -> float:
        """The largest mean loss that certifies the epsilon asked for."""
        options = self.calibration.options
        if options.by_question:
            questions = self.certifiable_questions()
            return allowance_of_questions(questions, options.epsilon, self.bound)
        queries = self.queries
        count = len(self.calibration.held_out if queries is None else queries.rows)
        return self.bound.allowance(count, options.epsilon)

    def rows_allowed(self, candidates: Sequence[FittedExit]) -> float:
        """The largest mean loss of rows within the bound, from `candidates`; 0 without any."""
        if not candidates:
            return 0.0
        if self.fitted_queries is None:
            return self.allowed
        heads = [exit for exit in candidates if not exit.is_branch]
        layers, fitted = [exit.layer for exit in heads], [exit.fitted for exit in heads]
        depth = self.calibration.rows.model.depth
        path = threshold_path(layers, fitted, depth, threshold_grid(heads))
        return rows_allowed(path, self.fitted_queries, self.allowed)

    def rows_by_question(self) -> dict[str, Bools]:
        """The held-out rows of each question, bool [held-out rows]; the commonest comes first."""
        if not self.calibration.questions:
            return {}
        names = np.array(self.calibration.questions)[self.calibration.split.certify]
        found, counts = np.unique(names, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {str(name): names == name for name in found[order]}

    def certifiable_questions(self) -> QuestionRows:
        """Those that serving can recognise and that have rows enough for a bound of their own."""
        bound, epsilon = self.bound, self.calibration.options.epsilon
        return {
            name: own
            for name, own in self.rows_by_question().items()
            if name in self.calibration.ends
            and bound.of_rows(own).holds(np.zeros(np.count_nonzero(own)), epsilon)
        }


def certified(terms: Terms, exits: Sequence[FittedExit]) -> tuple[Points, dict[str, Points]]:
    """The points that can be certified, and those of each question with a bound of its own."""
    calibration, bound, epsilons = terms.calibration, terms.bound, terms.epsilons
    depth = calibration.rows.model.depth
    if not exits:
        return {}, {}
    if not calibration.options.by_question:
        tests, queries = terms.tests, terms.queries
        return certify(exits, depth, epsilons, bound, tests=tests, queries=queries), {}
    by_question = terms.certifiable_questions()
    found = {
        name: certify(exits, depth, epsilons, bound, rows) for name, rows in by_question.items()
    }
    questions = {name: points for name, points in found.items() if points}
    return combine_questions(by_question, questions, exits, depth), questions


def certified_together(
    terms: Terms, whole: Sequence[FittedExit], last: Sequence[FittedExit]
) -> tuple[tuple[Points, dict[str, Points]], tuple[Points, dict[str, Points]]]:
    """`certified` for heads that read whole prompts, and for those that read the last token.

    Both have the loosest pairs of thresholds that one bound certifies, see `certify.parts`. Without
    heads for the last token, the other part is full depth.
    """
    bound, epsilons, depth = terms.bound, terms.epsilons, terms.calibration.rows.model.depth
    if last:
        thresholds = pairs_of_thresholds(whole, last, depth, terms.fitted_queries)
    else:
        last = whole
        thresholds = [(threshold, float("inf")) for threshold in threshold_grid(whole)]
    if not terms.calibration.options.by_question:
        path = partial(pair_path, whole, last, depth, thresholds, queries=terms.queries)
        pairs = certified_on(path, epsilons, bound, terms.tests)
        return (
            ({epsilon: pair.whole for epsilon, pair in pairs.items()}, {}),
            ({epsilon: pair.last for epsilon, pair in pairs.items()}, {}),
        )
    by_question = terms.certifiable_questions()
    parts = {
        name: certified_on(
            partial(pair_path, whole, last, depth, thresholds, rows), epsilons, bound.of_rows(rows)
        )
        for name, rows in by_question.items()
    }

    def combined(
        exits: Sequence[FittedExit], part: Callable[[Pair], PathPoint]
    ) -> tuple[Points, dict[str, Points]]:
        questions = {
            name: {epsilon: part(pair) for epsilon, pair in pairs.items()}
            for name, pairs in parts.items()
            if pairs
        }
        return combine_questions(by_question, questions, exits, depth), questions

    return combined(whole, lambda pair: pair.whole), combined(last, lambda pair: pair.last)
