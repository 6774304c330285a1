"""Train a student: an encoder learns the scores that full depth gives the labels."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.progress import progress, say
from vllm_adainfer.policy.probe import LabelHead
from vllm_adainfer.policy.student import Student, TextEncoder

EPOCHS = 8
PATIENCE = 3  # epochs without progress on texts that it does not learn from
BATCH = 16
LEARNING_RATE = 5e-5
HEAD_LEARNING_RATE = 1e-3
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
SERVED_DTYPE = torch.bfloat16


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


def train_student(
    base: StudentBase, taught: Taught, prompts: Ints, unseen: Bools, label_ids: Tensor, seed: int
) -> TrainedStudent:
    """Train the encoder of `base` and a head; those of the epoch that is best on `unseen` are kept.

    Args:
        base: the encoder, and all prompts as it reads them.
        taught: what full depth says about the rows to learn from; what they read is not used.
        prompts: [rows], the prompt of each.
        unseen: [rows], those that are left out, to stop early and to judge the student.
        label_ids: int64 [labels].
        seed: the seed of the head, the order of the texts and dropout.

    """
    texts = [base.texts[prompt] for prompt in prompts.tolist()]
    readable = np.array([bool(text) for text in texts])
    learned, judged = np.flatnonzero(readable & ~unseen), np.flatnonzero(readable & unseen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _Net(base.model, taught.labels.shape[1] + (taught.mass is not None))
        best = _trained(net, texts, taught, learned, judged, seed)
    encoder = TextEncoder(best.encoder.model.to(SERVED_DTYPE).eval())
    weight, bias = best.head.weight.detach(), best.head.bias.detach()
    return TrainedStudent(base, Student(encoder, LabelHead(weight, bias, label_ids)), unseen)


class _Net(nn.Module):
    """An encoder with a head, as training sees them."""

    def __init__(self, model: Any, scores: int) -> None:
        super().__init__()
        self.encoder = TextEncoder(copy.deepcopy(model))
        # Half of a small encoder, and a few hundred texts have few of its words.
        self.encoder.model.get_input_embeddings().requires_grad_(False)
        self.head = nn.Linear(model.config.hidden_size, scores, dtype=torch.float32)

    def loss(self, texts: Sequence[Sequence[int]], taught: Taught, rows: Ints) -> Tensor:
        """The mean cross-entropy of some rows."""
        with torch.autocast("cpu", torch.bfloat16):
            read = self.encoder([texts[row] for row in rows.tolist()])
        return taught.of_rows(torch.from_numpy(rows)).cross_entropy(self.head(read))


def _trained(
    net: _Net,
    texts: Sequence[Sequence[int]],
    taught: Taught,
    learned: Ints,
    judged: Ints,
    seed: int,
) -> _Net:
    """The net of the epoch with the least cross-entropy of the rows `judged`."""
    order = np.random.default_rng(seed)
    steps = EPOCHS * math.ceil(len(learned) / BATCH)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in net.encoder.parameters() if p.requires_grad]},
        {"params": net.head.parameters(), "lr": HEAD_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), 1 - step / steps, 1.0)
    )
    time_needed = _minutes(net, texts, learned, steps)
    say(f"training a student on {len(learned)} prompts, for up to {time_needed}")
    best, least, since = net, math.inf, 0
    with progress(total=steps, desc="student") as bar:
        for _ in range(EPOCHS):
            net.train()
            for rows in _batches(order.permutation(learned)):
                loss = net.loss(texts, taught, rows)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.encoder.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                bar.update()
            error = _error(net, texts, taught, judged)
            if error < least:
                best, least, since = copy.deepcopy(net), error, 0
            else:
                since += 1
            if since == PATIENCE:
                break
    return best


@torch.no_grad()
def _error(net: _Net, texts: Sequence[Sequence[int]], taught: Taught, rows: Ints) -> float:
    """The mean cross-entropy of `rows`, without dropout."""
    net.eval()
    rows = rows[np.argsort([len(texts[row]) for row in rows.tolist()], kind="stable")]
    total = sum(len(batch) * float(net.loss(texts, taught, batch)) for batch in _batches(rows))
    return total / max(1, len(rows))


def _batches(rows: Ints) -> Iterator[Ints]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _minutes(net: _Net, texts: Sequence[Sequence[int]], learned: Ints, steps: int) -> str:
    """How long so many steps take, in words, from the time of one forward pass."""
    batch = [texts[row] for row in learned[:BATCH].tolist()]
    times = []
    for _ in range(2):  # the first may have to prepare something
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            net.encoder(batch).sum().backward()
        times.append(time.perf_counter() - start)
    net.zero_grad()
    minutes = math.ceil(min(times) * steps / 60)
    return f"{minutes} minute{'s' * (minutes > 1)}"
