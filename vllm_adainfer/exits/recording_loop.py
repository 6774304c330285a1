"""The recording loop: every layer for every row, and the states in between to the recorder."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.config import NO_POLICY
from vllm_adainfer.engine.segments import Stack
from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.exit_loop import StepOutput
from vllm_adainfer.exits.kv import ExactKV
from vllm_adainfer.exits.recorder import Recorder
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.step import StepContext
from vllm_adainfer.policy.monitor import Monitor


@dataclass
class Timings:
    """What full depth has cost so far.

    Attributes:
        layer_seconds: in decoder layers.
        layers_run: rows x layers in that time.
        cut_seconds: in rehearsed cuts.
        rows: token rows of the steps with a cut.

    """

    layer_seconds: float = 0.0
    layers_run: int = 0
    cut_seconds: float = 0.0
    rows: int = 0


class RecordingLoop:
    """Stands where the `ExitLoop` stands while calibration data are collected."""

    graphs = None

    def __init__(self, stack: Stack, recorder: Recorder) -> None:
        """`stack` is cut at ``recorder.layers``: its last segment is the final norm alone."""
        self.recorder = recorder
        self.kv = ExactKV()  # where nobody ever waits
        self.monitors: dict[str, Monitor] = {}  # nobody is let go, so nobody is watched
        self.timings = Timings()
        self.stack = stack
        self._depth = stack.depth
        self.reset_counters()

    def reset_counters(self) -> None:
        """See `ExitLoop.reset_counters`."""
        self.stats = ExitStats()

    def forget(self, request_id: str) -> None:
        """See `ExitLoop.forget`: nothing of it waits."""

    def ended(self, request_id: str) -> None:
        """See `ExitLoop.ended`: nobody watches."""

    def run(self, positions: Tensor, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run and record one step; see `ExitLoop.run`. Nobody leaves, so there are no answers."""
        rows = step.layout.num_rows
        stream = Stream(input_ids)
        states = []
        for index in range(len(self.recorder.layers)):
            start = _now(step)
            stream = self.stack.run(index, positions, stream)
            self.timings.layer_seconds += _now(step) - start
            states.append(stream.whole())
        final = self.stack.run(len(self.recorder.layers), positions, stream).hidden
        tags, last = step.tags_by_row(), step.sampled_by_row()
        tags_there, last_there = step.on_device(tags, last)
        states = [state[:rows] for state in states]  # without padding
        self.recorder.record(states, tags_there, positions[:rows], last_there)
        self._rehearse_cut(stream, step)
        stats, work = self.stats, rows * self._depth
        self.timings.layers_run += work
        stats.passes_run += self._depth
        stats.passes_possible += self._depth
        stats.tokens_decided += step.num_sampled
        own = stats.by_policy[NO_POLICY]
        own.layers_run += work
        own.layers_possible += work
        own.exit_histogram[self._depth] += step.num_sampled
        return StepOutput(final)

    def _rehearse_cut(self, stream: Stream, step: StepContext) -> None:
        """Time what an exit point does when half of the requests leave, now that it is over."""
        undecided = step.undecided()
        if undecided.size < 2:
            return
        start = _now(step)
        step.settle(undecided[::2])
        stay = step.regroup(step.ready())
        _ = stream.rows(stay), step.narrowed_to(step.layout)
        self.timings.cut_seconds += _now(step) - start
        self.timings.rows += stream.num_rows


def _now(step: StepContext) -> float:
    """Seconds, when the device has done what it was told so far."""
    if step.device.type != "cpu":
        torch.accelerator.synchronize(step.device)
    return time.perf_counter()
