"""Whole prompts, as pooled policies read them: the mean of their states, or each of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import adainfer_kernels
import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.branch_shapes import MOST_BRANCH_TOKENS
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.step import NOBODY, StepContext


class CarriedPrompts:
    """Partial reads of chunked prompts: running sums for pooled heads, states for branches.

    The policy that reads the request decides which of the two is kept at an exit point.
    """

    def __init__(self) -> None:
        self.read: dict[str, dict[int, Tensor]] = {}  # by request, then exit point
        self.ends: dict[str, int] = {}  # by request, the position after the last row that was read

    def step_ended(self, step: StepContext) -> None:
        """Partial reads of chunks that were read now include the rows of this step.

        That of complete prompts is dropped, and that of prompts that ran without being read, as
        where other weights were being loaded.
        """
        for request_id in [one for one in step.request_ids if one in self.read]:
            place = step.request_ids.index(request_id)
            was_pooled = step.pooled_from is not None and step.pooled_from[place] >= 0
            if was_pooled and not step.yields_token[place]:
                self.ends[request_id] = int(step.layout.last_positions[place]) + 1
            else:
                self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended or starts again, or its prompt is complete."""
        self.read.pop(request_id, None)
        self.ends.pop(request_id, None)

    def clear(self) -> None:
        """Forget all requests."""
        self.read.clear()
        self.ends.clear()


class PooledPrompts:
    """The prompts of one step that pooled policies read.

    `chunks` are requests whose prompts have rows to read here, and go on in a later step.
    """

    def __init__(self, step: StepContext, carried: CarriedPrompts) -> None:
        """`carried` has the partial reads of earlier chunks, and gets those of this step."""
        self._step, self._carried = step, carried
        self.chunks = NOBODY
        if step.pooled_from is None:
            return
        self._drafted = step.drafted  # rows behind the prompt
        ends = step.layout.last_positions + 1 - self._drafted
        # Of each request, the rows to read: all so far, and those of this step.
        self._counts: Ints = np.where(
            step.pooled_from >= 0, np.maximum(ends - step.pooled_from, 0), 0
        )
        self._lens: Ints = np.minimum(self._counts, step.layout.query_lens - self._drafted)
        self.chunks = np.flatnonzero((self._lens > 0) & ~step.yields_token)

    def read(
        self, exit_index: int, requests: Ints, chunks: Ints, layout: RowLayout, states: HiddenStates
    ) -> Tensor:
        """The input of pooled policies for `requests`, complete prompts, at an exit point.

        The sums of `chunks`, prompts with more chunks to come, are carried on. All rows of all
        these are still in the batch, which has `layout` and `states`. Returns fp32 [requests, 2 x
        hidden size]: the normed state of the last token, then the mean of the normed states.
        """
        pooled = np.union1d(requests, chunks)
        ends = layout.ends[pooled] - self._drafted[pooled]
        lens, counts = self._lens[pooled], self._counts[pooled]
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
            self._keep(request, exit_index, result.sums[place])
        read = torch.cat([result.last, result.sums / counts_on_device.unsqueeze(1)], dim=1)
        return read if np.array_equal(requests, pooled) else read.index_select(0, places_on_device)

    def read_states(
        self,
        exit_index: int,
        project: Callable[[Tensor], Tensor],
        requests: Ints,
        chunks: Ints,
        layout: RowLayout,
        states: HiddenStates,
    ) -> tuple[Tensor, Ints]:
        """The input of branches for `requests`: the last `MOST_BRANCH_TOKENS` tokens of each.

        Arguments as for `read`; `project` maps states [rows, hidden size] to what is kept of them,
        [rows, width]. Returns [tokens of all requests, width], and the tokens of each, [requests].
        """
        wanted = np.union1d(requests, chunks)
        lens = np.minimum(self._lens[wanted], MOST_BRANCH_TOKENS)
        ends = layout.ends[wanted] - self._drafted[wanted]
        before = ends - np.cumsum(lens)  # rows that others have there
        [rows] = self._step.on_device(np.arange(lens.sum()) + np.repeat(before, lens))
        own = project(replace(states, per_layer=None).rows(rows).combined())
        parts = dict(zip(wanted.tolist(), own.split(lens.tolist()), strict=True))
        for request in wanted[self._counts[wanted] > self._lens[wanted]].tolist():
            earlier = self._carried.read[self._step.request_ids[request]][exit_index]
            parts[request] = torch.cat([earlier, parts[request]])[-MOST_BRANCH_TOKENS:]
        for request in chunks.tolist():
            self._keep(request, exit_index, parts[request])
        read = [parts[request] for request in requests.tolist()]
        counts = np.array([len(part) for part in read], dtype=np.int64)
        return torch.cat([own[:0], *read]), counts

    def _keep(self, request: int, exit_index: int, read: Tensor) -> None:
        """Carry a partial read on: a copy, which keeps no larger tensor alive."""
        of_request = self._carried.read.setdefault(self._step.request_ids[request], {})
        of_request[exit_index] = read.clone()

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
            sums[place] = self._carried.read[request_id][exit_index]
        return sums
