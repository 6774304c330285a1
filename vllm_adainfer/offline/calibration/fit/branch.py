"""Train a branch: a small layer over a prompt's states learns the scores that full depth gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE, Training, train
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.policy.branch import Branch, StateEncoder
from vllm_adainfer.policy.probe import LabelHead

EPOCHS = 15
LEARNING_RATE = 1e-3
TOGETHER = 64  # prompts whose states are in memory at once


@dataclass(frozen=True)
class TrainedBranch:
    """A branch, and what it does not know of the prompts that it was trained on.

    Attributes:
        layer: the layer after which it reads the states.
        branch: the branch, as it is served.
        states: those of all prompts.
        unseen: [rows that fit], those that it was not trained on.

    """

    layer: int
    branch: Branch
    states: OwnStates
    unseen: Bools

    @property
    def probe(self) -> Branch:
        """What decides."""
        return self.branch

    def scores(self, prompts: Ints, subsets: Tensor | None) -> tuple[Tensor, Bools]:
        """Scores of the labels for `prompts`, see `LabelHead.score`, and who is asked: all."""
        found = []
        for start in range(0, len(prompts), TOGETHER):
            some = slice(start, start + TOGETHER)
            states = self.states.of(self.layer, prompts[some])
            lens = np.array([len(one) for one in states])
            rows = self.branch.project(torch.cat(states))
            found.append(self.branch.score(rows, lens, None if subsets is None else subsets[some]))
        return torch.cat(found), np.ones(len(prompts), dtype=np.bool_)


def train_branch(
    layer: int,
    states: OwnStates,
    taught: Taught,
    prompts: Ints,
    unseen: Bools,
    label_ids: Tensor,
    seed: int,
) -> TrainedBranch:
    """Train a branch after `layer`; arguments as for `train_student`, and all prompts' `states`."""
    inputs = states.of(layer, prompts)
    training = Training(f"a branch after layer {layer}", EPOCHS, LEARNING_RATE, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = StateEncoder(inputs[0].shape[1])
    best = train(encoder, 2 * BRANCH_WIDTH, inputs, taught, unseen, training)
    head = LabelHead(best.head.weight, best.head.bias, label_ids)
    return TrainedBranch(layer, Branch(best.encoder.to(SERVED_DTYPE), head), states, unseen)
