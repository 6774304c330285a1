"""Students of several sizes, trained from one encoder: a policy takes one of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.calibration import TrainedProbe
from vllm_adainfer.offline.calibration.fit.course import Course
from vllm_adainfer.offline.calibration.fit.training import (
    Halves,
    Lesson,
    train_halves,
    train_whole,
)
from vllm_adainfer.policy.text_encoders import BagEncoder, LayersEncoder, TextEncoder

FIRST_LAYERS = 3
STUDENT_EPOCHS, STUDENT_LEARNING_RATE, STUDENT_BATCH = 8, 7e-5, 32
BAG_EPOCHS, BAG_LEARNING_RATE = 30, 1e-3


@dataclass(frozen=True)
class TriedStudent:
    """A student of one size, with the exit points that were chosen beside it.

    Attributes:
        size: `TrainedProbe.name`.
        seconds: its time for a prompt on this machine.
        layers_saved: of the prompts that fit, by it and the exit points; without it, if it costs
            more than it saves.
        expected: the expected time of a prompt, in seconds.

    """

    size: str
    seconds: float
    layers_saved: float
    expected: float

    def in_words(self) -> str:
        """One line."""
        return (
            f"a student of {self.size}: {self.seconds * 1e3:.2f} ms a prompt, "
            f"{self.layers_saved:.1%} of the layers saved with its exit points, "
            f"{self.expected * 1e3:.2f} ms expected for a prompt"
        )


def bag_of(base: StudentBase) -> Course:
    """A bag of the encoder's tokens; its course has no inputs yet."""
    words = base.model.get_input_embeddings().weight
    return Course(
        "a bag of tokens", lambda: BagEncoder(words.detach()), (), BAG_EPOCHS, BAG_LEARNING_RATE
    )


def layers_of(base: StudentBase, count: int | None = None) -> Course:
    """The first `count` layers of the encoder, None for all; its course has no inputs yet."""

    def encoder() -> TextEncoder:
        if count is None:
            own = LayersEncoder(copy.deepcopy(base.model))
        else:
            own = LayersEncoder.first_layers(base.model, count)
        # Half of a small encoder, and a few hundred texts have few of its words.
        own.embedding.requires_grad_(False)
        return own

    name = "the whole encoder" if count is None else f"its first {count} layers"
    return Course(name, encoder, (), STUDENT_EPOCHS, STUDENT_LEARNING_RATE, STUDENT_BATCH)


def sizes_of(base: StudentBase) -> list[Course]:
    """A course for each size, the smallest first; they have no inputs yet."""
    depth = getattr(base.model.config, "num_hidden_layers", 0)
    fewer = [layers_of(base, FIRST_LAYERS)] if depth > FIRST_LAYERS else []
    return [bag_of(base), *fewer, layers_of(base)]


@dataclass(frozen=True)
class HalfTrained:
    """A student whose nets have seen one half each of what fits: enough to choose by.

    Attributes:
        judged: it as far as it is known; its probe is that of one half.
        halves: how far it is trained.

    """

    judged: TrainedProbe
    halves: Halves

    def finished(self) -> TrainedProbe:
        """It, trained on all that fits."""
        return replace(self.judged, probe=train_whole(self.halves))


def half_students(
    base: StudentBase, lesson: Lesson, sizes: Sequence[Course] = ()
) -> list[HalfTrained]:
    """Train students of `sizes` (none: of all) on either half; `base` has read all prompts."""
    sizes = sizes or sizes_of(base)

    def texts(prompts: Ints) -> list[Sequence[int]]:
        return [base.texts[prompt] for prompt in prompts.tolist()]

    read = texts(lesson.prompts)
    courses = [replace(one, name=f"a student of {one.name}", inputs=read) for one in sizes]
    found = []
    for size, halves in zip(sizes, train_halves(courses, lesson), strict=True):
        probe = halves.probe()
        assert isinstance(probe.encoder, TextEncoder)
        described = base.described.model_copy(update={"hidden_size": probe.encoder.width})
        own = replace(base, described=described)
        judged = TrainedProbe(0, probe, halves.unseen, texts, own, size.name)
        found.append(HalfTrained(judged, halves))
    return found


def train_students(
    base: StudentBase, lesson: Lesson, sizes: Sequence[Course] = ()
) -> list[TrainedProbe]:
    """Train a student of each of `sizes` (none: of all), which has read all prompts, and a head."""
    return [one.finished() for one in half_students(base, lesson, sizes)]
