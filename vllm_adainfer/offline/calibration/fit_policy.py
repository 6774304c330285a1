"""A policy made from rows: fit candidates, choose the exit points, certify the bound.

`calibrate` and the trainer of a live server make the same try: `fit_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from vllm_adainfer.artifact.kinds import LABEL_HEADS, ProbeChoice
from vllm_adainfer.offline.calibration.certify.certify import Terms, certified
from vllm_adainfer.offline.calibration.certify.path import Points
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.branches import (
    branches_of,
    layers_to_branch,
    promising,
)
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.choose import chosen, layers_saved
from vllm_adainfer.offline.calibration.fit.cost import (
    Costs,
    measured_costs,
    untrained_branch_layers,
)
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, fit_exits, with_trained
from vllm_adainfer.offline.calibration.fit.students import (
    HalfTrained,
    TriedStudent,
    half_students,
)
from vllm_adainfer.offline.calibration.fit.training import Lesson
from vllm_adainfer.offline.calibration.record.rows import OwnStates
from vllm_adainfer.offline.progress import progress, say
from vllm_adainfer.policy.text_encoders import TextEncoder

# A policy also promises probabilities in the whole vocabulary if it keeps at least this share of
# the savings it would have without. It does where the labels have nearly all of the mass.
MASS_WORTH = 0.5
# "auto" trains branches, which takes minutes, if one takes less than this share of a layer's time.
BRANCH_WORTH = 1 / 3
SHARES = (0.25, 0.5, 1.0)  # of the prompts, for the learning curve


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and its results on the prompts it was made from.

    Attributes:
        calibration: the data and options behind it.
        candidates: all exit points that were fitted.
        exits: the chosen ones, by layer; empty if no set of them is worth its cost.
        allowed: the mean loss of rows that they were chosen for.
        costs: the costs of this model on this machine.
        expected: see `chosen`.
        points: epsilon -> the loosest policy certified for it on the held-out rows.
        questions: question -> the same for it alone, if each is certified on its own.
        last_token: for a pooled policy, the policy for requests whose prompt it cannot see as a
            whole; None if such requests run all layers.
        seconds: how long it took to make, with the recording; None if that is not known.
        students: what was found of the students that were trained for it.

    """

    calibration: Calibration
    candidates: list[FittedExit]
    exits: list[FittedExit]
    allowed: float
    costs: Costs
    expected: dict[str, float]
    points: Points
    questions: dict[str, Points]
    last_token: FittedPolicy | None = None
    seconds: float | None = None
    students: tuple[TriedStudent, ...] = ()

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

    def learning_curve(self) -> list[dict[str, float]]:
        """The layers saved, 0 to 1, if fewer prompts are fitted on; empty for other probes.

        These are judged out of fold: the held-out ones are for the bound alone. It is of heads
        alone: a student or branches would be trained three times.
        """
        calibration, split = self.calibration, self.calibration.split
        has_head = {exit.layer for exit in self.candidates if exit.probe.encoder is None}
        layers = [exit.layer for exit in self.exits if exit.layer in has_head]
        if calibration.target.kind not in LABEL_HEADS or not layers:
            return []
        depth = calibration.rows.model.depth
        curve = []
        for share in SHARES:
            fit = split.fit[: round(len(split.fit) * share)]
            exits = fit_exits(replace(calibration, split=replace(split, fit=fit)), layers)
            saved = layers_saved(exits, depth, self.allowed)
            curve.append({"prompts": len(fit), "layers_saved": saved})
        return curve


def fit_policy(
    calibration: Calibration,
    probe: ProbeChoice,
    base: StudentBase | None = None,
    states_after: Callable[[Sequence[int]], OwnStates | None] | None = None,
) -> FittedPolicy:
    """The policy with the probe asked for; "auto" takes the faster one of the label heads.

    Which one that is, the part that fits decides; likewise whether a student of `base` and branches
    are worth the time that they take. `states_after` gives the states that branches read.

    An AdaInferError if the held-out rows are too few for a promise about a label.
    """
    for test in Terms(calibration).tests:
        test.check(calibration.rows.tokens[calibration.held_out])
    policy = best_heads(calibration, probe)
    if base is not None:
        policy = with_best_student(policy, half_students(base, Lesson.of(policy.calibration)))
    if states_after is None:
        return policy
    target = policy.calibration.target
    wanted = probe == "branch" or (
        probe == "auto"
        and target.is_pooled
        and target.promise.link.one_holds  # branches learn which label holds
        and untrained_branch_layers(policy.calibration) < BRANCH_WORTH
    )
    if not wanted:
        return policy
    layers = layers_to_branch(policy.exits)
    if not layers:
        say("no exit point has a head that a branch could do much better than")
        return policy
    states = states_after(layers)
    assert states is not None
    if probe == "auto":
        layers = promising(policy.calibration, policy.exits, states)
        if not layers:
            say("at a first look no branch does as well as its layer's head: none is trained")
            return policy
    branches = branches_of(policy.calibration, states, layers)
    with_branches = with_trained_probes(policy, *branches)
    if with_branches.branches:
        return with_branches
    say("branches cost more time than they save, and are left out")
    return policy


