"""The recording loop: all rows run all layers, and the recorder gets the states in between."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.exits.accounting.clock import Clock
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.layers import LayerAccounting
from vllm_adainfer.exits.batch.batch import Batch, StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.loop import Loop, StepOutput
from vllm_adainfer.exits.loop.pooling import PooledPrompts
from vllm_adainfer.exits.loop.step import NOBODY, StepContext
from vllm_adainfer.exits.recording.recorder import Recorder, StateFiles
from vllm_adainfer.settings.engine import NO_POLICY

REHEARSALS = 20  # steps in which exits are rehearsed


@dataclass
class Timings:
    """The time of steps at full depth, and of rehearsed exits.

    Attributes:
        layer_seconds: time in decoder layers.
        layers_run: token-layers executed in that time.
        cut_seconds: time to compact batches, in rehearsals.
        rows: token rows of the steps with a rehearsal.
        pool_seconds: time to read whole prompts, at all exit points.
        pooled_rows: token rows of the steps in which that was done, once for each exit point.
        between: time of the host from the end of one step's layers to the next step's.
        fewer: for batches compacted once, twice and three times: their share of the step's rows,
            and the share of its time that the same layers took.

    """

    layer_seconds: float = 0.0
    layers_run: int = 0
    cut_seconds: float = 0.0
    rows: int = 0
    pool_seconds: float = 0.0
    pooled_rows: int = 0
    between: list[float] = field(default_factory=list)
    fewer: list[list[tuple[float, float]]] = field(default_factory=lambda: [[], [], []])

    def as_dict(self) -> dict[str, Any]:
        """The time of one token row: in a layer, to be cut and to be pooled; and of steps."""
        return {
            "layer_seconds": self.layer_seconds / self.layers_run,
            "cut_seconds": self.cut_seconds / max(1, self.rows),
            "pool_seconds": self.pool_seconds / max(1, self.pooled_rows),
            "between_seconds": statistics.median(self.between or [0.0]),
            "fewer": self.fewer,
        }


class RecordingLoop(Loop):
    """Runs all requests at full depth while calibration data are collected."""

    def __init__(
        self,
        shape: StackShape,
        recorder: Recorder,
        keeps_states: bool = False,
        reads_prompts: bool = False,
    ) -> None:
        """Run a stack that is cut at ``recorder.layers``: its last segment is the final norm.

        `keeps_states` says that layers keep a recurrent state: a row must not run twice.
        `reads_prompts`: the recorder also gets the mean of each prompt, see `PooledPrompts`.
        """
        super().__init__()
        self.recorder = recorder
        self._keeps_states = keeps_states
        self._reads_prompts = reads_prompts
        self.timings = Timings()
        self._ended: float | None = None  # when the layers of the last step had run
        self.kv = ExactKV()
        self._depth = shape.depth
        # The first segment with layers; another comes before it where the embedding is recorded.
        self._first = 0 if shape.segment_layers[0] else 1
        self.reset_counters()

    @override
    def reset_counters(self) -> None:
        self.stats = ExitStats()
        self._accounting = LayerAccounting(self.stats, (NO_POLICY,))

    @override
    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run and record one step; it gives no early answers."""
        rows, clock = step.layout.num_rows, clock_of(step)
        if self._ended is not None:
            self.timings.between.append(clock.now() - self._ended)
        states = HiddenStates(input_ids)
        rehearses = len(self.timings.fewer[0]) < REHEARSALS
        recorded, means = [], {}
        prompts = PooledPrompts(step, self.carried)
        files = self.recorder.files
        for segment, layer in enumerate(self.recorder.layers):
            if rehearses and segment == self._first:
                before = states.clone()  # which the layers may overwrite
            start = clock.now()
            states = batch.run(segment, states)
            self.timings.layer_seconds += clock.now() - start
            stream = states.combined()[:rows]  # without padding
            # A single part is the segment's own memory, which CUDA graphs overwrite.
            recorded.append(stream.clone() if states.residual is None else stream)
            if files is not None and layer in files.layers:
                self._keep_states(segment, prompts, states, step, files)
            elif self._reads_prompts and segment < len(self.recorder.layers) - 1:
                means[layer] = self._mean(segment, prompts, states, step)
        self.carried.step_ended(step)
        final = batch.run(len(self.recorder.layers), states).hidden
        assert step.record_rows is not None, "the engine records"
        record_rows, positions, last = step.on_device(
            step.record_rows[step.layout.row_requests],
            step.layout.positions,
            self._decision_rows(step),
        )
        self.recorder.record(recorded, record_rows, positions, last, means)
        if rehearses:
            final = final.clone()  # likewise
            self._rehearse_exits(batch, before, states, step)
        policies, accounting, depth = np.zeros(rows, dtype=np.int64), self._accounting, self._depth
        tokens = accounting.tokens(policies)
        accounting.submitted(tokens, depth)
        accounting.ran(tokens, depth)
        accounting.decided(policies[: step.num_sampled], depth)
        self.stats.tokens_decided += step.num_sampled
        self.timings.layers_run += rows * depth
        self._ended = clock.now()
        return StepOutput(final, sampled_lens=step.sampled_lens)

    def _decision_rows(self, step: StepContext) -> Bools:
        """Whether each row decides an answer, or a field of one, [rows]."""
        if step.guess_rows is None:
            return step.sampled_rows()
        rows, requests = np.zeros(step.layout.num_rows, dtype=np.bool_), self._decided(step)
        if requests.size:
            rows[step.field_rows(requests, step.layout).ravel()] = True
        return rows

    def _decided(self, step: StepContext) -> Ints:
        """The recorded requests that are decided in a step."""
        assert step.record_rows is not None
        decided = step.yields_token & (step.record_rows >= 0)
        return np.flatnonzero(decided if step.guessed is None else decided & step.guessed)

    def _mean(
        self, exit_index: int, prompts: PooledPrompts, states: HiddenStates, step: StepContext
    ) -> Tensor:
        """fp32 [decision rows, hidden size], see `Recorder.record`."""
        assert step.pooled_from is not None
        decisions = self._decided(step)
        whole = np.flatnonzero(step.pooled_from[decisions] >= 0)
        size = states.hidden.shape[1]
        means = states.hidden.new_full((len(decisions), size), torch.nan, dtype=torch.float32)
        requests, clock = decisions[whole], clock_of(step)
        start = clock.now()
        if requests.size or prompts.chunks.size:
            read = prompts.read(exit_index, requests, prompts.chunks, step.layout, states)
            self.timings.pool_seconds += clock.now() - start
            self.timings.pooled_rows += step.layout.num_rows
            [places] = step.on_device(whole)
            means[places] = read[:, size:]
        if step.guess_rows is not None and decisions.size:
            return means.repeat_interleave(len(step.guess_rows[decisions[0]]), dim=0)
        return means

    def _keep_states(
        self,
        exit_index: int,
        prompts: PooledPrompts,
        states: HiddenStates,
        step: StepContext,
        files: StateFiles,
    ) -> None:
        """Write the states of prompts that are complete and of which every row ran."""
        assert step.record_rows is not None
        assert step.pooled_from is not None
        whole = step.yields_token & (step.record_rows >= 0) & (step.pooled_from >= 0)
        requests, layer = np.flatnonzero(whole), self.recorder.layers[exit_index]
        rows, lens = prompts.read_states(
            exit_index, lambda read: read, requests, prompts.chunks, step.layout, states
        )
        files.add(layer, rows)
        if layer == files.layers[-1]:
            files.added(step.record_rows[requests], lens)

    def _rehearse_exits(
        self, batch: Batch, before: HiddenStates, states: HiddenStates, step: StepContext
    ) -> None:
        """Time what an exit point does when half of the requests leave, and layers without them.

        The step is over, and its first layers write the same keys and values once more, from the
        states `before` them. Recurrent states would change, so only requests that need theirs no
        more take part. `states` are those after the last layer.
        """
        assert step.record_rows is not None
        requests = np.flatnonzero(step.yields_token & (step.record_rows >= 0))
        going_on = step.going_on() if self._keeps_states else NOBODY
        requests, layout = np.setdiff1d(requests, going_on), step.layout
        if requests.size < 2:
            return
        if going_on.size:
            layout, stay = _without(going_on, layout, step)
            before, states = before.rows(stay), states.rows(stay)
            batch = batch.compact(layout)
        clock = clock_of(step)
        rows, full = layout.num_rows, self._time_first_layers(batch, before, clock)
        for fewer in self.timings.fewer:
            if requests.size < 2:
                return
            start = clock.now()
            layout, stay = _without(requests[::2], layout, step)
            requests = requests[1::2]
            states, batch = states.rows(stay), batch.compact(layout)
            if fewer is self.timings.fewer[0]:
                self.timings.cut_seconds += clock.now() - start
                self.timings.rows += rows
            before = before.rows(stay)
            seconds = self._time_first_layers(batch, before, clock)
            fewer.append((layout.num_rows / rows, seconds / full))

    def _time_first_layers(self, batch: Batch, before: HiddenStates, clock: Clock) -> float:
        """Time that the first segment with layers takes with a batch's rows, in seconds."""
        times = []
        for _ in range(2):  # the first run with so many rows may have to prepare something
            given = before.clone()
            start = clock.now()
            batch.run(self._first, given)
            times.append(clock.now() - start)
        return min(times)


def _without(leaving: Ints, layout: RowLayout, step: StepContext) -> tuple[RowLayout, Tensor]:
    """The layout without the requests `leaving`, and the rows that stay, on the device."""
    layout, rows = layout.regroup(leaving)
    return layout, step.on_device(rows)[0]


def clock_of(step: StepContext) -> Clock:
    """The clock of the device that runs a step."""
    return Clock(step.device, torch.get_num_threads())
