"""Train a small net to give labels the scores that full depth gives them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.progress import progress, say

# A net overfits once the cross-entropy of inputs that it does not learn from is this much above its
# least. On some hundred inputs less is noise: nets of the epoch with the least answered up to a
# quarter fewer requests than those of the last one, whose learning rate has fallen to 0.
OVERFITS = 1.25
BATCH = 16
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
HEAD_LEARNING_RATE = 1e-3
# Classifiers read probabilities. Beyond this lead in score they are all near 1, so that the surest
# answers would be told apart no more, and none of them could pass a threshold close to 1.
LARGEST_LEAD = 3.0
LEADS_UP_TO = 0.95  # of the answers
SERVED_DTYPE = torch.bfloat16

E = TypeVar("E", bound=nn.Module)


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        name: what it is, in words.
        epochs: times that it sees each input, at most.
        learning_rate: of the encoder.
        seed: the seed of the head, the order of the inputs and dropout.

    """

    name: str
    epochs: int
    learning_rate: float
    seed: int


class Net(nn.Module, Generic[E]):
    """An encoder with a head, as training sees them.

    Attributes:
        encoder: reads a sequence of inputs, each with a length: fp32 [inputs, width].
        head: scores the labels.

    """

    encoder: E

    def __init__(self, encoder: E, width: int, taught: Taught) -> None:
        """Put an untrained head for what is `taught` on `encoder`, which gives this `width`."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, taught.labels.shape[1] + (taught.mass is not None))

    def loss(self, inputs: Sequence[Any], taught: Taught, rows: Ints) -> Tensor:
        """The mean cross-entropy of some rows."""
        with torch.autocast("cpu", torch.bfloat16):
            read = self.encoder([inputs[row] for row in rows.tolist()])
        return taught.of_rows(torch.from_numpy(rows)).cross_entropy(self.head(read))


def train(
    encoder: E,
    width: int,
    inputs: Sequence[Any],
    taught: Taught,
    unseen: Bools,
    training: Training,
) -> Net[E]:
    """Train `encoder` and a head; those of the last epoch are returned.

    If they begin to overfit, it stops there, and those of the epoch that is best on `unseen` are.

    Args:
        encoder: see `Net`.
        width: the width of what it gives.
        inputs: [rows]; empty ones are left out.
        taught: what full depth says about the rows; what they read is not used.
        unseen: [rows], those that it does not learn from, to stop early.
        training: how.

    """
    readable = np.array([len(one) > 0 for one in inputs])
    learned, judged = np.flatnonzero(readable & ~unseen), np.flatnonzero(readable & unseen)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        best = _trained(Net(encoder, width, taught), inputs, taught, learned, judged, training)
    if taught.mass is None:  # else the probabilities themselves are promised
        _soften(best, inputs, taught, judged)
    return best


def _trained(
    net: Net[E],
    inputs: Sequence[Any],
    taught: Taught,
    learned: Ints,
    judged: Ints,
    training: Training,
) -> Net[E]:
    """The net, trained until it overfits by the cross-entropy of the rows `judged`."""
    order = np.random.default_rng(training.seed)
    steps = training.epochs * math.ceil(len(learned) / BATCH)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in net.encoder.parameters() if p.requires_grad]},
        {"params": net.head.parameters(), "lr": HEAD_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), 1 - step / steps, 1.0)
    )
    time_needed = _minutes(net, inputs, learned, steps)
    say(f"training {training.name} on {len(learned)} prompts, for up to {time_needed}")
    best, least = net, math.inf
    with progress(total=steps, desc="train") as bar:
        for _ in range(training.epochs):
            net.train()
            for rows in _batches(order.permutation(learned)):
                loss = net.loss(inputs, taught, rows)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.encoder.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                bar.update()
            error = _error(net, inputs, taught, judged)
            if error > OVERFITS * least:
                net = best
                break
            if error < least:
                best, least = copy.deepcopy(net), error
    return net.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def _soften(net: Net[E], inputs: Sequence[Any], taught: Taught, rows: Ints) -> None:
    """Divide the scores so that few of the answers for `rows` lead by more than `LARGEST_LEAD`.

    The best label stays the best.
    """
    leads = []
    for batch in _batches(rows):
        read = net.encoder([inputs[row] for row in batch.tolist()])
        subsets = None if taught.subsets is None else taught.subsets[torch.from_numpy(batch)]
        best, second = restrict(net.head(read), subsets).topk(2).values.unbind(1)
        leads.append(best - second)
    if leads:
        factor = LARGEST_LEAD / float(torch.cat(leads).quantile(LEADS_UP_TO).clamp(LARGEST_LEAD))
        net.head.weight.mul_(factor)
        net.head.bias.mul_(factor)


@torch.no_grad()
def _error(net: Net[Any], inputs: Sequence[Any], taught: Taught, rows: Ints) -> float:
    """The mean cross-entropy of `rows`, without dropout."""
    net.eval()
    rows = rows[np.argsort([len(inputs[row]) for row in rows.tolist()], kind="stable")]
    total = sum(len(batch) * float(net.loss(inputs, taught, batch)) for batch in _batches(rows))
    return total / max(1, len(rows))


def _batches(rows: Ints) -> Iterator[Ints]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _minutes(net: Net[Any], inputs: Sequence[Any], learned: Ints, steps: int) -> str:
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
