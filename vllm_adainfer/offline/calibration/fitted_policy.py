"""A policy made from a recording: fit, choose the exit points, certify the bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.kinds import LABEL_HEADS, ScoreHead
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import (
    EPSILONS,
    Points,
    QuestionRows,
    allowance_of_questions,
    certify,
    combine_questions,
)
from vllm_adainfer.offline.calibration.certify.label_bounds import LabelTest
from vllm_adainfer.offline.calibration.data.choices import Choices
from vllm_adainfer.offline.calibration.fit.branch import TrainedBranch
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
from vllm_adainfer.offline.calibration.fit.loss import (
    Loss,
    RightTokens,
    accuracy_lost,
    disagreement,
)
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit.split import Split, numbered
from vllm_adainfer.offline.calibration.fit.student import TrainedStudent
from vllm_adainfer.offline.calibration.fit.trained_exits import TrainedProbe, with_trained
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.collect import Recording
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.policy.branch import Branch
from vllm_adainfer.policy.questions import End
from vllm_adainfer.policy.student import Student


@dataclass(frozen=True)
class Calibration:
    """The data and options that a policy is made from.

    Attributes:
        recording: the recording of all prompts.
        target: the probes' target.
        split: the prompts that fit, and those that certify.
        options: the options asked for.
        labels: the answers, if there is a fixed set of them.
        right: the right tokens by prompt, if the risk is of accuracy.
        choices: the texts and their first tokens, if requests choose from texts.
        pooled_from: see `ArtifactConfig.pooled_from`; None unless the probes are pooled.
        with_mass: whether probabilities in the whole vocabulary are promised, if the risk is of
            probabilities.
        questions: the question of each prompt, if prompts are requests; else empty.
        ends: question -> the tokens that its prompts end with, if it can be recognised by them.
        student: decides before the first layer; None without one.
        branches: decide in place of heads, each after another layer.
        score_head: see `ArtifactConfig.score_head`.

    """

    recording: Recording
    target: Target
    split: Split
    options: PolicyOptions
    labels: tuple[Label, ...] = ()
    right: RightTokens | None = None
    choices: Choices | None = None
    pooled_from: int | None = None
    with_mass: bool = False
    questions: Sequence[str] = ()
    ends: Mapping[str, tuple[End, ...]] = field(default_factory=dict)
    student: TrainedStudent | None = None
    branches: tuple[TrainedBranch, ...] = ()
    score_head: ScoreHead | None = None

    @property
    def trained(self) -> list[TrainedProbe]:
        """The student and the branches, which were trained on the same rows."""
        return [*([] if self.student is None else [self.student]), *self.branches]

    @property
    def loss(self) -> Loss:
        """The loss whose mean is bounded."""
        if self.right is not None:
            return accuracy_lost(self.right)
        if self.target.full_depth is None:
            return disagreement
        if self.target.gates is not None:
            return self.target.full_depth.loss_of_gates(self.target.gates)
        assert self.options.tolerance is not None
        return self.target.full_depth.loss(self.options.tolerance, self.with_mass)

    @property
    def bound(self) -> Bound:
        """The bound, on the decision rows of the held-out prompts."""
        rows = self.recording.rows_of(self.split.certify)
        groups = self.split.groups
        if self.options.by_question:  # each is a mixture of its own
            groups = numbered([*zip(groups.tolist(), self.questions, strict=True)])
        together = self.split.most_together(groups)
        return Bound.promised(self.options, groups[self.recording.prompts[rows]], together)

    @property
    def held_out_answers(self) -> Ints:
        """int64 [held-out rows], the full model's answers."""
        answers: Ints = self.recording.tokens[self.recording.rows_of(self.split.certify)]
        return answers

    @property
    def label_tests(self) -> list[LabelTest]:
        """The promises about one label each, to test on the held-out rows."""
        tokens = {label.name: label.token_id for label in self.labels}
        bound = self.bound
        return [LabelTest(one, tokens[one.label], bound) for one in self.options.label_bounds]

    @property
    def allowed(self) -> float:
        """The largest mean loss of the held-out rows that certifies the epsilon asked for."""
        if self.options.by_question:
            questions = self.certifiable_questions()
            return allowance_of_questions(questions, self.options.epsilon, self.bound)
        held_out = self.recording.rows_of(self.split.certify)
        return self.bound.allowance(len(held_out), self.options.epsilon)

    def rows_by_question(self) -> dict[str, Bools]:
        """The held-out rows of each question, bool [held-out rows]; the commonest comes first."""
        if not self.questions:
            return {}
        names = np.array(self.questions)[self.split.certify]
        found, counts = np.unique(names, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {str(name): names == name for name in found[order]}

    def certifiable_questions(self) -> QuestionRows:
        """Those that serving can recognise and that have rows enough for a bound of their own."""
        bound, epsilon = self.bound, self.options.epsilon
        return {
            name: own
            for name, own in self.rows_by_question().items()
            if name in self.ends
            and bound.of_rows(own).holds(np.zeros(np.count_nonzero(own)), epsilon)
        }


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
            calibration.allowed,
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
    allowed = calibration.allowed
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
    epsilons = sorted({*EPSILONS, options.epsilon})
    if options.by_question and exits:
        for name, rows in by_question.items():
            if own := certify(exits, recording.depth, epsilons, bound, rows):
                questions[name] = own
        points = combine_questions(by_question, questions, exits, recording.depth)
    elif exits:
        tests = calibration.label_tests
        points = certify(exits, recording.depth, epsilons, bound, tests=tests)
    return FittedPolicy(calibration, exits, points, questions, candidates, heads, costs, expected)
