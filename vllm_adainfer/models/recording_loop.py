"""The recording loop: every layer for every row, and the states in between to the recorder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_adainfer.decision.record import Recorder
from vllm_adainfer.models.segments import Segment, run_all
from vllm_adainfer.runtime.step import StepContext
from vllm_adainfer.stats import ExitStats


class RecordingLoop:
    """Stands where the `ExitLoop` stands while calibration data are collected."""

    monitor = None  # nobody is let go, so nobody is watched

    def __init__(self, segments: Sequence[Segment], recorder: Recorder) -> None:
        """`segments` are cut at ``recorder.layers``, so that the last is the final norm alone."""
        self.recorder = recorder
        self.stats = ExitStats()
        self._segments = segments
        self._depth = sum(segment.num_layers for segment in segments)

    def run_full_depth(self, positions: Tensor, input_ids: Tensor) -> Tensor:
        """All segments for all rows: profiling passes, which belong to no request."""
        return run_all(self._segments, positions, input_ids)

    def run(
        self, positions: Tensor, input_ids: Tensor, step: StepContext
    ) -> tuple[Tensor, None, None]:
        """Run and record one step; see `ExitLoop.run`. Nobody leaves, so there are no answers."""
        hidden, residual = input_ids, None
        states = []
        for segment in self._segments:
            hidden, residual = segment(positions, hidden, residual)
            if residual is not None:
                states.append(hidden + residual)
        tags, last = step.tags_by_row(), step.sampled_by_row()
        self.recorder.record(states, torch.from_numpy(tags), positions, torch.from_numpy(last))
        stats, work = self.stats, positions.shape[0] * self._depth
        stats.layers_run += work
        stats.layers_possible += work
        stats.tokens_decided += step.num_sampled
        stats.exit_histogram[self._depth] += step.num_sampled
        return hidden, None, None
