"""A policy made from rows: fit candidates, choose the exit points, certify the bound."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vllm_adainfer.artifact.kinds import LABEL_HEADS
from vllm_adainfer.offline.calibration.certify.certify import Points, Terms, certified
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.choose import Choice, layers_saved
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, fit_exits, with_trained
from vllm_adainfer.offline.progress import progress, say
from vllm_adainfer.policy.student import TextEncoder

SHARES = (0.25, 0.5, 1.0)  # of the prompts, for the learning curve


@dataclass(frozen=True)
class CurvePoint:
    """Exit points fitted on so many prompts, and the share of layers that they save, 0 to 1."""

    prompts: int
    layers_saved: float


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and its results on the prompts it was made from.

    Attributes:
        calibration: the data and options behind it.
        heads: the fitted exit points that were not trained, with their results on all rows that
            fit.
        candidates: all that were fitted.
        choice: which of them were chosen, and why.
        points: epsilon -> the loosest policy certified for it on the held-out rows.
        questions: question -> the same for it alone, if each is certified on its own.
        last_token: for a pooled policy, the policy for requests whose prompt it cannot see as a
            whole; None if such requests run all layers.

    """

    calibration: Calibration
    heads: list[FittedExit]
    candidates: list[FittedExit]
    choice: Choice
    points: Points
    questions: dict[str, Points]
    last_token: FittedPolicy | None = None

    @property
    def exits(self) -> list[FittedExit]:
        """The chosen exit points, by layer; empty if no set of them is worth its cost."""
        return self.choice.exits

    @cached_property
    def terms(self) -> Terms:
        """What it holds on the held-out rows."""
        return Terms(self.calibration)

    @property
    def student(self) -> TrainedProbe | None:
        """The student, if it is among the chosen exit points."""
        if not any(isinstance(exit.probe.encoder, TextEncoder) for exit in self.exits):
            return None
        [student] = [one for one in self.calibration.trained if one.base is not None]
        return student

    @property
    def branches(self) -> tuple[int, ...]:
        """The layers of the chosen exit points that have a branch."""
        return tuple(exit.layer for exit in self.exits if exit.is_branch)

    def learning_curve(self) -> list[CurvePoint]:
        """What the exit points save if fewer prompts are fitted on; empty for other probes.

        These are judged out of fold: the held-out ones are for the bound alone. Also empty with a
        student or branches, which would be trained three times.
        """
        calibration, split = self.calibration, self.calibration.split
        is_head = calibration.target.kind in LABEL_HEADS
        if not is_head or self.student is not None or self.branches:
            return []
        layers, depth = [exit.layer for exit in self.exits], calibration.rows.model.depth
        curve = []
        for share in SHARES:
            fit = split.fit[: round(len(split.fit) * share)]
            exits = fit_exits(replace(calibration, split=replace(split, fit=fit)), layers)
            curve.append(CurvePoint(len(fit), layers_saved(exits, depth, self.choice.allowed)))
        return curve


def fit_candidates(
    calibration: Calibration, among: Collection[int] | None = None
) -> list[FittedExit]:
    """Fit an exit point after every recorded layer that its probe can read.

    `among` are layers to choose from; None for all.
    """
    rows, is_pooled = calibration.rows, calibration.target.is_pooled
    layers = [layer for layer in rows.states if among is None or layer in among]
    layers = [layer for layer in layers if is_pooled or layer > 0]
    if is_pooled:
        # Below layers that share keys and values, only the last token goes on.
        layers = [layer for layer in layers if layer <= rows.model.own_kv_layers]
    return fit_exits(calibration, progress(layers, desc="fit", unit="layer"))


def make_policy(
    calibration: Calibration, among: Sequence[FittedExit] | None = None
) -> FittedPolicy:
    """Choose exit points among the candidates, and certify every epsilon that can be.

    `among` are the heads to choose from; None fits every recorded layer.
    """
    heads = fit_candidates(calibration) if among is None else [*among]
    candidates, terms = with_trained(calibration, heads), Terms(calibration)
    choice = Choice.of(calibration, candidates, terms.rows_allowed(candidates))
    [(points, questions)] = certified(terms, choice.exits)
    return FittedPolicy(calibration, heads, candidates, choice, points, questions)


def of_last_token(policy: FittedPolicy) -> Calibration:
    """The data of a pooled policy for heads that read the last token alone."""
    calibration = policy.calibration
    target = replace(calibration.target, kind="label-head")
    students = tuple(one for one in calibration.trained if one.layer == 0)
    return replace(calibration, target=target, trained=students)


def with_last_token(
    policy: FittedPolicy, last: Calibration, candidates: Sequence[FittedExit]
) -> FittedPolicy:
    """A pooled policy with the part for the last token, from `candidates` fitted on `last`.

    That part decides where a policy cannot see a prompt as a whole. Both parts are certified anew,
    by one bound that holds whichever decides a request.
    """
    # No cuts of their own: such requests are few.
    layers = {exit.layer for exit in policy.exits}
    own = make_policy(last, [exit for exit in candidates if exit.layer in layers])
    if not policy.exits:
        return policy
    parts = certified(policy.terms, policy.exits, own.exits)
    policy, own = (
        replace(part, points=points, questions=questions)
        for part, (points, questions) in zip((policy, own), parts, strict=True)
    )
    if any(point.layers_saved > 0 for point in own.points.values()):
        return replace(policy, last_token=own)
    say(
        "heads for the last token alone cannot be certified within the bound of those for whole "
        "prompts: requests with tokens of their own in the prefix cache run all layers"
    )
    return policy
