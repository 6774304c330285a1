"""Branches in a pooled policy, and the part of such a policy for the last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vllm_adainfer.offline.calibration.fit.branch import TrainedBranch, train_branch
from vllm_adainfer.offline.calibration.fit.cost import untrained_branch_layers
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.offline.calibration.fit.probes import taught_by_full_depth
from vllm_adainfer.offline.calibration.fitted_policy import (
    Calibration,
    FittedPolicy,
    fit_candidates,
    make_policy,
)
from vllm_adainfer.offline.calibration.record.collect import FOLDS
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.offline.progress import say

# "auto" trains branches, which takes minutes, if one takes less than this share of a layer's time.
BRANCH_WORTH = 1 / 3


def branches_could_pay(policy: FittedPolicy) -> bool:
    """Whether a branch takes little time beside a layer of the model, in a pooled policy."""
    calibration = policy.calibration
    if not calibration.target.is_pooled:
        return False
    recording = calibration.recording
    tokens = recording.computed[recording.rows_of(calibration.split.fit)]
    return untrained_branch_layers(recording, float(tokens.mean())) < BRANCH_WORTH


def branches_of(calibration: Calibration, states: OwnStates) -> tuple[TrainedBranch, ...]:
    """A branch for each layer of `states`, trained on most of the prompts that fit."""
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
            recording.folds_of(rows) == FOLDS - 1,
            target.label_ids,
            calibration.options.seed,
        )
        for layer in states.rows
    )


def with_branches(policy: FittedPolicy, branches: tuple[TrainedBranch, ...]) -> FittedPolicy:
    """The policy with those of the branches that shorten the expected time; without any as it is.

    Where one does, exit points are chosen anew.
    """
    found = make_policy(replace(policy.calibration, branches=branches), policy.heads)
    if not found.branches:
        say("branches cost more time than they save, and are left out")
        return policy
    last = of_last_token(found)
    return with_last_token(found, last, fit_candidates(last, {exit.layer for exit in found.exits}))


def of_last_token(policy: FittedPolicy) -> Calibration:
    """The data of a pooled policy for heads that read the last token alone."""
    calibration = policy.calibration
    target = replace(calibration.target, kind="label-head")
    return replace(calibration, target=target, branches=())


def with_last_token(
    policy: FittedPolicy, last: Calibration, candidates: Sequence[FittedExit]
) -> FittedPolicy:
    """A pooled policy with the part for the last token, from `candidates` fitted on `last`."""
    # No cuts of their own: such requests are few.
    layers = {exit.layer for exit in policy.exits}
    own = make_policy(last, [exit for exit in candidates if exit.layer in layers])
    return replace(policy, last_token=own if own.points else None)
