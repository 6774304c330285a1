"""Catching up: rows that wait run through the rest of the stack by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_adainfer.exits.batch import Batch, StackShape
from vllm_adainfer.exits.kv import KVPolicy
from vllm_adainfer.exits.layout import Ints, RowLayout
from vllm_adainfer.exits.step import StepContext
from vllm_adainfer.exits.work import StepWork


@dataclass(frozen=True)
class CatchUp:
    """Runs rows that would make the batch of a step too large if they joined it.

    Attributes:
        kv: keeps the rows that wait.
        shape: of the stack.
        max_rows: the most rows that run together.

    """

    kv: KVPolicy
    shape: StackShape
    max_rows: int

    def needed(self, leaving: Ints, waiting: Ints, step: StepContext) -> bool:
        """Whether the batch, without the requests `leaving`, is too large with `waiting` rows."""
        stay = step.layout.num_rows - int(step.layout.lens[leaving].sum())
        return stay + int(waiting.sum()) > self.max_rows

    def run(
        self, exit_index: int, waiting: Ints, batch: Batch, step: StepContext, work: StepWork
    ) -> None:
        """Run all waiting rows of some requests, before the batch of the step runs on.

        Rows below later exit points have earlier positions, so they run first. This builds
        attention metadata, so the batch of the step needs its own to be built again afterwards.

        Args:
            exit_index: the exit point that the batch has reached.
            waiting: [requests], rows that wait below it; 0 for requests that do not catch up.
            batch: of the step.
            step: the step.
            work: where the layers run are counted.

        """
        last = step.layout.last_positions - step.layout.lens
        others = np.flatnonzero(waiting == 0)
        parts: list[tuple[int, RowLayout]] = []
        for index in range(exit_index, self.shape.last_segment):
            lens = self.kv.waiting(index, step, others)
            if lens is not None:
                parts.append((index, RowLayout(lens, last)))
                last = last - lens
        for index, layout in reversed(parts):
            states = self.kv.rejoin(index, step, layout.lens)
            starts = range(0, layout.num_rows, self.max_rows)
            for start in starts:
                rows = slice(start, min(start + self.max_rows, layout.num_rows))
                chunk, chunk_states = batch.beside(layout.part(rows)), states.rows(rows)
                for segment in range(index + 1, self.shape.tail):
                    chunk_states = chunk.run(segment, chunk_states)
                if self.shape.own_kv_layers is None:
                    chunk.write_last_kv(chunk_states)
            below = sum(self.shape.segment_layers[index + 1 :])
            spared = self.shape.depth - self.shape.kv_layers
            taken = work.take(index, layout.present)
            work.ran_apart(taken, below - spared, len(starts), spared)
