"""Train a student: an encoder learns the scores that full depth gives the labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE, Net, Training, train
from vllm_adainfer.policy.probe import LabelHead
from vllm_adainfer.policy.student import Student, TextEncoder

EPOCHS = 8
LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class TrainedStudent:
    """A student, and what is known of it on prompts that it was not trained on.

    Attributes:
        base: the encoder that it was trained from, and the prompts as it reads them.
        student: the student, as it is served.
        unseen: see `Trained.unseen`; of the rows that fit.

    """

    base: StudentBase
    student: Student
    unseen: Tensor
    layer: int = 0

    @property
    def probe(self) -> Student:
        """What decides."""
        return self.student

    def asked(self, prompts: Ints) -> Bools:
        """[prompts], whether it is asked: whether a prompt has text of its own."""
        return np.array([bool(self.base.texts[prompt]) for prompt in prompts.tolist()])

    def scores(self, prompts: Ints, subsets: Tensor | None) -> Tensor:
        """Scores of the labels for `prompts`, see `LabelHead.score`; 0 where it is not asked."""
        texts = [self.base.texts[prompt] for prompt in prompts.tolist()]
        asked = torch.from_numpy(self.asked(prompts))
        scores = torch.zeros(len(prompts), len(self.student.head.bias))
        if asked.any():
            own = None if subsets is None else subsets[asked]
            scores[asked] = self.student.score([text for text in texts if text], own)
        return scores


def train_student(
    base: StudentBase, taught: Taught, prompts: Ints, halves: Ints, label_ids: Tensor, seed: int
) -> TrainedStudent:
    """Train the encoder of `base` and a head.

    Args:
        base: the encoder, and all prompts as it reads them.
        taught: what full depth says about the rows to learn from; what they read is not used.
        prompts: [rows], the prompt of each.
        halves: [rows], the half that each is in, 0 or 1; see `train`.
        label_ids: int64 [labels].
        seed: the seed of the head, the order of the texts and dropout.

    """

    def net() -> Net[TextEncoder]:
        encoder = TextEncoder(copy.deepcopy(base.model))
        # Half of a small encoder, and a few hundred texts have few of its words.
        encoder.model.get_input_embeddings().requires_grad_(False)
        return Net(encoder, base.model.config.hidden_size, taught)

    texts = [base.texts[one] for one in prompts.tolist()]
    training = Training("a student", EPOCHS, LEARNING_RATE, seed)
    trained = train(net, texts, taught, halves, training)
    best = trained.net
    head = LabelHead(best.head.weight, best.head.bias, label_ids)
    return TrainedStudent(base, Student(best.encoder.to(SERVED_DTYPE), head), trained.unseen)
