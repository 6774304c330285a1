"""What a net is trained by: how it begins, what it reads, and how often."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.fit.distil import Taught
from vllm_adainfer.offline.calibration.fit.net import BATCH, Net, steps_of
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.text_encoders import TextEncoder

SEEDED = threading.Lock()  # nets begin one after the other, with the same random numbers


@dataclass(frozen=True)
class Course:
    """A net to train.

    Attributes:
        name: what it is.
        encoder: makes an encoder to train.
        inputs: [rows of the lesson], what it reads of each; empty ones are left out.
        epochs: how often it sees each of them, at most.
        learning_rate: that of the encoder.
        batch: how many inputs it learns from in one step.

    """

    name: str
    encoder: Callable[[], StateEncoder | TextEncoder]
    inputs: Sequence[Any]
    epochs: int
    learning_rate: float
    batch: int = BATCH

    @property
    def everyone(self) -> Ints:
        """The rows of the lesson that it reads."""
        return np.flatnonzero([len(one) > 0 for one in self.inputs])

    @property
    def steps(self) -> int:
        """The batches that its nets see at most, of both halves and of all."""
        return 2 * self.epochs * steps_of(self.everyone, self.batch)

    def fresh(self, taught: Taught, seed: int) -> Net:
        """An untrained net for what is `taught`, always the same."""
        with SEEDED:
            torch.manual_seed(seed)
            return Net(self.encoder(), taught)

    def step_seconds(self, taught: Taught, seed: int) -> float:
        """The time of one step of training."""
        net, times = self.fresh(taught, seed), []
        for _ in range(2):  # the first may have to prepare something
            start = time.perf_counter()
            net.score(self.inputs, self.everyone[: self.batch]).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)
