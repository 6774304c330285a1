"""Train a small net to give labels the scores that full depth gives them.

Thresholds and the choice of exit points need many rows that the net has not seen: of answers that
would leave early, few are wrong. So each half of the rows is judged by a net that was trained on
the other one. The net that serves is trained on all of them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor, nn

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.probes import taught_by_full_depth
from vllm_adainfer.offline.calibration.record.rows import OwnStates
from vllm_adainfer.offline.progress import progress, say
from vllm_adainfer.policy.encoders import StateEncoder, TextEncoder
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.label_subsets import restrict

# A net overfits once the cross-entropy of inputs that it does not learn from is this much above its
# least. On some hundred inputs less is noise: nets of the epoch with the least answered up to a
# quarter fewer requests than those of the last one, whose learning rate has fallen to 0.
OVERFITS = 1.25
BATCH = 16
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
HEAD_LEARNING_RATE = 1e-3
# Classifiers read probabilities. Beyond this lead in score they are all near 1, so the most
# confident answers could no longer be ranked, and none would pass a threshold near 1.
LARGEST_LEAD = 3.0
LEADS_UP_TO = 0.95  # of the answers
SERVED_DTYPE = torch.bfloat16
STUDENT_EPOCHS, STUDENT_LEARNING_RATE = 8, 5e-5
BRANCH_EPOCHS, BRANCH_LEARNING_RATE = 15, 1e-3


class Net(nn.Module):
    """An encoder with a head, as training sees them; it reads inputs that have a length."""

    def __init__(self, encoder: StateEncoder | TextEncoder, taught: Taught) -> None:
        """Put an untrained head for what is `taught` on `encoder`."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, taught.labels.shape[1] + (taught.mass is not None))

    def score(self, inputs: Sequence[Any], rows: Ints) -> Tensor:
        """Scores of some rows, fp32 [rows, labels, and one for the mass if it is taught]."""
        with torch.autocast("cpu", torch.bfloat16):
            read = self.encoder([inputs[row] for row in rows.tolist()])
            scores: Tensor = self.head(read)
        return scores.float()


@dataclass(frozen=True)
class Lesson:
    """The rows that nets learn from.

    Attributes:
        taught: what full depth says about the rows; what they read is not used.
        prompts: [rows], the prompt of each.
        halves: [rows], 0 or 1: two halves, between which no group of prompts is torn.
        label_ids: int64 [labels].
        seed: the seed of heads, the order of the inputs and dropout.

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


def train_student(base: StudentBase, lesson: Lesson) -> TrainedProbe:
    """Train the encoder of `base`, which has read all prompts, and a head."""

    def encoder() -> TextEncoder:
        own = TextEncoder(copy.deepcopy(base.model))
        # Half of a small encoder, and a few hundred texts have few of its words.
        own.model.get_input_embeddings().requires_grad_(False)
        return own

    def texts(prompts: Ints) -> list[Sequence[int]]:
        return [base.texts[prompt] for prompt in prompts.tolist()]

    how = STUDENT_EPOCHS, STUDENT_LEARNING_RATE
    probe, unseen = train("a student", encoder, texts(lesson.prompts), lesson, *how)
    return TrainedProbe(0, probe, unseen, texts, base)


def branches_of(calibration: Calibration, states: OwnStates) -> tuple[TrainedProbe, ...]:
    """A branch for each layer of `states`, trained on the prompts that fit."""
    lesson = Lesson.of(calibration)
    return tuple(train_branch(layer, states, lesson) for layer in states.rows)


def train_branch(layer: int, states: OwnStates, lesson: Lesson) -> TrainedProbe:
    """Train a branch after `layer` on the prompts of `lesson`, given all prompts' `states`."""
    inputs = states.of(layer, lesson.prompts)
    name, encoder = f"a branch after layer {layer}", partial(StateEncoder, inputs[0].shape[1])
    probe, unseen = train(name, encoder, inputs, lesson, BRANCH_EPOCHS, BRANCH_LEARNING_RATE)
    return TrainedProbe(layer, probe, unseen, partial(states.of, layer))


