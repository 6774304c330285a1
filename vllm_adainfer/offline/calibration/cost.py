"""Cost: the time of layers, cuts and probes on this machine, for choosing exit points."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.offline.calibration.bound import FloatArray
from vllm_adainfer.offline.calibration.probes import AnyProbe, read
from vllm_adainfer.policy.probe import Probe

ROUNDS = 20


@dataclass(frozen=True)
class Costs:
    """Measured times, in seconds.

    Attributes:
        depth: layers of the model.
        layer: one layer for one token row of a whole step.
        fewer: share of a step's rows -> share of its time that layers take with them, ascending.
            Where weights are read for whichever rows are left, fewer rows spare less than theirs.
        cut: one exit point for one token row of a step: the boundary between two segments, and
            gathering the rows that go on.
        probe: layer -> the probe after it, for one prompt.
        head: the LM head for one row; 0 if an early answer needs it as well.
        own_kv_layers: layers that write keys and values. Only rows that decide a token run others.

    """

    depth: int
    layer: float
    cut: float
    probe: Mapping[int, float]
    own_kv_layers: int
    head: float = 0.0
    fewer: tuple[tuple[float, float], ...] = ()

    def share_of_time(self, rows: FloatArray) -> FloatArray:
        """What layers take with shares of a step's `rows`, 0 to 1; none take nothing."""
        measured = np.array([(0.0, 0.0), *self.fewer, (1.0, 1.0)])
        shares: FloatArray = np.interp(rows, *measured.T)
        return shares


def shares_of_time(
    fewer: Sequence[Sequence[tuple[float, float]]],
) -> tuple[tuple[float, float], ...]:
    """`Costs.fewer` from the pairs of several steps, for each number of cuts.

    See `vllm_adainfer.exits.recording_loop.Timings`. Medians, and never falling with more rows.
    """
    medians = [np.median(np.array(pairs), axis=0) for pairs in reversed(fewer) if len(pairs)]
    times = np.maximum.accumulate([min(float(time), 1.0) for _, time in medians] or [1.0])
    rows = [float(share) for share, _ in medians]
    return tuple(zip(rows, times.tolist(), strict=False))


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
