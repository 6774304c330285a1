"""A policy made from a recording: fit, choose the exit points, certify the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_adainfer.artifact.config import Label
from vllm_adainfer.artifact.kinds import BoundChoice, ClassifierKind, Risk
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.bound import FloatArray
from vllm_adainfer.offline.calibration.certify import EPSILONS, Bound, certify
from vllm_adainfer.offline.calibration.certify_questions import (
    Points,
    QuestionRows,
    allowance,
    certify_questions,
    joined,
)
from vllm_adainfer.offline.calibration.choices import Choices
from vllm_adainfer.offline.calibration.choose import choose_exits, evenly_spread, forecast
from vllm_adainfer.offline.calibration.collect import Ints, Recording
from vllm_adainfer.offline.calibration.cost import (
    Costs,
    head_seconds,
    probe_seconds,
    shares_of_time,
)
from vllm_adainfer.offline.calibration.fit import Bools, FittedExit, chain, fit_exits
from vllm_adainfer.offline.calibration.loss import AccuracyLost, Loss, RightTokens
from vllm_adainfer.offline.calibration.probes import Target
from vllm_adainfer.offline.calibration.split import Split, numbered
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.policy.questions import End

STEP_ROWS = 2048  # token rows of a full step, vLLM's default on a CPU
HEAD_ROWS = 128  # tokens that a full step yields, likewise


@dataclass(frozen=True)
class PolicyOptions:
    """What a policy consists of and what it promises; see `vllm-adainfer calibrate --help`."""

    classifier: ClassifierKind = "svm"
    exit_points: tuple[int, ...] | None = None
    epsilon: float = 0.02
    delta: float = 0.1
    risk: Risk = "disagreement"
    tolerance: float | None = None
    bound: BoundChoice = "auto"
    seed: int = 0
    max_tokens: int = 1
    by_question: bool = False

    def bounds(self, groups: Ints | None = None, together: int = 1) -> Bound:
        """The bound that `risk` and `bound` ask for.

        Args:
            groups: [held-out rows], the group of each; None if each row stands alone.
            together: the most prompts that a group can have, by the half that fits.

        Raises:
            AdaInferError: the exact bound is asked for accuracy, whose losses may be negative, or
                for several tokens of a prompt or prompts of a group, which are not independent.

        """
        disagreement, generated = self.risk != "accuracy", self.max_tokens > 1
        if self.bound == "exact" and generated:
            raise AdaInferError(
                "--bound exact counts independent answers, and the tokens of a text are not: use "
                "wsr, hoeffding-bentkus or auto with --max-tokens"
            )
        if generated and not disagreement:
            raise AdaInferError(
                "--risk accuracy works for one-token answers only: drop --max-tokens or bound the "
                "disagreement"
            )
        if self.bound == "exact" and not disagreement:
            raise AdaInferError(
                "--bound exact counts changed answers and cannot bound the accuracy lost: use wsr, "
                "hoeffding-bentkus or auto"
            )
        if self.bound == "exact" and together > 1:
            raise AdaInferError(
                "--bound exact counts independent answers, and those to requests that came "
                "together are not: use wsr, hoeffding-bentkus or auto"
            )
        kind, longest = self.bound, self.max_tokens * together
        if kind == "auto":
            kind = "exact" if disagreement and longest == 1 else "wsr"
        return Bound(kind, self.delta, 0.0 if disagreement else -1.0, groups, longest)


@dataclass(frozen=True)
class Calibration:
    """What a policy is made from.

    Attributes:
        recording: of all prompts.
        target: what the probes predict.
        split: which prompts fit, and which certify.
        options: what is wanted.
        labels: the answers, if there is a fixed set of them.
        right: the right tokens by prompt, if the risk is of accuracy.
        choices: the texts and their first tokens, if requests choose from texts.
        with_mass: whether probabilities in the whole vocabulary are promised, if the risk is of
            probabilities.
        questions: what each prompt asks, if prompts are requests; else empty.
        ends: by question, the tokens that its prompts end with; those that can be recognised.

    """

    recording: Recording
    target: Target
    split: Split
    options: PolicyOptions
    labels: tuple[Label, ...] = ()
    right: RightTokens | None = None
    choices: Choices | None = None
    with_mass: bool = False
    questions: Sequence[str] = ()
    ends: Mapping[str, tuple[End, ...]] = field(default_factory=dict)

    @property
    def loss(self) -> Loss | None:
        """Of an answer; None: it differs from the full model's."""
        if self.right is not None:
            return AccuracyLost(self.right)
        if self.target.reads is None or self.options.tolerance is None:
            return None
        return self.target.reads.loss(self.options.tolerance, self.with_mass)

    @property
    def bound(self) -> Bound:
        """The bound, on the decision rows of the held-out prompts."""
        rows = self.split.certify_rows(self.recording)
        groups = self.split.groups
        if self.options.by_question:  # each is a mixture of its own
            groups = numbered([*zip(groups.tolist(), self.questions, strict=True)])
        together = self.split.most_together(groups)
        return self.options.bounds(groups[self.recording.prompts[rows]], together)

    def rows_by_question(self) -> dict[str, Bools]:
        """[held-out rows], which are of each question; the commonest question comes first."""
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


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and how it did on the prompts it was made from.

    Attributes:
        calibration: what it was made from.
        exits: the chosen exit points, by layer; empty if no set of them is worth its cost.
        points: epsilon -> the loosest policy certified for it on the held-out half.
        questions: by question, the same for it alone, if each is certified on its own.
        candidates: all fitted exit points.
        costs: the costs the choice was based on.
        expected: expected times of a prompt, in seconds: ``full_depth``, ``chosen``, ``uniform``
            (as many exit points, evenly spread).

    """

    calibration: Calibration
    exits: list[FittedExit]
    points: Points
    questions: dict[str, Points]
    candidates: list[FittedExit]
    costs: Costs
    expected: dict[str, float]


def make_policy(calibration: Calibration) -> FittedPolicy:
    """Fit every recorded layer, choose among them, certify every epsilon that can be."""
    recording, split, options = calibration.recording, calibration.split, calibration.options
    candidates = fit_exits(
        recording,
        calibration.target,
        split,
        options.classifier,
        options.seed,
        progress(recording.states, desc="fit", unit="layer"),
        calibration.loss,
    )
    tokens = recording.computed[split.fit_rows(recording)]
    if options.max_tokens > 1:  # at later tokens, reading a layer's weights is what takes time
        tokens = np.ones_like(tokens)
    costs = _measured_costs(recording, candidates, tokens, generated=options.max_tokens > 1)
    bound = calibration.bound
    allowed = bound.allowance(len(split.certify_rows(recording)), options.epsilon)
    if options.by_question:
        allowed = allowance(calibration.certifiable_questions(), options.epsilon, bound)
    exits = candidates
    if options.exit_points is None:
        exits = choose_exits(candidates, costs, tokens, allowed)
    expected = {
        "full_depth": forecast([], costs, tokens, allowed).seconds,
        "chosen": forecast(exits, costs, tokens, allowed).seconds,
        "uniform": forecast(evenly_spread(candidates, len(exits)), costs, tokens, allowed).seconds,
    }
    if options.classifier == "crf" and exits:
        exits = chain(exits)
    points: Points = {}
    questions: dict[str, Points] = {}
    epsilons = sorted({*EPSILONS, options.epsilon}) if exits else []
    if options.by_question and exits:
        rows = calibration.certifiable_questions()
        questions = certify_questions(rows, exits, recording.depth, epsilons, bound)
        points = joined(rows, questions, exits, recording.depth)
    else:
        for epsilon in epsilons:
            point = certify(exits, recording.depth, epsilon, bound)
            if point is not None:
                points[epsilon] = point
    return FittedPolicy(calibration, exits, points, questions, candidates, costs, expected)


def _measured_costs(
    recording: Recording, candidates: list[FittedExit], tokens: FloatArray, generated: bool
) -> Costs:
    """Time the probes; the recording has timed the layers.

    Args:
        recording: of all prompts.
        candidates: fitted exit points.
        tokens: [rows], token rows that the layers run for each decision row.
        generated: whether texts are generated, so that an early answer spares the LM head.

    """
    states = next(iter(recording.states.values()))
    asked = states[: max(1, round(STEP_ROWS / tokens.mean()))]
    head = 0.0
    if generated:
        head = head_seconds(recording.logit_lens, asked[:HEAD_ROWS], recording.threads)
    return Costs(
        depth=recording.depth,
        layer=recording.layer_seconds,
        cut=recording.cut_seconds,
        probe={
            exit.layer: probe_seconds(exit.probe, asked, recording.threads) for exit in candidates
        },
        own_kv_layers=recording.own_kv_layers,
        head=head,
        fewer=shares_of_time(recording.fewer),
    )
