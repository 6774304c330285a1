"""The encoders that calibration trains: a student's, and those of branches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.training import Lesson, train
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.policy.branch import StateEncoder
from vllm_adainfer.policy.student import TextEncoder

STUDENT_EPOCHS, STUDENT_LEARNING_RATE = 8, 5e-5
BRANCH_EPOCHS, BRANCH_LEARNING_RATE = 15, 1e-3


def train_student(base: StudentBase, lesson: Lesson) -> TrainedProbe:
    """Train the encoder of `base`, which has read all prompts, and a head."""

    def encoder() -> TextEncoder:
        own = TextEncoder(copy.deepcopy(base.model))
        # Half of a small encoder, and a few hundred texts have few of its words.
        own.model.get_input_embeddings().requires_grad_(False)
        return own

    def texts(prompts: Ints) -> list[Sequence[int]]:
        return [base.texts[prompt] for prompt in prompts.tolist()]

    width = base.model.config.hidden_size
    probe, unseen = train(
        "a student",
        encoder,
        width,
        texts(lesson.prompts),
        lesson,
        STUDENT_EPOCHS,
        STUDENT_LEARNING_RATE,
    )
    return TrainedProbe(0, probe, unseen, texts, base)


def branches_of(calibration: Calibration, states: OwnStates) -> tuple[TrainedProbe, ...]:
    """A branch for each layer of `states`, trained on the prompts that fit."""
    lesson = Lesson.of(calibration)
    return tuple(train_branch(layer, states, lesson) for layer in states.rows)


def train_branch(layer: int, states: OwnStates, lesson: Lesson) -> TrainedProbe:
    """Train a branch after `layer` on the prompts of `lesson`, given all prompts' `states`."""
    inputs = states.of(layer, lesson.prompts)
    probe, unseen = train(
        f"a branch after layer {layer}",
        partial(StateEncoder, inputs[0].shape[1]),
        2 * BRANCH_WIDTH,
        inputs,
        lesson,
        BRANCH_EPOCHS,
        BRANCH_LEARNING_RATE,
    )
    return TrainedProbe(layer, probe, unseen, partial(states.of, layer))
