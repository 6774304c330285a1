"""The recording loop: every layer for every row, and the states in between to the recorder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.exits.batch import Batch, StackShape
from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.loop import Loop, StepOutput
from vllm_adainfer.exits.recorder import Recorder
from vllm_adainfer.exits.step import NOBODY, StepContext
from vllm_adainfer.settings.engine import NO_POLICY

REHEARSALS = 20  # steps with cuts that are rehearsed


@dataclass
class Timings:
    """The time that full depth has taken so far.

    Attributes:
        layer_seconds: in decoder layers.
        layers_run: rows x layers in that time.
        cut_seconds: in rehearsed cuts.
        rows: token rows of the steps with a cut.
        fewer: of batches cut once, twice and three times: what share of a step's rows they had, and
            what share of its time the same layers took with them.

    """

    layer_seconds: float = 0.0
    layers_run: int = 0
    cut_seconds: float = 0.0
    rows: int = 0
    fewer: list[list[tuple[float, float]]] = field(default_factory=lambda: [[], [], []])


class RecordingLoop(Loop):
    """Runs all requests at full depth while calibration data are collected."""

    defers = False

    def __init__(self, shape: StackShape, recorder: Recorder, keeps_states: bool = False) -> None:
        """The stack is cut at ``recorder.layers``: its last segment is the final norm alone.

        `keeps_states` says that layers keep a recurrent state, which would take a row twice that
        ran twice.
        """
        self.recorder = recorder
        self._keeps_states = keeps_states
        self.timings = Timings()
        self._depth = shape.depth
        self.reset_counters()

    @override
    def reset_counters(self) -> None:
        self.stats = ExitStats()

    @override
    def overdue(self) -> set[str]:
        return set()

    @override
    def tightened(self) -> None:
        return None

    @override
    def missing(self, request_id: str, end: int) -> int:
        return 0

    @override
    def forget(self, request_id: str) -> None:
        pass  # no rows of it wait

    @override
    def ended(self, request_id: str) -> None:
        pass  # nobody watches

    @override
    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run and record one step; it gives no early answers."""
        rows = step.layout.num_rows
        states = HiddenStates(input_ids)
        recorded = []
        for segment in range(len(self.recorder.layers)):
            start = _now(step)
            states = batch.run(segment, states)
            self.timings.layer_seconds += _now(step) - start
            stream = states.combined()[:rows]  # without padding
            # In one part it is the segment's own memory, which CUDA graphs overwrite.
            recorded.append(stream.clone() if states.residual is None else stream)
        final = batch.run(len(self.recorder.layers), states).hidden
        tags, positions, last = step.on_device(
            step.original_tags(), step.layout.positions, step.original_sampled()
        )
        self.recorder.record(recorded, tags, positions, last)
        if len(self.timings.fewer[0]) < REHEARSALS:
            final = final.clone()  # which the layers may overwrite
            self._rehearse_cuts(batch, HiddenStates(input_ids), states, step)
        self._count(rows, step.num_sampled)
        return StepOutput(final)

    def _count(self, rows: int, tokens: int) -> None:
        stats, work = self.stats, rows * self._depth
        self.timings.layers_run += work
        stats.passes_run += self._depth
        stats.passes_possible += self._depth
        stats.tokens_decided += tokens
        full_depth = stats.by_policy[NO_POLICY]
        full_depth.layers_run += work
        full_depth.layers_possible += work
        full_depth.exit_histogram[self._depth] += tokens

    def _rehearse_cuts(
        self, batch: Batch, ids: HiddenStates, states: HiddenStates, step: StepContext
    ) -> None:
        """Time what an exit point does when half of the requests leave, and layers without them.

        The step is over, and the first segment writes the keys and values that it has written.
        Recurrent states change, so only requests that need theirs no more take part.
        """
        going_on = step.going_on() if self._keeps_states else NOBODY
        step.settle(np.intersect1d(going_on, step.undecided()))
        if step.undecided().size < 2:
            return
        if going_on.size:
            stay = step.regroup(going_on)
            ids, states = ids.rows(stay), states.rows(stay)
            batch = batch.narrowed(step.layout)
        rows, full = step.layout.num_rows, self._first_segment(batch, ids, step)
        for fewer in self.timings.fewer:
            undecided = step.undecided()
            if undecided.size < 2:
                return
            start = _now(step)
            step.settle(undecided[::2])
            stay = step.regroup(step.ready())
            states, batch = states.rows(stay), batch.narrowed(step.layout)
            if fewer is self.timings.fewer[0]:
                self.timings.cut_seconds += _now(step) - start
                self.timings.rows += rows
            ids = ids.rows(stay)
            seconds = self._first_segment(batch, ids, step)
            fewer.append((step.layout.num_rows / rows, seconds / full))

    def _first_segment(self, batch: Batch, ids: HiddenStates, step: StepContext) -> float:
        """Seconds that it takes with a batch's rows."""
        times = []
        for _ in range(2):  # the first with so many rows may have something to prepare
            start = _now(step)
            batch.run(0, ids)
            times.append(_now(step) - start)
        return min(times)


def _now(step: StepContext) -> float:
    """Seconds, once the device has done what it was told so far."""
    if step.device.type != "cpu":
        torch.accelerator.synchronize(step.device)
    return time.perf_counter()
