"""What a policy is made from: recording, target, split and options; and its loss and bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.fields import Label, SharedTokens
from vllm_adainfer.artifact.kinds import ScoreHead
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import (
    EPSILONS,
    QuestionRows,
    allowance_of_questions,
)
from vllm_adainfer.offline.calibration.certify.label_bounds import LabelTest
from vllm_adainfer.offline.calibration.certify.path import threshold_grid, threshold_path
from vllm_adainfer.offline.calibration.certify.queries import Queries, rows_allowed
from vllm_adainfer.offline.calibration.data.choices import Choices
from vllm_adainfer.offline.calibration.fit.branch import TrainedBranch
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.offline.calibration.fit.loss import (
    Loss,
    RightTokens,
    accuracy_lost,
    disagreement,
)
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit.split import Split, numbered
from vllm_adainfer.offline.calibration.fit.student import TrainedStudent
from vllm_adainfer.offline.calibration.fit.trained_exits import TrainedProbe
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.recording import Recording
from vllm_adainfer.policy.questions import End


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
        shared: see `ArtifactConfig.shared`; empty for a policy that serves any prompt.

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
    shared: SharedTokens = field(default_factory=SharedTokens)

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
        if self.options.top_k is not None:
            return self.target.full_depth.loss_of_order(self.options.top_k.margin)
        assert self.options.tolerance is not None
        return self.target.full_depth.loss(self.options.tolerance, self.with_mass)

    @property
    def epsilons(self) -> list[float]:
        """The bounds to certify, ascending."""
        return sorted({*EPSILONS, self.options.epsilon})

    @property
    def bound(self) -> Bound:
        """The bound, on the decision rows of the held-out prompts."""
        rows = self.recording.rows_of(self.split.certify)
        groups = self.split.groups
        if self.options.by_question:  # each is a mixture of its own
            groups = numbered([*zip(groups.tolist(), self.questions, strict=True)])
        together, repeats = self.split.most_together(groups), self.split.repeats
        prompts = self.recording.prompts[rows]
        return Bound.promised(
            self.options, groups[prompts], together, None if repeats is None else repeats[prompts]
        )

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
        """The largest mean loss that certifies the epsilon asked for."""
        if self.options.by_question:
            questions = self.certifiable_questions()
            return allowance_of_questions(questions, self.options.epsilon, self.bound)
        held_out = len(self.recording.rows_of(self.split.certify))
        if (queries := self.queries(self.split.certify)) is not None:
            held_out = len(queries.rows)
        return self.bound.allowance(held_out, self.options.epsilon)

    def queries(self, prompts: Ints) -> Queries | None:
        """The queries that `prompts` are the documents of, if an order is promised of them."""
        if self.options.top_k is None:
            return None
        assert self.target.full_depth is not None
        rows = self.recording.rows_of(prompts)
        full = self.target.full_depth.probabilities.among[rows, -1].double().numpy()
        groups = self.split.groups[self.recording.prompts[rows]]
        return Queries.of_groups(self.options.top_k, groups, full)

    def rows_allowed(self, candidates: Sequence[FittedExit]) -> float:
        """The largest mean loss of rows within the bound, from `candidates` (at least one)."""
        queries = self.queries(self.split.fit)
        if queries is None:
            return self.allowed
        heads = [exit for exit in candidates if not exit.is_branch]
        layers, fitted = [exit.layer for exit in heads], [exit.fitted for exit in heads]
        path = threshold_path(layers, fitted, self.recording.depth, threshold_grid(heads))
        return rows_allowed(path, queries, self.allowed)

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
