"""The forward pass of one step: which rows run now, and what becomes of those that leave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.exits.accounting.layers import LayerAccounting
from vllm_adainfer.exits.batch.batch import Batch, StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.step import NOBODY, StepContext

# Compacting a batch (new rows, new attention metadata) takes as long as running so many
# token-layers. On CPUs 6 to 60 were measured with a 135M model; layers of a larger model take
# longer, so that fewer rows pay for it.
COMPACTION_COST = 64


class ForwardPass:
    """The rows of one step on their way through the stack.

    Every event (requests leave, rows rejoin) goes to this object, which passes it on to the
    step's bookkeeping, the KV policy, the counters and the batch.

    Attributes:
        step: the requests.
        owners: [requests], the policy that each comes under, as an index into the policy set.
        recorded: what `record` has kept, [recorded, hidden size] each.
        batch: runs the rows that are left.
        layout: those rows.
        compaction_cost: the token-layers that a smaller batch must save to be faster.
        states: theirs, after the segments run so far; possibly with padding at the end.

    """

    def __init__(
        self,
        shape: StackShape,
        step: StepContext,
        owners: Ints,
        batch: Batch,
        input_ids: Tensor,
        kv: ExactKV,
        accounting: LayerAccounting,
        compaction_cost: int = COMPACTION_COST,
    ) -> None:
        """Begin with the rows that the step came with, as given to `Loop.run`."""
        self.step, self.owners = step, owners
        self.recorded: list[Tensor] = []
        self.batch, self.layout, self.states = batch, step.layout, HiddenStates(input_ids)
        self._shape, self._kv, self._accounting = shape, kv, accounting
        self.compaction_cost = compaction_cost
        self._padded_rows = len(input_ids)
        self._policies = accounting.numbers(owners)  # [requests]
        # Of each row the original row, negative for one that rejoined, and the policy; known once
        # the rows have changed.
        self._origin = self._row_policies = NOBODY
        self._has_changed = False
        self._tokens = accounting.tokens(self._policies, self.layout.query_lens)
        accounting.submitted(self._tokens, shape.depth)

    def run(self, segment: int) -> None:
        """Run a segment."""
        self._accounting.ran(self._tokens, self._shape.segment_layers[segment])
        self.states = self.batch.run(segment, self.states)

    def record(self) -> None:
        """Keep a copy of the state of the last row of each of `StepContext.recorded`."""
        if self.step.recorded is not None:
            [rows] = self.step.on_device(self.layout.last_rows(self.step.recorded.places))
            self.recorded.append(replace(self.states, per_layer=None).rows(rows).combined())

    def waiting(self, exit_index: int, leaving: Ints) -> Ints | None:
        """The rows that wait below an exit point for requests that stay, as `ExactKV.waiting`."""
        stays = self.layout.query_lens > 0
        stays[leaving] = False
        return self._kv.waiting(exit_index, self.step.request_ids, stays)

    def regroup(self, exit_index: int, leaving: Ints, waiting: Ints | None, max_rows: int) -> None:
        """Requests leave at an exit point, and rows that wait below it rejoin those that stay.

        `waiting` [requests] is the number of rows that rejoin each. If more than `max_rows` would
        run together, rows that wait catch up by themselves.
        """
        self._keep_track()
        if leaving.size:
            self._leave(exit_index, leaving)
        if waiting is not None:
            stay = self.layout.num_rows - int(self.layout.query_lens[leaving].sum())
            if stay + int(waiting.sum()) > max_rows:
                self._catch_up(exit_index, waiting, max_rows)
                waiting = None
            else:
                self._rejoin(exit_index, waiting)
        layout, rows = self.layout.regroup(leaving, waiting)
        self._select(layout, rows)
        if layout.num_rows:
            self.batch = self.batch.compact(layout)

    def _leave(self, exit_index: int, requests: Ints) -> None:
        step, depth = self.step, self._shape.depth_after(exit_index)
        lacks_kv, below = depth < self._shape.kv_layers, self._shape.depth - depth
        self._accounting.decided(self._policies[requests], depth)
        step.leave(requests, lacks_kv, exit_index)
        continues = step.continues[requests]
        if lacks_kv and continues.any():
            continuing = requests[continues]
            rows = self.layout.rows_of(continuing)
            policies, layout = self._row_policies[rows], self.layout.only(continuing)
            self._kv.leave(exit_index, step.request_ids, layout, rows, policies, self.states)
            self._accounting.deferred(self._accounting.tokens(policies), below)
            requests = requests[~continues]
        skipped = self._row_policies[self.layout.rows_of(requests)]
        self._accounting.skipped(self._accounting.tokens(skipped), below)

    def _rejoin(self, exit_index: int, waiting: Ints) -> None:
        """Append rows that waited; `_select` puts them in their places."""
        states, policies = self._kv.rejoin(exit_index, self.step.request_ids, waiting)
        own = self.states.rows(slice(0, self.layout.num_rows))  # without padding
        self.states = HiddenStates.cat([own, states])
        self._origin = np.append(self._origin, np.full(len(policies), -1))
        self._row_policies = np.append(self._row_policies, policies)

    def _catch_up(self, exit_index: int, waiting: Ints, max_rows: int) -> None:
        """Run all rows that wait for some requests through the rest of the stack.

        Rows below later exit points have earlier positions, so they run first. This builds
        attention metadata, so the step's own batch needs new ones afterwards. `waiting` [requests]
        are the rows that wait below `exit_index`, where the batch has arrived; 0 for requests that
        do not catch up.
        """
        shape, request_ids, accounting = self._shape, self.step.request_ids, self._accounting
        last = self.layout.last_positions - self.layout.query_lens
        parts: list[tuple[int, RowLayout]] = []
        for index in range(exit_index, shape.last_segment):
            lens = self._kv.waiting(index, request_ids, waiting > 0)
            if lens is not None:
                parts.append((index, RowLayout(lens, last)))
                last = last - lens
        for index, layout in reversed(parts):
            states, policies = self._kv.rejoin(index, request_ids, layout.query_lens)
            starts = range(0, layout.num_rows, max_rows)
            for start in starts:
                rows = slice(start, min(start + max_rows, layout.num_rows))
                chunk, chunk_states = self.batch.side_batch(layout.part(rows)), states.rows(rows)
                for segment in range(index + 1, shape.tail):
                    chunk_states = chunk.run(segment, chunk_states)
                if shape.own_kv_layers is None:
                    chunk.write_last_kv(chunk_states)
            tokens, skipped = accounting.tokens(policies), shape.depth - shape.kv_layers
            accounting.ran(tokens, shape.kv_layers - shape.depth_after(index), len(starts))
            accounting.skipped(tokens, skipped)

    def drop_unsampled(self) -> None:
        """At the tail, leave only the rows of each request that yield a token, if that pays.

        Nobody reads the final states of the others. If the tail is the last layer, they get their
        keys and values there, and are counted as if they had run it.
        """
        shape, layout = self._shape, self.layout
        if self.step.all_rows_count:
            return
        kept, last_rows = layout.last_only(self.step.sampled_lens)
        if (layout.num_rows - kept.num_rows) * shape.tail_layers < self.compaction_cost:
            return
        is_last_layer = shape.own_kv_layers is None
        if not is_last_layer:
            self._keep_track()
            dropped = np.delete(self._row_policies, last_rows)
            self._accounting.skipped(self._accounting.tokens(dropped), shape.tail_layers)
        states, tokens = self.states, self._tokens
        self._select(kept, last_rows)
        if is_last_layer:
            self.batch.write_last_kv(states)
            self._tokens = tokens
        self.batch = self.batch.side_batch(self.layout, is_last_layer)

    def finish(self) -> Tensor:
        """Run the last segment; returns the LM head's input, [padded rows, head size].

        It is defined only in the original rows of what was left of the batch.
        """
        shape = self._shape
        if self.states.num_rows == 0:
            return self.states.hidden.new_empty(self._padded_rows, shape.head_size)
        if shape.tail == shape.last_segment:
            self.drop_unsampled()
        self.run(shape.last_segment)
        self._accounting.decided(self._policies[self.step.at_full_depth()], shape.depth)
        final = self.states.hidden
        if not self._has_changed:
            return final
        kept = np.flatnonzero(self._origin >= 0)
        source, target = self.step.on_device(kept, self._origin[kept])
        output = final.new_empty(self._padded_rows, shape.head_size)
        output[target] = final[source]
        return output

    def _select(self, layout: RowLayout, rows: Ints) -> None:
        """Continue with the rows of `layout`; `rows` is the current index of each."""
        if rows.size:
            [rows_on_device] = self.step.on_device(rows)
            self.states = self.states.rows(rows_on_device)
        else:
            self.states = self.states.rows(slice(0, 0))
        if self._has_changed:
            self._origin, self._row_policies = self._origin[rows], self._row_policies[rows]
        else:
            self._origin, self._row_policies = rows, self._policies[layout.row_requests]
            self._has_changed = True
        self._tokens = self._accounting.tokens(self._row_policies)
        self.layout = layout

    def _keep_track(self) -> None:
        """The rows are about to change: keep the origin and the policy of each from now on."""
        if not self._has_changed:
            self._has_changed = True
            self._origin = np.arange(self.layout.num_rows)
            self._row_policies = self._policies[self.layout.row_requests]
