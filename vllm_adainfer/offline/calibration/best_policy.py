"""The best policy of a calibration: which heads, and whether a student and branches pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.cost import untrained_branch_layers
from vllm_adainfer.offline.calibration.fit.encoders import branches_of, train_student
from vllm_adainfer.offline.calibration.fit.training import Lesson
from vllm_adainfer.offline.calibration.fitted_policy import (
    FittedPolicy,
    fit_candidates,
    make_policy,
    of_last_token,
    with_last_token,
)
from vllm_adainfer.offline.calibration.options import ProbeChoice
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.offline.progress import say
from vllm_adainfer.promise.kinds import asked_for

# A policy also promises probabilities in the whole vocabulary if it keeps at least this share of
# the savings it would have without. It does where the labels have nearly all of the mass.
MASS_WORTH = 0.5
# "auto" trains branches, which takes minutes, if one takes less than this share of a layer's time.
BRANCH_WORTH = 1 / 3
AGREES_ENOUGH = 0.98  # a head that agrees with full depth this often leaves a branch few errors


def best_policy(
    calibration: Calibration,
    probe: ProbeChoice,
    base: StudentBase | None = None,
    states_after: Callable[[Sequence[int]], OwnStates | None] | None = None,
) -> FittedPolicy:
    """The policy with the probe asked for; "auto" takes the faster one of the label heads.

    Which one that is, the part that fits decides; likewise whether a student of `base` and branches
    are worth the time that they take. `states_after` gives the states that branches read.
    """
    policy = best_heads(calibration, probe)
    if base is not None:
        student = train_student(base, Lesson.of(policy.calibration))
        with_student = with_trained_probes(policy, student)
        if with_student.student is None:
            say("the student costs more time than it saves, and is left out")
        else:
            policy = with_student
    asked = probe == "branch" or (probe == "auto" and branches_could_pay(policy))
    if states_after is None or not asked:
        return policy
    layers = layers_to_branch(policy)
    if not layers:
        say("no exit point has a head that a branch could do much better than")
        return policy
    states = states_after(layers)
    assert states is not None
    with_branches = with_trained_probes(policy, *branches_of(policy.calibration, states))
    if with_branches.branches:
        return with_branches
    say("branches cost more time than they save, and are left out")
    return policy


def best_heads(calibration: Calibration, probe: ProbeChoice) -> FittedPolicy:
    """The policy with the probe asked for, before anything is trained."""
    policy = with_mass_if_it_pays(make_policy(calibration))
    if not calibration.target.is_pooled:
        return policy
    last = of_last_token(policy)
    candidates = fit_candidates(last)
    if probe == "auto":
        alone = make_policy(last, candidates)
        if policy.choice.expected["chosen"] >= alone.choice.expected["chosen"]:
            return alone
    return with_last_token(policy, last, candidates)


def with_mass_if_it_pays(policy: FittedPolicy) -> FittedPolicy:
    """A policy for probabilities that also promises the label mass, unless that saves too little.

    The expectation is on the part that fits: a choice by the held-out part would weaken the bound.
    """
    calibration = policy.calibration
    has_rest = calibration.rows.model.logit_lens.head.size > len(calibration.labels)
    if calibration.options.tolerance is None or not has_rest:  # a classifier has no other tokens
        return policy
    promise = asked_for(
        calibration.options, calibration.labels, calibration.score_head, label_mass=True
    )
    target = replace(calibration.target, promise=promise)
    with_mass = make_policy(replace(calibration, target=target))
    times = (one.choice.expected for one in (with_mass, policy))
    saved, saved_without = (1 - one["chosen"] / one["full_depth"] for one in times)
    return with_mass if 0 < saved >= MASS_WORTH * saved_without else policy


def with_trained_probes(policy: FittedPolicy, *trained: TrainedProbe) -> FittedPolicy:
    """A policy from the heads of another one and what was trained beside them, chosen anew."""
    calibration = policy.calibration
    kept = () if policy.student is None else (policy.student,)
    found = make_policy(replace(calibration, trained=(*kept, *trained)), policy.heads)
    if not calibration.target.is_pooled:
        return found
    last = of_last_token(found)
    return with_last_token(found, last, fit_candidates(last, {exit.layer for exit in found.exits}))


def layers_to_branch(policy: FittedPolicy) -> list[int]:
    """The layers of the exit points where a branch has something to learn that the head misses."""
    return [
        exit.layer
        for exit in policy.exits
        if exit.layer > 0 and exit.fitted.agrees.mean() < AGREES_ENOUGH
    ]


def branches_could_pay(policy: FittedPolicy) -> bool:
    """Whether a branch takes little time beside a layer of the model, in a pooled policy.

    Branches learn which label holds, if one does.
    """
    target = policy.calibration.target
    if not target.is_pooled or not target.promise.link.one_holds:
        return False
    return untrained_branch_layers(policy.calibration) < BRANCH_WORTH
