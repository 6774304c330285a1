"""Train a branch: a small layer over a prompt's states learns the scores that full depth gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE, Net, Training, train
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.policy.branch import Branch, StateEncoder
from vllm_adainfer.policy.probe import LabelHead

EPOCHS = 15
LEARNING_RATE = 1e-3
TOGETHER = 64  # prompts whose states are in memory at once


@dataclass(frozen=True)
class TrainedBranch:
    """A branch, and what is known of it on prompts that it was not trained on.

    Attributes:
        layer: the layer after which it reads the states.
        branch: the branch, as it is served.
        states: those of all prompts.
        unseen: see `Trained.unseen`; of the rows that fit.

    """

    layer: int
    branch: Branch
    states: OwnStates
    unseen: Tensor

    @property
    def probe(self) -> Branch:
        """What decides."""
        return self.branch

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
            rows = self.branch.project(torch.cat(states))
            found.append(self.branch.score(rows, lens, None if subsets is None else subsets[some]))
        return torch.cat(found)


def train_branch(
    layer: int,
    states: OwnStates,
    taught: Taught,
    prompts: Ints,
    halves: Ints,
    label_ids: Tensor,
    seed: int,
) -> TrainedBranch:
    """Train a branch after `layer`; arguments as for `train_student`, and all prompts' `states`."""
    inputs = states.of(layer, prompts)

    def net() -> Net[StateEncoder]:
        return Net(StateEncoder(inputs[0].shape[1]), 2 * BRANCH_WIDTH, taught)

    training = Training(f"a branch after layer {layer}", EPOCHS, LEARNING_RATE, seed)
    trained = train(net, inputs, taught, halves, training)
    best = trained.net
    head = LabelHead(best.head.weight, best.head.bias, label_ids)
    return TrainedBranch(layer, Branch(best.encoder.to(SERVED_DTYPE), head), states, trained.unseen)
