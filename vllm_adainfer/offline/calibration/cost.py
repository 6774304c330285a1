"""Cost: the time of layers, cuts and probes on this machine, for choosing exit points."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.offline.calibration.probes import AnyProbe, read
from vllm_adainfer.policy.probe import Probe

ROUNDS = 20


@dataclass(frozen=True)
class Costs:
    """Measured times, in seconds.

    Attributes:
        depth: layers of the model.
        layer: one layer for one token row.
        cut: one exit point for one token row of a step: the boundary between two segments, and
            gathering the rows that go on.
        probe: layer -> the probe after it, for one prompt.
        head: the LM head for one row; 0 if an early answer needs it as well.

    """

    depth: int
    layer: float
    cut: float
    probe: Mapping[int, float]
    head: float = 0.0


def probe_seconds(probe: AnyProbe, states: Tensor, threads: int) -> float:
    """Time of `probe` for one prompt, when a step probes all `states` [prompts, hidden size].

    `threads` is the number of threads in the serving process.
    """
    return _seconds(lambda: read(probe, states), threads) / len(states)


def head_seconds(logit_lens: Probe, states: Tensor, threads: int) -> float:
    """Time of the LM head for one of `states` [rows, hidden size], computed all at once."""
    read, head = logit_lens.readout(states), logit_lens.head.weight
    return _seconds(lambda: torch.nn.functional.linear(read, head), threads) / len(states)


def _seconds(call: Callable[[], object], threads: int) -> float:
    times = []
    with _threads(threads):
        for _ in range(ROUNDS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
