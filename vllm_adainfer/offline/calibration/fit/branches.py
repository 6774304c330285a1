"""Branches: after which layers a first look promises that one pays, and their training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.course import Course
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.offline.calibration.fit.training import Lesson, first_looks, train
from vllm_adainfer.offline.calibration.record.rows import OwnStates
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.promise.label_subsets import restrict

EPOCHS, LEARNING_RATE = 15, 1e-3
LOOK_EPOCHS = 5
AGREES_ENOUGH = 0.98  # a head that agrees with full depth this often leaves a branch few errors


def layers_to_branch(exits: Sequence[FittedExit]) -> list[int]:
    """The layers of the exit points where a branch has something to learn that the head misses."""
    return [
        exit.layer for exit in exits if exit.layer > 0 and exit.fitted.agrees.mean() < AGREES_ENOUGH
    ]


def promising(
    calibration: Calibration, exits: Sequence[FittedExit], states: OwnStates
) -> list[int]:
    """The layers of `states` after which a branch does no worse than the head, at a first look.

    It is trained on half of the prompts that fit, a third as long as others, and judged by the
    answers for the other half; that takes a twelfth of the time of a branch. The heads of `exits`
    have learnt from more of the prompts.
    """
    lesson, target, where = Lesson.of(calibration), calibration.target, calibration.fitted
    full = target.full_depth_of(calibration.rows, where).best
    heads = {exit.layer: exit.fitted.agrees for exit in exits if exit.probe.encoder is None}
    courses = courses_of(states, lesson, LOOK_EPOCHS)
    found = []
    for layer, (judged, scores) in zip(states.rows, first_looks(courses, lesson), strict=True):
        rows = torch.from_numpy(judged)
        named = restrict(scores, target.subsets_of(where[judged]))
        best = lesson.label_ids[target.promise.link.best(named[:, : len(lesson.label_ids)])]
        agrees = float((best == full[rows]).float().mean())
        if agrees >= float(np.mean(heads[layer][judged])):
            found.append(layer)
    return found


def branches_of(
    calibration: Calibration, states: OwnStates, layers: Sequence[int] | None = None
) -> tuple[TrainedProbe, ...]:
    """A branch after each of `layers` (None: of all that `states` has), trained on what fits."""
    if layers is not None:
        states = replace(states, rows={layer: states.rows[layer] for layer in layers})
    return train_branches(states, Lesson.of(calibration))


def train_branches(states: OwnStates, lesson: Lesson) -> tuple[TrainedProbe, ...]:
    """Train branches on the prompts of `lesson`, one for each layer of all prompts' `states`."""
    if not states.rows:
        return ()
    trained = train(courses_of(states, lesson, EPOCHS), lesson)
    return tuple(
        TrainedProbe(layer, probe, unseen, partial(states.of, layer))
        for layer, (probe, unseen) in zip(states.rows, trained, strict=True)
    )


def courses_of(states: OwnStates, lesson: Lesson, epochs: int) -> list[Course]:
    """A course for each layer of `states`."""
    courses = []
    for layer in states.rows:
        inputs = states.of(layer, lesson.prompts)
        encoder = partial(StateEncoder, inputs[0].shape[1])
        name = f"a branch after layer {layer}"
        courses.append(Course(name, encoder, inputs, epochs, LEARNING_RATE))
    return courses
