"""Whole prompts, as pooled policies read them: the mean state of a prompt at each exit point."""

from __future__ import annotations

import adainfer_kernels
import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.step import NOBODY, StepContext


class CarriedSums:
    """Sums over the rows of prompts of which a chunk is still to come."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, Tensor]] = {}  # by request, then exit point: [hidden size]
        self._ends: dict[str, int] = {}

    def end(self, request_id: str) -> int | None:
        """The position after the last row in the sums; None if no rows of the request are."""
        return self._ends.get(request_id)

    def put(self, request_id: str, exit_index: int, sums: Tensor) -> None:
        """Keep a request's sums at an exit point."""
        self._sums.setdefault(request_id, {})[exit_index] = sums

    def get(self, request_id: str, exit_index: int) -> Tensor:
        """What `put` kept."""
        return self._sums[request_id][exit_index]

    def step_ended(self, step: StepContext) -> None:
        """The sums of chunks that were pooled now have the rows of this step.

        Those of complete prompts are dropped, and those of prompts that ran without being pooled,
        as where other weights were being loaded.
        """
        for request_id in [one for one in step.request_ids if one in self._sums]:
            place = step.request_ids.index(request_id)
            was_pooled = step.pooled_from is not None and step.pooled_from[place] >= 0
            if was_pooled and not step.yields_token[place]:
                self._ends[request_id] = int(step.layout.last_positions[place]) + 1
            else:
                self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended or starts again, or its prompt is complete."""
        self._sums.pop(request_id, None)
        self._ends.pop(request_id, None)

    def clear(self) -> None:
        """Forget all requests."""
        self._sums.clear()
        self._ends.clear()


class PooledPrompts:
    """The prompts of one step that pooled policies read.

    Attributes:
        chunks: requests whose prompts have rows to pool here, and go on in a later step.

    """

    def __init__(self, step: StepContext, carried: CarriedSums) -> None:
        """`carried` has the sums of earlier chunks, and gets those of this step."""
        self._step, self._carried = step, carried
        self.chunks = NOBODY
        if step.pooled_from is None:
            return
        counts = np.maximum(step.layout.last_positions + 1 - step.pooled_from, 0)
        # Of each request, the rows to pool: all so far, and those of this step.
        self._counts: Ints = np.where(step.pooled_from >= 0, counts, 0)
        self._lens: Ints = np.minimum(self._counts, step.layout.query_lens)
        self.chunks = np.flatnonzero((self._lens > 0) & ~step.yields_token)

    def read(
        self, exit_index: int, requests: Ints, chunks: Ints, layout: RowLayout, states: HiddenStates
    ) -> Tensor:
        """What pooled policies read of `requests` at an exit point.

        Args:
            exit_index: the exit point.
            requests: complete prompts.
            chunks: prompts with more chunks to come, whose sums are carried on.
            layout: the rows of the batch, in which all rows of these requests still are.
            states: theirs.

        Returns:
            fp32 [requests, 2 x hidden size]: the normed state of the last token, then the mean of
            the normed states.

        """
        pooled = np.union1d(requests, chunks)
        ends, lens, counts = layout.ends[pooled], self._lens[pooled], self._counts[pooled]
        places = np.searchsorted(pooled, requests)
        starts_on_device, ends_on_device, counts_on_device, places_on_device = self._step.on_device(
            ends - lens, ends, counts, places
        )
        result = adainfer_kernels.pool(
            states.hidden,
            states.residual,
            starts_on_device,
            ends_on_device,
            self._sums_of_earlier_chunks(exit_index, pooled, states),
        )
        for request in chunks.tolist():
            place = int(np.searchsorted(pooled, request))
            # A copy, which keeps no larger tensor alive.
            self._carried.put(
                self._step.request_ids[request], exit_index, result.sums[place].clone()
            )
        read = torch.cat([result.last, result.sums / counts_on_device.unsqueeze(1)], dim=1)
        return read if np.array_equal(requests, pooled) else read.index_select(0, places_on_device)

    def _sums_of_earlier_chunks(
        self, exit_index: int, requests: Ints, states: HiddenStates
    ) -> Tensor | None:
        """fp32 [requests, hidden size]; None if all of them are in their first chunk."""
        continued = np.flatnonzero(self._counts[requests] > self._lens[requests])
        if not continued.size:
            return None
        sums = states.hidden.new_zeros(len(requests), states.hidden.shape[1], dtype=torch.float32)
        for place in continued.tolist():
            request_id = self._step.request_ids[requests[place]]
            sums[place] = self._carried.get(request_id, exit_index)
        return sums