def train(
    name: str,
    encoder: Callable[[], StateEncoder | TextEncoder],
    inputs: Sequence[Any],
    lesson: Lesson,
    epochs: int,
    learning_rate: float,
) -> tuple[Probe, Tensor]:
    """Train a probe on each half of the inputs, which the other half judges, and one on all.

    Returns the latter, as it serves, and `TrainedProbe.unseen`. `encoder` makes one to train;
    `inputs` are [rows of the lesson], and empty ones are left out. Each is seen at most `epochs`
    times. The learning rate is that of the encoder.
    """
    taught, halves = lesson.taught, lesson.halves
    everyone = np.flatnonzero([len(one) > 0 for one in inputs])
    low, high = (everyone[halves[everyone] == half] for half in (0, 1))
    steps = epochs * sum(map(_steps, (low, high, everyone)))

    def fresh() -> Net:
        torch.manual_seed(lesson.seed)
        return Net(encoder(), taught)

    with torch.random.fork_rng():
        time_needed = _minutes(fresh(), inputs, everyone, steps)
        say(f"training {name} on {len(everyone)} prompts, for up to {time_needed}")
        with progress(total=steps, desc="train") as bar:
            trainer = _Trainer(inputs, lesson, learning_rate, bar)
            first, kept = trainer.until_it_overfits(fresh(), low, high, epochs)
            second, more = trainer.until_it_overfits(fresh(), high, low, epochs)
            whole = fresh()
            for _ in trainer.epochs(whole, everyone, round((kept + more) / 2)):
                pass
    _done(whole)
    unseen = torch.zeros(len(inputs), len(whole.head.bias))
    for half, judged in ((first, high), (second, low)):
        if taught.mass is None:  # else the probabilities themselves are promised
            _soften(half, inputs, taught, judged)
        unseen[torch.from_numpy(judged)] = _scores(half, inputs, judged)
    if taught.mass is None:
        _soften(whole, inputs, taught, everyone)
    head = Head(whole.head.weight, whole.head.bias)
    served = whole.encoder.to(SERVED_DTYPE)
    return Probe(head, token_ids=lesson.label_ids, encoder=served, fused=False), unseen


class _Trainer:
    """Trains nets, one after the other; see `train` for what it takes."""

    def __init__(
        self, inputs: Sequence[Any], lesson: Lesson, learning_rate: float, bar: Any
    ) -> None:
        self._inputs, self._lesson, self._rate, self._bar = inputs, lesson, learning_rate, bar

    def until_it_overfits(
        self, net: Net, learned: Ints, judged: Ints, epochs: int
    ) -> tuple[Net, int]:
        """A net trained on rows `learned`, and its epochs; those `judged` show if it overfits."""
        best, kept, least = net, 0, math.inf
        for epoch, trained in enumerate(self.epochs(net, learned, epochs), 1):
            error = _error(trained, self._inputs, self._lesson.taught, judged)
            if error > OVERFITS * least:
                break
            if error < least:
                best, kept, least = copy.deepcopy(trained), epoch, error
        else:
            best, kept = net, epochs
        return _done(best), kept

    def epochs(self, net: Net, learned: Ints, epochs: int) -> Iterator[Net]:
        """Train `net` on rows `learned` so many times; yields it after each."""
        taught, order = self._lesson.taught, np.random.default_rng(self._lesson.seed)
        steps = epochs * _steps(learned)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in net.encoder.parameters() if p.requires_grad]},
            {"params": net.head.parameters(), "lr": HEAD_LEARNING_RATE},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self._rate, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (WARM_UP * steps), 1 - step / steps, 1.0)
        )
        for _ in range(epochs):
            net.train()
            for rows in _batches(order.permutation(learned)):
                scores = net.score(self._inputs, rows)
                loss = taught.of_rows(torch.from_numpy(rows)).cross_entropy(scores)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.encoder.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                self._bar.update()
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
    lead = taught.link.lead(restrict(_scores(net, inputs, rows), subsets))
    factor = LARGEST_LEAD / float(lead.quantile(LEADS_UP_TO).clamp(LARGEST_LEAD))
    net.head.weight.mul_(factor)
    net.head.bias.mul_(factor)


@torch.no_grad()
def _scores(net: Net, inputs: Sequence[Any], rows: Ints) -> Tensor:
    """`Net.score` of any number of `rows`."""
    found = torch.zeros(len(rows), len(net.head.bias))
    order = np.argsort([len(inputs[row]) for row in rows.tolist()], kind="stable")
    for places in _batches(order):
        found[torch.from_numpy(places)] = net.score(inputs, rows[places])
    return found


@torch.no_grad()
def _error(net: Net, inputs: Sequence[Any], taught: Taught, rows: Ints) -> float:
    """The mean cross-entropy of `rows`, without dropout."""
    net.eval()
    if not len(rows):
        return 0.0
    scores = _scores(net, inputs, rows)
    return float(taught.of_rows(torch.from_numpy(rows)).cross_entropy(scores))


def _batches(rows: Ints) -> Iterator[Ints]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _steps(rows: Ints) -> int:
    """The number of batches of one epoch."""
    return math.ceil(len(rows) / BATCH)


def _minutes(net: Net, inputs: Sequence[Any], learned: Ints, steps: int) -> str:
    """How long so many steps take, in words, from the time of one."""
    batch = [inputs[row] for row in learned[:BATCH].tolist()]
    times = []
    for _ in range(2):  # the first may have to prepare something
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            net.encoder(batch).sum().backward()
        times.append(time.perf_counter() - start)
    net.zero_grad()
    minutes = math.ceil(min(times) * steps / 60)
    return f"{minutes} minute{'s' * (minutes > 1)}"
