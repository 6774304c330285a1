"""A policy made from a recording: fit, choose the exit points, certify the bound."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_adainfer.artifact.kinds import LABEL_HEADS
from vllm_adainfer.offline.calibration.calibration import Calibration
from vllm_adainfer.offline.calibration.certify.certify import Points, certify, combine_questions
from vllm_adainfer.offline.calibration.fit.choose import (
    choose_exits,
    evenly_spread,
    expected_seconds,
    one_per_layer,
)
from vllm_adainfer.offline.calibration.fit.cost import Costs, measured_costs
from vllm_adainfer.offline.calibration.fit.exits import (
    FittedExit,
    fit_crf_chain,
    fit_exits,
)
from vllm_adainfer.offline.calibration.fit.learning_curve import CurvePoint, learning_curve
from vllm_adainfer.offline.calibration.fit.student import TrainedStudent
from vllm_adainfer.offline.calibration.fit.trained_exits import with_trained
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.policy.branch import Branch
from vllm_adainfer.policy.student import Student


def fit_candidates(
    calibration: Calibration, among: Collection[int] | None = None
) -> list[FittedExit]:
    """Fit an exit point after every recorded layer that its probe can read.

    `among` are layers to choose from; None for all.
    """
    recording, target = calibration.recording, calibration.target
    layers = [layer for layer in recording.states if among is None or layer in among]
    layers = [layer for layer in layers if target.is_pooled or layer > 0]
    if target.is_pooled:
        # Below layers that share keys and values, only the last token goes on.
        layers = [layer for layer in layers if layer <= recording.own_kv_layers]
    return fit_exits(
        recording,
        target,
        calibration.split,
        calibration.options.classifier,
        calibration.options.seed,
        progress(layers, desc="fit", unit="layer"),
        calibration.loss,
    )


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and its results on the prompts it was made from.

    Attributes:
        calibration: the data and options behind it.
        exits: the chosen exit points, by layer; empty if no set of them is worth its cost.
        points: epsilon -> the loosest policy certified for it on the held-out rows.
        questions: question -> the same for it alone, if each is certified on its own.
        candidates: all fitted exit points.
        heads: those of them that were not trained, with their results on all rows that fit.
        costs: the costs that the choice was based on.
        allowed: the mean loss of rows that the choice was made for.
        expected: expected times of a prompt, in seconds: ``full_depth``, ``chosen``, ``uniform``
            (as many exit points, evenly spread).
        last_token: for a pooled policy, the policy for requests whose prompt it cannot see as a
            whole; None if such requests run all layers.

    """

    calibration: Calibration
    exits: list[FittedExit]
    points: Points
    questions: dict[str, Points]
    candidates: list[FittedExit]
    heads: list[FittedExit]
    costs: Costs
    allowed: float
    expected: dict[str, float]
    last_token: FittedPolicy | None = None

    @property
    def student(self) -> TrainedStudent | None:
        """The student, if it is among the chosen exit points."""
        asked = any(isinstance(exit.probe, Student) for exit in self.exits)
        return self.calibration.student if asked else None

    @property
    def branches(self) -> tuple[int, ...]:
        """The layers of the chosen exit points that have a branch."""
        return tuple(exit.layer for exit in self.exits if exit.is_branch)

    def learning_curve(self) -> list[CurvePoint]:
        """What the exit points save if fewer prompts are fitted on; empty for other probes.

        Also empty with a student or branches, which would be trained three times.
        """
        calibration = self.calibration
        options, target = calibration.options, calibration.target
        if target.kind not in LABEL_HEADS or self.student is not None or self.branches:
            return []
        return learning_curve(
            calibration.recording,
            target,
            calibration.split,
            options.classifier,
            options.seed,
            [exit.layer for exit in self.exits],
            calibration.loss,
            self.allowed,
        )


def make_policy(
    calibration: Calibration, among: Sequence[FittedExit] | None = None
) -> FittedPolicy:
    """Choose exit points among the candidates, and certify every epsilon that can be.

    `among` are the heads to choose from; None fits every recorded layer.
    """
    recording, split, options = calibration.recording, calibration.split, calibration.options
    heads = fit_candidates(calibration) if among is None else list(among)
    candidates = heads
    generated, bound = options.max_tokens > 1, calibration.bound
    tokens = recording.computed[recording.rows_of(split.fit)]
    target, trained = calibration.target, calibration.trained
    if trained:
        candidates = with_trained(
            trained,
            heads,
            recording,
            target,
            split,
            options.classifier,
            options.seed,
            calibration.loss,
        )
    if generated:  # at later tokens, reading a layer's weights is what takes time
        tokens = np.ones_like(tokens)
    costs = measured_costs(
        recording,
        {e.layer: e.probe for e in candidates if not isinstance(e.probe, (Student, Branch))},
        float(tokens.mean()),
        generated,
        target.is_pooled,
        calibration.student,
        calibration.branches,
    )
    by_question = calibration.certifiable_questions() if options.by_question else {}
    allowed = calibration.rows_allowed(candidates) if candidates else 0.0
    choose = choose_exits if options.exit_points is None else one_per_layer
    exits = choose(candidates, costs, tokens, allowed)
    spread = evenly_spread(candidates, len(exits))
    expected = {
        name: expected_seconds(some, costs, tokens, allowed)
        for name, some in (("full_depth", []), ("chosen", exits), ("uniform", spread))
    }
    if options.classifier == "crf" and exits:
        exits = fit_crf_chain(exits, target)
    points: Points = {}
    questions: dict[str, Points] = {}
    epsilons = calibration.epsilons
    if options.by_question and exits:
        for name, rows in by_question.items():
            if own := certify(exits, recording.depth, epsilons, bound, rows):
                questions[name] = own
        points = combine_questions(by_question, questions, exits, recording.depth)
    elif exits:
        tests = calibration.label_tests
        queries = calibration.queries(split.certify)
        points = certify(exits, recording.depth, epsilons, bound, tests=tests, queries=queries)
    return FittedPolicy(
        calibration, exits, points, questions, candidates, heads, costs, allowed, expected
    )