def with_best_student(policy: FittedPolicy, students: Iterable[HalfTrained]) -> FittedPolicy:
    """The policy with the student that makes prompts fastest; as it is where none makes them so.

    The part that fits decides which one, by nets that have seen half of it, and says what each
    costs and saves. Only that one is trained on all of it.
    """
    calibration, tried = policy.calibration, list[TriedStudent]()
    fastest, best = policy.expected["chosen"], None
    for student in students:
        found = make_policy(replace(calibration, trained=(student.judged,)), heads_of(policy))
        saved = layers_saved(found.exits, calibration.rows.model.depth, found.allowed)
        seconds, expected = found.costs.probe[0], found.expected["chosen"]
        tried.append(TriedStudent(student.judged.name, seconds, saved, expected))
        say(tried[-1].in_words())
        if found.student is not None and expected < fastest:
            fastest, best = expected, student
    found = policy if best is None else with_trained_probes(policy, best.finished())
    if found.student is None:
        say("the student costs more time than it saves, and is left out")
        found = policy
    return replace(found, students=tuple(tried))


def best_heads(calibration: Calibration, probe: ProbeChoice) -> FittedPolicy:
    """The policy with the probe asked for, before anything is trained."""
    policy = with_mass_if_it_pays(make_policy(calibration))
    if not calibration.target.is_pooled:
        return policy
    last = of_last_token(policy)
    candidates = fit_candidates(last)
    if probe == "auto":
        alone = make_policy(last, candidates)
        if policy.expected["chosen"] >= alone.expected["chosen"]:
            return alone
    return with_last_token(policy, last, candidates)


def with_mass_if_it_pays(policy: FittedPolicy) -> FittedPolicy:
    """A policy for probabilities that also promises the label mass, unless that saves too little.

    The expectation is on the part that fits: a choice by the held-out part would weaken the bound.
    """
    calibration = policy.calibration
    has_rest = calibration.rows.model.logit_lens.head.size > len(calibration.labels)
    promise = calibration.target.promise.with_mass()
    if promise is None or not has_rest:  # a classifier has no other tokens
        return policy
    target = replace(calibration.target, promise=promise)
    with_mass = make_policy(replace(calibration, target=target))
    times = (one.expected for one in (with_mass, policy))
    saved, saved_without = (1 - one["chosen"] / one["full_depth"] for one in times)
    return with_mass if 0 < saved >= MASS_WORTH * saved_without else policy


def with_trained_probes(policy: FittedPolicy, *trained: TrainedProbe) -> FittedPolicy:
    """A policy from the heads of another one and what was trained beside them, chosen anew."""
    calibration = policy.calibration
    kept = () if policy.student is None else (policy.student,)
    found = make_policy(replace(calibration, trained=(*kept, *trained)), heads_of(policy))
    found = replace(found, students=policy.students)
    if not calibration.target.is_pooled:
        return found
    last = of_last_token(found)
    return with_last_token(found, last, fit_candidates(last, {exit.layer for exit in found.exits}))


def heads_of(policy: FittedPolicy) -> list[FittedExit]:
    """The candidates of a policy for which nothing was trained."""
    return [one for one in policy.candidates if one.probe.encoder is None]


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
    shown = partial(progress, total=len(layers), desc="fit", unit="layer")
    return fit_exits(calibration, layers, shown)


def make_policy(
    calibration: Calibration, among: Sequence[FittedExit] | None = None
) -> FittedPolicy:
    """Choose exit points among the candidates, and certify every epsilon that can be.

    `among` are the heads to choose from; None fits every recorded layer.
    """
    heads = fit_candidates(calibration) if among is None else among
    candidates, terms = with_trained(calibration, heads), Terms(calibration)
    allowed, costs = terms.rows_allowed(candidates), measured_costs(calibration, candidates)
    exits, expected = chosen(calibration, candidates, costs, allowed)
    [(points, questions)] = certified(terms, exits)
    return FittedPolicy(calibration, candidates, exits, allowed, costs, expected, points, questions)


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
    policy, own = (
        replace(part, points=points, questions=questions)
        for part, (points, questions) in zip(
            (policy, own), certified(policy.terms, policy.exits, own.exits), strict=True
        )
    )
    if any(point.layers_saved > 0 for point in own.points.values()):
        return replace(policy, last_token=own)
    say(
        "heads for the last token alone cannot be certified within the bound of those for whole "
        "prompts: requests with tokens of their own in the prefix cache run all layers"
    )
    return policy
