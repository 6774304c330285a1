"""Train a small net to give labels the scores that full depth gives them.

Thresholds and the choice of exit points need many rows that the net has not seen: of answers that
would leave early, few are wrong. So each half of the rows is judged by a net that was trained on
the other one. The net that serves is trained on all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor, nn

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.course import Course
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.net import (
    Net,
    mixed_batches,
    scores_of,
    steps_of,
)
from vllm_adainfer.offline.calibration.fit.probes import taught_by_full_depth
from vllm_adainfer.offline.calibration.fit.side_by_side import side_by_side
from vllm_adainfer.offline.progress import in_words, progress, say
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.text_encoders import TextEncoder
from vllm_adainfer.promise.label_subsets import restrict

# A net overfits once the cross-entropy of inputs that it does not learn from is this much above its
# least. On some hundred inputs less is noise: nets of the epoch with the least answered up to a
# quarter fewer requests than those of the last one, whose learning rate has fallen to 0.
OVERFITS = 1.25
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
HEAD_LEARNING_RATE = 1e-3
# Classifiers read probabilities. Beyond this lead in score they are all near 1, so the most
# confident answers could no longer be ranked, and none would pass a threshold near 1.
LARGEST_LEAD = 3.0
LEADS_UP_TO = 0.95  # of the answers
SERVED_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Lesson:
    """The rows that nets learn from.

    Attributes:
        taught: what full depth says about the rows; what they read is not used.
        prompts: [rows], the prompt of each.
        halves: [rows], 0 or 1: two halves, between which no group of prompts is torn.
        label_ids: int64 [labels].
        seed: the seed of heads and of the order of the inputs.

    """

    taught: Taught
    prompts: Ints
    halves: Ints
    label_ids: Tensor
    seed: int

    @classmethod
    def of(cls, calibration: Calibration) -> Lesson:
        """The rows of a calibration that fit."""
        rows, target, where = calibration.rows, calibration.target, calibration.fitted
        assert target.label_ids is not None, "students and branches score labels"
        return cls(
            taught_by_full_depth(rows, target, where, torch.empty(len(where), 0)),
            rows.prompts[where],
            calibration.split.units[rows.prompts[where]] % 2,
            target.label_ids,
            calibration.options.seed,
        )


def train(courses: Sequence[Course], lesson: Lesson) -> list[tuple[Probe, Tensor]]:
    """Train probes on each half of the inputs, which the other half judges, and on all.

    Returns of each course the latter, as it serves, and `TrainedProbe.unseen`. The nets of halves
    are trained side by side, and then those of all.
    """
    halves = train_halves(courses, lesson)
    wholes = train_wholes(halves)
    return [(whole, one.unseen) for whole, one in zip(wholes, halves, strict=True)]


def train_halves(courses: Sequence[Course], lesson: Lesson) -> list[Halves]:
    """Train a probe of each course on either half of the inputs, all side by side."""
    names = ", ".join(course.name for course in courses)
    prompts = max(len(course.everyone) for course in courses)
    with torch.random.fork_rng():
        time_needed = in_words(_seconds(courses, lesson))
        say(f"training {names} on {prompts} prompts, for up to {time_needed}")
        trainers = [_Trainer(course, lesson) for course in courses]
        with progress(total=sum(one.steps_of_halves for one in trainers), desc="halves") as bar:
            # The last courses, the largest, come first: no thread is left with one of them.
            largest = trainers[::-1]
            pieces = [partial(one.of_half, half, bar) for one in largest for half in (0, 1)]
            nets = iter([*side_by_side(pieces)])
        pairs = zip(largest, zip(nets, nets, strict=True), strict=True)
        return [Halves(trainer, pair) for trainer, pair in pairs][::-1]


def train_wholes(halves: Sequence[Halves]) -> list[Probe]:
    """Train a probe on all inputs for each of `halves`, side by side, as it serves."""
    with torch.random.fork_rng(), _training(halves) as bar:
        return [*side_by_side([partial(one.trainer.of_all, one.epochs, bar) for one in halves])]


def train_whole(half: Halves) -> Probe:
    """As `train_wholes`, for an encoder whose steps are large: on all threads."""
    with torch.random.fork_rng(), _training([half]) as bar:
        return half.trainer.of_all(half.epochs, bar)


def _training(halves: Sequence[Halves]) -> Any:
    """The bar of a training on all inputs."""
    return progress(total=sum(one.epochs * one.trainer.steps for one in halves), desc="train")


def first_looks(courses: Sequence[Course], lesson: Lesson) -> list[tuple[Ints, Tensor]]:
    """A net of each course, trained on one half alone: the rows of the other, and their scores."""
    with torch.random.fork_rng(), progress(desc="first look") as bar:
        trainers = [_Trainer(course, lesson) for course in courses]
        return [*side_by_side([partial(one.first_look, bar) for one in trainers])]


def _seconds(courses: Sequence[Course], lesson: Lesson) -> float:
    """How long `train` takes at most, from the time of one step of each course."""
    threads, steps = torch.get_num_threads(), [course.steps for course in courses]
    times = side_by_side(
        [partial(course.step_seconds, lesson.taught, lesson.seed) for course in courses]
    )
    half = sum(time * count for time, count in zip(times, steps, strict=True)) / 2
    return half / min(threads, 2 * len(courses)) + half / min(threads, len(courses))


class Halves:
    """The nets of a course that are trained on one half each.

    Attributes:
        epochs: how often a net that is trained on all is to see them.
        unseen: see `TrainedProbe.unseen`.

    """

    def __init__(self, trainer: _Trainer, nets: tuple[tuple[Net, int], tuple[Net, int]]) -> None:
        self.trainer = trainer
        self._first = nets[0][0]
        self.epochs = round(sum(kept for _, kept in nets) / 2)
        self.unseen = trainer.unseen(nets[0][0], nets[1][0])

    def probe(self) -> Probe:
        """That of one half, which takes as long as the one that serves; call it once."""
        return self.trainer.probe_of(self._first)


class _Trainer:
    """Trains the nets of a course, in whichever thread."""

    def __init__(self, course: Course, lesson: Lesson) -> None:
        self._course, self._lesson = course, lesson
        self._inputs, self._taught = course.inputs, lesson.taught
        self._everyone = course.everyone
        halves = lesson.halves[self._everyone]
        self._halves = [self._everyone[halves == half] for half in (0, 1)]
        self.steps = steps_of(self._everyone, course.batch)
        self.steps_of_halves = course.epochs * sum(
            steps_of(half, course.batch) for half in self._halves
        )

    def first_look(self, bar: Any) -> tuple[Ints, Tensor]:
        """The rows of one half, and what a net trained on the other says of them."""
        net, _ = self.of_half(0, bar)
        judged = self._halves[1]
        return judged, scores_of(net, self._inputs, judged)

    def of_half(self, half: int, bar: Any) -> tuple[Net, int]:
        """A net trained on one half of the inputs, as it judges the other, and its epochs."""
        learned, judged = self._halves[half], self._halves[1 - half]
        net, kept = self.until_it_overfits(
            self._course.fresh(self._taught, self._lesson.seed), learned, judged, bar
        )
        if self._taught.mass is None:  # else the probabilities themselves are promised
            _soften(net, self._inputs, self._taught, judged)
        return net, kept

    def unseen(self, first: Net, second: Net) -> Tensor:
        """What the nets of both halves say of the inputs that they have not seen."""
        unseen = torch.zeros(len(self._inputs), len(first.head.bias))
        for net, judged in ((first, self._halves[1]), (second, self._halves[0])):
            unseen[torch.from_numpy(judged)] = scores_of(net, self._inputs, judged)
        return unseen

    def of_all(self, epochs: int, bar: Any) -> Probe:
        """A probe trained on all inputs."""
        net = self._course.fresh(self._taught, self._lesson.seed)
        for _ in self.epochs(net, self._everyone, epochs, bar):
            pass
        _done(net)
        if self._taught.mass is None:
            _soften(net, self._inputs, self._taught, self._everyone)
        return self.probe_of(net)

    def probe_of(self, net: Net) -> Probe:
        """A trained net as a probe, as it serves."""
        head = Head(net.head.weight, net.head.bias)
        served: StateEncoder | TextEncoder = net.encoder.to(SERVED_DTYPE)
        if isinstance(served, TextEncoder):
            served = served.served(torch.device("cpu"))
        return Probe(head, token_ids=self._lesson.label_ids, encoder=served, fused=False)

    def until_it_overfits(self, net: Net, learned: Ints, judged: Ints, bar: Any) -> tuple[Net, int]:
        """A net trained on rows `learned`, and its epochs; those `judged` show if it overfits."""
        best, kept, least = net, 0, math.inf
        for epoch, trained in enumerate(self.epochs(net, learned, self._course.epochs, bar), 1):
            error = _error(trained, self._inputs, self._taught, judged)
            if error > OVERFITS * least:
                break
            if error < least:
                best, kept, least = copy.deepcopy(trained), epoch, error
        else:
            best, kept = net, self._course.epochs
        return _done(best), kept

    def epochs(self, net: Net, learned: Ints, epochs: int, bar: Any) -> Iterator[Net]:
        """Train `net` on rows `learned` so many times; yields it after each."""
        order = np.random.default_rng(self._lesson.seed)
        steps = epochs * steps_of(learned, self._course.batch)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in net.encoder.parameters() if p.requires_grad]},
            {"params": net.head.parameters(), "lr": HEAD_LEARNING_RATE},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=self._course.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (WARM_UP * steps), 1 - step / steps, 1.0)
        )
        for _ in range(epochs):
            for rows in mixed_batches(self._inputs, order, learned, self._course.batch):
                scores = net.score(self._inputs, rows)
                loss = self._taught.of_rows(torch.from_numpy(rows)).cross_entropy(scores)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.encoder.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                bar.update()
            yield net


def _done(net: Net) -> Net:
    return net.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def _soften(net: Net, inputs: Sequence[Any], taught: Taught, rows: Ints) -> None:
    """Divide the scores so that few of the answers for `rows` lead by more than `LARGEST_LEAD`.

    The best label stays the best.
    """
    if not len(rows):
        return
    subsets = None if taught.subsets is None else taught.subsets[torch.from_numpy(rows)]
    lead = taught.link.lead(restrict(scores_of(net, inputs, rows), subsets))
    factor = LARGEST_LEAD / float(lead.quantile(LEADS_UP_TO).clamp(LARGEST_LEAD))
    net.head.weight.mul_(factor)
    net.head.bias.mul_(factor)


@torch.no_grad()
def _error(net: Net, inputs: Sequence[Any], taught: Taught, rows: Ints) -> float:
    """The mean cross-entropy of `rows`."""
    if not len(rows):
        return 0.0
    scores = scores_of(net, inputs, rows)
    return float(taught.of_rows(torch.from_numpy(rows)).cross_entropy(scores))
