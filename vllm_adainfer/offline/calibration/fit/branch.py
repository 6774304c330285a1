"""Train a branch: a small layer over a prompt's states learns the scores that full depth gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.training import Lesson, Net, Training, train
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.policy.branch import Branch, StateEncoder

EPOCHS = 15
LEARNING_RATE = 1e-3
TOGETHER = 64  # prompts whose states are in memory at once


@dataclass(frozen=True)
class TrainedBranch:
    """A branch, and what is known of it on prompts that it was not trained on.

    Attributes:
        layer: the layer after which it reads the states.
        probe: the branch, as it is served.
        unseen: see `TrainedProbe.unseen`.
        states: those of all prompts.

    """

    layer: int
    probe: Branch
    unseen: Tensor
    states: OwnStates

    def asked(self, prompts: Ints) -> Bools:
        """[prompts], whether it is asked: about all."""
        return np.ones(len(prompts), dtype=np.bool_)

    def scores(self, prompts: Ints, subsets: Tensor | None) -> Tensor:
        """Scores of the labels for `prompts`, see `LabelHead.score`."""
        found = []
        for start in range(0, len(prompts), TOGETHER):
            some = slice(start, start + TOGETHER)
            states = self.states.of(self.layer, prompts[some])
            lens = np.array([len(one) for one in states])
            rows = self.probe.project(torch.cat(states))
            found.append(self.probe.score(rows, lens, None if subsets is None else subsets[some]))
        return torch.cat(found)


def branches_of(calibration: Calibration, states: OwnStates) -> tuple[TrainedBranch, ...]:
    """A branch for each layer of `states`, trained on the prompts that fit."""
    return tuple(train_branch(layer, states, Lesson.of(calibration)) for layer in states.rows)


def train_branch(layer: int, states: OwnStates, lesson: Lesson) -> TrainedBranch:
    """Train a branch after `layer` on the prompts of `lesson`, given all prompts' `states`."""
    inputs = states.of(layer, lesson.prompts)

    def net() -> Net[StateEncoder]:
        return Net(StateEncoder(inputs[0].shape[1]), 2 * BRANCH_WIDTH, lesson.taught)

    training = Training(f"a branch after layer {layer}", EPOCHS, LEARNING_RATE, lesson.seed)
    trained = train(net, inputs, lesson, training)
    return TrainedBranch(layer, Branch(trained.encoder, trained.head), trained.unseen, states)
