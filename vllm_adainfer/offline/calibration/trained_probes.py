"""A student and branches in a policy, where they pay."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.calibration import Calibration
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.branch import TrainedBranch, train_branch
from vllm_adainfer.offline.calibration.fit.cost import untrained_branch_layers
from vllm_adainfer.offline.calibration.fit.probes import taught_by_full_depth
from vllm_adainfer.offline.calibration.fit.student import TrainedStudent, train_student
from vllm_adainfer.offline.calibration.fitted_policy import (
    FittedPolicy,
    fit_candidates,
    make_policy,
)
from vllm_adainfer.offline.calibration.last_token import of_last_token, with_last_token
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.offline.progress import say

# "auto" trains branches, which takes minutes, if one takes less than this share of a layer's time.
BRANCH_WORTH = 1 / 3
AGREES_ENOUGH = 0.98  # a head that agrees with full depth this often leaves a branch few errors


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
    calibration = policy.calibration
    if not calibration.target.is_pooled or not calibration.target.link.one_holds:
        return False
    recording = calibration.recording
    tokens = recording.computed[recording.rows_of(calibration.split.fit)]
    return untrained_branch_layers(recording, float(tokens.mean())) < BRANCH_WORTH


def halves_of(calibration: Calibration) -> Ints:
    """[rows that fit], 0 or 1: two halves, between which no group of prompts is torn."""
    rows = calibration.recording.rows_of(calibration.split.fit)
    halves: Ints = calibration.split.units[calibration.recording.prompts[rows]] % 2
    return halves


def student_of(calibration: Calibration, base: StudentBase) -> TrainedStudent:
    """A student trained on the prompts that fit."""
    recording, target = calibration.recording, calibration.target
    assert target.label_ids is not None, "a student scores labels"
    rows = recording.rows_of(calibration.split.fit)
    return train_student(
        base,
        taught_by_full_depth(recording, target, rows, torch.empty(len(rows), 0)),
        recording.prompts[rows],
        halves_of(calibration),
        target.label_ids,
        calibration.options.seed,
    )


def branches_of(calibration: Calibration, states: OwnStates) -> tuple[TrainedBranch, ...]:
    """A branch for each layer of `states`, trained on the prompts that fit."""
    recording, target = calibration.recording, calibration.target
    assert target.label_ids is not None, "a branch scores labels"
    rows = recording.rows_of(calibration.split.fit)
    taught = taught_by_full_depth(recording, target, rows, torch.empty(len(rows), 0))
    return tuple(
        train_branch(
            layer,
            states,
            taught,
            recording.prompts[rows],
            halves_of(calibration),
            target.label_ids,
            calibration.options.seed,
        )
        for layer in states.rows
    )


def with_branches(policy: FittedPolicy, branches: tuple[TrainedBranch, ...]) -> FittedPolicy:
    """The policy with those of the branches that shorten the expected time; without any as it is.

    Where one does, exit points are chosen anew.
    """
    found = _made_again(policy, replace(policy.calibration, branches=branches))
    if found.branches:
        return found
    say("branches cost more time than they save, and are left out")
    return policy


def with_student(policy: FittedPolicy, student: TrainedStudent) -> FittedPolicy:
    """The policy with the student, if that shortens the expected time; likewise."""
    found = _made_again(policy, replace(policy.calibration, student=student))
    if found.student is not None:
        return found
    say("the student costs more time than it saves, and is left out")
    return policy


def _made_again(policy: FittedPolicy, calibration: Calibration) -> FittedPolicy:
    """A policy from the heads of another one, and what was trained for `calibration`."""
    found = make_policy(calibration, policy.heads)
    if not calibration.target.is_pooled:
        return found
    last = of_last_token(found)
    return with_last_token(found, last, fit_candidates(last, {exit.layer for exit in found.exits}))
