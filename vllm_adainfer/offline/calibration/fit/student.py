"""Train a student: an encoder learns the scores that full depth gives the labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.training import Lesson, Net, Training, train
from vllm_adainfer.policy.student import Student, TextEncoder

EPOCHS = 8
LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class TrainedStudent:
    """A student, and what is known of it on prompts that it was not trained on.

    Attributes:
        base: the encoder that it was trained from, and the prompts as it reads them.
        probe: the student, as it is served.
        unseen: see `TrainedProbe.unseen`.
        layer: the layer after which it decides: none.

    """

    base: StudentBase
    probe: Student
    unseen: Tensor
    layer: int = 0

    def asked(self, prompts: Ints) -> Bools:
        """[prompts], whether it is asked: whether a prompt has text of its own."""
        return np.array([bool(self.base.texts[prompt]) for prompt in prompts.tolist()])

    def scores(self, prompts: Ints, subsets: Tensor | None) -> Tensor:
        """Scores of the labels for `prompts`, see `LabelHead.score`; 0 where it is not asked."""
        texts = [self.base.texts[prompt] for prompt in prompts.tolist()]
        asked = torch.from_numpy(self.asked(prompts))
        scores = torch.zeros(len(prompts), len(self.probe.head.bias))
        if asked.any():
            own = None if subsets is None else subsets[asked]
            scores[asked] = self.probe.score([text for text in texts if text], own)
        return scores


def train_student(base: StudentBase, lesson: Lesson) -> TrainedStudent:
    """Train the encoder of `base`, which has read all prompts, and a head."""

    def net() -> Net[TextEncoder]:
        encoder = TextEncoder(copy.deepcopy(base.model))
        # Half of a small encoder, and a few hundred texts have few of its words.
        encoder.model.get_input_embeddings().requires_grad_(False)
        return Net(encoder, base.model.config.hidden_size, lesson.taught)

    texts = [base.texts[one] for one in lesson.prompts.tolist()]
    training = Training("a student", EPOCHS, LEARNING_RATE, lesson.seed)
    trained = train(net, texts, lesson, training)
    return TrainedStudent(base, Student(trained.encoder, trained.head), trained.unseen)
