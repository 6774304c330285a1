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
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE, Training, train
from vllm_adainfer.policy.probe import LabelHead
from vllm_adainfer.policy.student import Student, TextEncoder

EPOCHS = 8
LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class TrainedStudent:
    """A student, and what it does not know of the prompts that it was trained on.

    Attributes:
        base: the encoder that it was trained from, and the prompts as it reads them.
        student: the student, as it is served.
        unseen: [rows that fit], those that it was not trained on.

    """

    base: StudentBase
    student: Student
    unseen: Bools
    layer: int = 0

    @property
    def probe(self) -> Student:
        """What decides."""
        return self.student

    def scores(self, prompts: Ints, subsets: Tensor | None) -> tuple[Tensor, Bools]:
        """Scores of the labels for `prompts`, see `LabelHead.score`, and who is asked at all."""
        texts = [self.base.texts[prompt] for prompt in prompts.tolist()]
        asked = np.array([bool(text) for text in texts])
        scores = torch.zeros(len(prompts), len(self.student.head.bias))
        if asked.any():
            own = None if subsets is None else subsets[torch.from_numpy(asked)]
            read = self.student.score([text for text in texts if text], own)
            scores[torch.from_numpy(asked)] = read
        return scores, asked


def train_student(
    base: StudentBase, taught: Taught, prompts: Ints, unseen: Bools, label_ids: Tensor, seed: int
) -> TrainedStudent:
    """Train the encoder of `base` and a head.

    Args:
        base: the encoder, and all prompts as it reads them.
        taught: what full depth says about the rows to learn from; what they read is not used.
        prompts: [rows], the prompt of each.
        unseen: [rows], those that are left out, to stop early and to judge the student.
        label_ids: int64 [labels].
        seed: the seed of the head, the order of the texts and dropout.

    """
    encoder = TextEncoder(copy.deepcopy(base.model))
    # Half of a small encoder, and a few hundred texts have few of its words.
    encoder.model.get_input_embeddings().requires_grad_(False)
    width, texts = base.model.config.hidden_size, [base.texts[one] for one in prompts.tolist()]
    training = Training("a student", EPOCHS, LEARNING_RATE, seed)
    best = train(encoder, width, texts, taught, unseen, training)
    head = LabelHead(best.head.weight, best.head.bias, label_ids)
    return TrainedStudent(base, Student(best.encoder.to(SERVED_DTYPE), head), unseen)
