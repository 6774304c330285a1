"""The batches of a step, as the exit loop runs them: compiled, or replayed as CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_adainfer.engine.cuda_graphs.segment_graphs import Replay, SegmentGraphs
from vllm_adainfer.engine.runner.adapters import RowAdapters
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.engine.segments.kv_fill import KVFill
from vllm_adainfer.engine.segments.segments import Stack, without_graphs
from vllm_adainfer.exits.batch import Batch
from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.layout import RowLayout


@dataclass(frozen=True)
class CompiledBatch(Batch):
    """Runs segments as vLLM has compiled them, one kernel (or piecewise graph) at a time.

    Attributes:
        stack: whose segments they are.
        positions: int64 [rows].
        context: vLLM's, with these rows' attention metadata and slots.
        attention: builds both for other rows of the step.
        graphs: for those rows, where the runner has captured some.
        kv_fill: writes the keys and values of skipped layers, where the KV policy wants them.
        adapters: of those rows, where LoRA is on.

    """

    stack: Stack
    positions: Tensor
    context: ForwardContext
    attention: StepAttention
    graphs: SegmentGraphs | None
    kv_fill: KVFill | None
    adapters: RowAdapters | None

    @override
    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        if self.adapters is not None:
            self.adapters.use()
        with override_forward_context(self.context):
            return self.stack.run(segment, self.positions, states)

    @override
    def write_last_kv(self, states: HiddenStates) -> None:
        if self.adapters is not None:
            self.adapters.use()
        with override_forward_context(without_graphs(self.context)):
            self.stack.write_last_kv(self.positions, states, self.context.slot_mapping)

    @override
    def fill_kv(self, exit_index: int, states: Tensor, layout: RowLayout) -> None:
        assert self.kv_fill is not None, "the KV policy is not propagate"
        rows = self.attention.rows(layout)
        self.kv_fill(exit_index, states, rows.positions, rows.slots)

    @override
    def narrowed(self, layout: RowLayout) -> Batch:
        return self.replayed(layout) or self.beside(layout)

    @override
    def beside(self, layout: RowLayout, runs_last_layer_alone: bool = False) -> CompiledBatch:
        """Launches its kernels one by one.

        Piecewise graphs read the states where they were when the graphs were captured, so only
        the original batch replays them.
        """
        attention = self.attention
        if runs_last_layer_alone:
            attention = attention.of_layer(self.stack.last_layer)
        rows, attn_metadata = attention.metadata(layout)
        context = replace(
            without_graphs(self.context),
            attn_metadata=attn_metadata,
            slot_mapping=rows.slots,
            is_padding=None,  # none of these rows is, and the step's mask is of other rows
        )
        adapters = None if self.adapters is None else self.adapters.step.of_rows(layout)
        return replace(self, positions=rows.positions, context=context, adapters=adapters)

    def replayed(self, layout: RowLayout) -> Batch | None:
        """The rows of `layout` as a batch that replays CUDA graphs, None if none fit them."""
        replay = None if self.graphs is None else self.graphs.stage(layout, self.attention)
        return None if replay is None else ReplayedBatch(self, layout, replay)


@dataclass(frozen=True)
class ReplayedBatch(Batch):
    """Replays the CUDA graphs of segments, for requests with one row each.

    Attributes:
        compiled: the batch that this one has taken the place of.
        layout: of the rows.
        replay: the graphs, with these rows in their buffers.

    """

    compiled: CompiledBatch
    layout: RowLayout
    replay: Replay

    @override
    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        return self.replay.run(segment, states)

    @override
    def write_last_kv(self, states: HiddenStates) -> None:
        self.beside(self.layout, runs_last_layer_alone=True).write_last_kv(states)

    @override
    def fill_kv(self, exit_index: int, states: Tensor, layout: RowLayout) -> None:
        self.compiled.fill_kv(exit_index, states, layout)

    @override
    def narrowed(self, layout: RowLayout) -> Batch:
        return self.compiled.narrowed(layout)

    @override
    def beside(self, layout: RowLayout, runs_last_layer_alone: bool = False) -> CompiledBatch:
        return self.compiled.beside(layout, runs_last_layer_alone)
